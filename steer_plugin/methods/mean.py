"""Mean steering (CAA, Mean-S): v = mean_i (h+_i - h-_i), and h <- h + alpha * v.

Mean-S(BA) has one mean per behaviour, the behaviour being known at test time. Sources: CAA (arXiv 2312.06681);
Mean-S and Mean-S(BA) as baselines in Learning to Steer (arXiv 2508.12815), section 4.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, nearest
from steer_plugin.intervention import Alpha, FixedVector, Intervention, Steerable, Write, check_alpha, check_vector
from steer_plugin.methods._saved import model_of, read_artefact, saved_alpha, write_artefact
from steer_plugin.methods.hub import HubArtefact
from steer_plugin.positions import Positions
from steer_plugin.shifts import Shifts
from steer_plugin.sites import Site

M = TypeVar("M", bound="MeanSteering")


class MeanSteering(HubArtefact, Steerable):
    """One vector (d_model,), or one per batch row (row, d_model), added at a site.

    Raises:
        InputError: NaN, infinite or wrongly shaped vector.
        SiteError, PositionError: unknown names.
    """

    kind = "mean"

    def __init__(
        self,
        vector: Float[Tensor, "*row d_model"],
        site: Site | str,
        positions: Positions | str = "paper",
        alpha: Alpha = 1.0,
        model: Mapping[str, JSON] | None = None,
    ) -> None:
        self.vector = check_vector(vector)
        self.site = Site.parse(site)
        self.positions = Positions.parse(positions)
        self.alpha = alpha
        self.model = model

    @property
    def intervention(self) -> Intervention:
        """The one write."""
        width = self.vector.shape[-1]
        delta = FixedVector(self.vector)
        return Intervention((Write(self.site, self.positions, delta, self.alpha, width=width, made_for=self.model),))

    @classmethod
    def fit(
        cls, shifts: Shifts, behaviour: str | None = None, positions: Positions | str = "paper", alpha: Alpha = 1.0
    ) -> MeanSteering:
        """Mean of the shifts, of one behaviour if it is named.

        Raises:
            InputError: no shift has that behaviour.
        """
        return cls(shifts.mean(behaviour), str(shifts.job["write"]), positions, alpha, model_of(shifts.job))

    def with_alpha(self: M, alpha: Alpha) -> M:
        """The same vectors at another strength.

        Raises:
            InputError: alpha not finite.
        """
        if not callable(alpha):
            check_alpha(alpha)
        other = copy.copy(self)
        other.alpha = alpha
        return other

    def meta(self) -> dict[str, JSON]:
        """Site, positions, alpha and model, as JSON."""
        return {
            "site": str(self.site),
            "positions": str(self.positions),
            "alpha": saved_alpha(self.alpha),
            "model": self.model,
        }

    def save(self, folder: Path | str) -> None:
        """Write the vector, its site, positions, alpha and model as safetensors + JSON."""
        write_artefact(folder, self.kind, {"vector": self.vector}, self.meta())

    @classmethod
    def load(cls, folder: Path | str) -> MeanSteering:
        """Read what `save` wrote; steers without further arguments.

        Raises:
            ArtefactError: missing, corrupt, pickled, or of another kind.
        """
        tensors, meta = read_artefact(folder, cls.kind, ("vector",))
        alpha = meta["alpha"]
        strength = float(alpha) if isinstance(alpha, (int, float)) else torch.tensor(alpha)
        return cls(tensors["vector"], str(meta["site"]), str(meta["positions"]), strength, model_of(meta))


class BehaviourMeans:
    """Mean-S(BA): one mean vector per behaviour; `rows` picks one for each batch row."""

    def __init__(self, means: Mapping[str, MeanSteering]) -> None:
        self.means = dict(means)

    @classmethod
    def fit(cls, shifts: Shifts, positions: Positions | str = "paper", alpha: Alpha = 1.0) -> BehaviourMeans:
        """One mean for each behaviour in the shifts."""
        return cls({name: MeanSteering.fit(shifts, name, positions, alpha) for name in shifts.counts()})

    def rows(self, behaviours: Sequence[str]) -> MeanSteering:
        """Steer each batch row by the mean of its behaviour.

        Raises:
            InputError: a behaviour that was not fitted.
        """
        for name in behaviours:
            if name not in self.means:
                known = sorted(self.means)
                raise InputError(f"no mean for behaviour {name!r}.{nearest(name, known)} Fitted: {', '.join(known)}.")
        chosen = [self.means[name] for name in behaviours]
        first = chosen[0]
        vectors = torch.stack([one.vector for one in chosen])
        return MeanSteering(vectors, first.site, first.positions, first.alpha, first.model)
