"""ActAdd: what two bare prompts differ by, added to the stream: v = h(p+) - h(p-) at the last word of each.

Source: arXiv 2308.10248, as a baseline in SteerVLM (arXiv 2510.26769). No picture and no data is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.adapters import AttachedModel
from steer_plugin.methods import MeanSteering
from steer_plugin.sites import Site

Pair = tuple[str, str]


@dataclass
class ActAdd:
    """The difference of each prompt pair at a site; pairs are read once.

    Attributes:
        pairs: (p+, p-) by item id; `pair` is the one for all where an id has none.
    """

    vlm: AttachedModel
    site: Site
    positions: str = "paper"
    pairs: Mapping[str, Pair] = field(default_factory=dict[str, Pair])
    pair: Pair | None = None
    _read: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def rows(self, ids: Sequence[str], alpha: float = 1.0) -> MeanSteering:
        """Steer each row of a batch by its own pair.

        Raises:
            KeyError: an id without a pair; `Lineup.check` refuses such benchmarks before any work.
        """
        chosen = [self.pairs[one] if self.pair is None else self.pair for one in ids]
        vectors = torch.stack([self._last(plus) - self._last(minus) for plus, minus in chosen])
        return MeanSteering(vectors, self.site, self.positions, alpha, self.vlm.parts.identity())

    def _last(self, prompt: str) -> Float[Tensor, " d_model"]:
        if prompt not in self._read:
            self._read[prompt] = self.vlm.cache(self.vlm.inputs([prompt]), [self.site], "user_end")[self.site][0, -1]
        return self._read[prompt]
