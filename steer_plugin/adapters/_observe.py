"""One prompt forward, looked at: its logits and whole streams at any sites, with the gradient's graph where wanted.

Torch hooks on the Hugging Face model underneath, whatever framework it is attached through: what an analysis repeats a
hundred times pays for no framework's tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.adapters._bulk_model import BulkModel
from steer_plugin.adapters._call import Forward, Tap
from steer_plugin.adapters._inputs import check_inputs, with_positions
from steer_plugin.adapters._run import Run
from steer_plugin.errors import InputError, SiteError
from steer_plugin.intervention import Intervention, Steerable
from steer_plugin.layout import TokenLayout
from steer_plugin.positions import Positions
from steer_plugin.sites import Site


@dataclass(frozen=True, repr=False)
class Observed:
    """What `vlm.observe` returns.

    Attributes:
        logits: (row, pos, vocab) for every token of the prompt.
        layout: what each token is; `Positions.mask(layout)` finds tokens in `at`.
        at: the whole stream at each site, (row, pos, d_model), steering included; padding holds no meaning.
    """

    logits: Float[Tensor, "row pos vocab"]
    layout: TokenLayout
    at: dict[Site, Float[Tensor, "row pos d_model"]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Name sites and shapes, not numbers."""
        return f"Observed(logits {tuple(self.logits.shape)}; {', '.join(map(str, self.at))})"

    def __getitem__(self, site: Site | str) -> Float[Tensor, "row pos d_model"]:
        """Return the stream at a site.

        Raises:
            SiteError: it was not asked for.
        """
        wanted = Site.parse(site)
        if wanted not in self.at:
            raise SiteError(f"{wanted} was not observed; observed: {', '.join(map(str, self.at)) or 'none'}.")
        return self.at[wanted]


class ObservingModel(BulkModel):
    """A model whose prompt forwards can be looked at whole."""

    def layout(self, inputs: Mapping[str, Tensor], completion_tokens: int | Sequence[int] | None = None) -> TokenLayout:
        """Tell what each token of a batch of prompts is, without running the model.

        Raises:
            InputError: no input_ids, or a mask of another shape.
        """
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise InputError("input_ids are missing; build the inputs with vlm.inputs(...) or the model's processor.")
        real = self.parts.real_tokens(inputs.get("attention_mask"), ids.shape[0], ids.shape[1], ids.device)
        return self.parts.layout(ids, real, completion_tokens)

    def observe(
        self,
        inputs: Mapping[str, Tensor],
        sites: Site | str | Sequence[Site | str] = (),
        steering: Steerable | Sequence[Steerable] | None = None,
        *,
        grad: bool = False,
        completion_tokens: int | Sequence[int] | None = None,
    ) -> Observed:
        """Run the prompt once and keep its logits, and the whole stream at the sites; `grad` keeps the graph.

        Raises:
            SiteError, InputError: before any work, what this model cannot host.
            PositionError: a steering that matches no token of the prompt.
        """
        check_inputs(self.parts, inputs)
        asked = [sites] if isinstance(sites, (Site, str)) else sites
        wanted = [self.parts.resolve(Site.parse(site)) for site in asked]
        for site in wanted:
            self.parts.point(site)
        got: dict[Site, Tensor] = {}

        def take(site: Site) -> Callable[[Tensor, Forward], None]:
            def keep(hidden: Tensor, forward: Forward) -> None:
                got[site] = hidden if grad else hidden.clone()

            return keep

        added = [] if steering is None else [steering] if isinstance(steering, Steerable) else list(steering)
        taps = [Tap(site, Positions.parse("everywhere"), take(site)) for site in wanted]
        run = Run(self.parts, Intervention.of([*self._stack, *added]), taps, completion_tokens)
        with torch.set_grad_enabled(grad), self._installed(run, check=bool(added), plainly=True):
            out = self.parts.root(**with_positions(self.parts, inputs))
        run.check_fired()
        return Observed(out.logits, self.layout(inputs, completion_tokens), {site: got[site] for site in wanted})
