"""Learning to Steer: h_{L*} <- h_{L*} + alpha * g(h_{L'}), a vector predicted from the input's own activation.

Source: arXiv 2508.12815 and the authors' code. `positions`: "paper" steers the last prompt token (which decides the
first answer token) and the generated ones; "authors_code" steers every token, picture included. With L' behind L* the
context is read in a pass of its own, and only the last prompt token runs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.atomic import JSON
from steer_plugin.context import Context, Read
from steer_plugin.errors import ArtefactError, InputError
from steer_plugin.intervention import Alpha, Intervention, Steerable, Write, check_alpha
from steer_plugin.methods._replicas import Replicas
from steer_plugin.methods._saved import model_of, read_artefact, saved_alpha, write_artefact
from steer_plugin.methods.hub import HubArtefact
from steer_plugin.methods.network import NAMES, SteeringNetwork
from steer_plugin.methods.published import published_network
from steer_plugin.positions import Positions
from steer_plugin.shifts import Shifts
from steer_plugin.sites import Site

if TYPE_CHECKING:
    from steer_plugin.training.config import FitConfig, FitReport


class L2S(HubArtefact, Steerable):
    """A fitted network, where it reads, where it writes, on which tokens, and how strongly.

    Attributes:
        model: identity of the model that it was fitted on; another one refuses it.
        report: how the fit went, where it was fitted in this process.
        trained_on: the data of a published network.

    Raises:
        InputError: alpha not finite.
        SiteError, PositionError: unknown names.
    """

    kind = "l2s"

    def __init__(
        self,
        network: SteeringNetwork,
        write: Site | str,
        read: Site | str | None = None,
        *,
        context: Positions | str = "last_prompt",
        positions: Positions | str = "paper",
        alpha: Alpha = 1.0,
        model: Mapping[str, JSON] | None = None,
        report: FitReport | None = None,
        trained_on: str | None = None,
    ) -> None:
        if not callable(alpha):
            check_alpha(alpha)
        self.network = network
        self.write = Site.parse(write)
        self.read = Read.at(self.write if read is None else read, context)
        self.positions = Positions.parse(positions)
        self.alpha = alpha
        self.model = model
        self.report = report
        self.trained_on = trained_on
        self._replicas = Replicas()

    def predict(self, context: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return the steering vector of each context, before alpha.

        Raises:
            InputError: contexts of another width than the network's.
        """
        width = self.network.encoder.in_features
        if context.shape[-1] != width:
            raise InputError(f"contexts have width {context.shape[-1]}, the network was fitted on {width}.")
        return self._replicas.on(self.network, context.device)(context)

    @property
    def intervention(self) -> Intervention:
        """One write whose delta runs the network once per prompt."""
        width = self.network.decoder.out_features
        return Intervention(
            (Write(self.write, self.positions, self._delta, self.alpha, "add", (self.read,), width, self.model),)
        )

    def _delta(self, hidden: Float[Tensor, "row pos d_model"], context: Context) -> Float[Tensor, "row 1 d_model"]:
        return context.once("vector", lambda: self.predict(context.reads[0]).to(hidden.device))[:, None]

    @classmethod
    def fit(
        cls,
        shifts: Shifts,
        config: FitConfig | str = "pope",
        *,
        validation: Shifts | None = None,
        neutral: Shifts | Float[Tensor, "row d_model"] | None = None,
        seed: int = 0,
        positions: Positions | str = "paper",
        alpha: Alpha = 1.0,
    ) -> L2S:
        """Fit the network on P2S shifts; `config` is a preset ("pope", "safety", "fast", "mse") or a FitConfig.

        `neutral`: inputs to be left alone (harmless requests, say), as contexts or as shifts whose vectors are not
        looked at. The network learns the zero vector for them; fitted on inputs that all need steering it has no
        reason to, and steers whatever it is shown.

        Raises:
            InputError: unknown preset, too few samples, values that are not finite, neutral contexts of another model
                or site.
        """
        # Imported here: what only steers with a fitted network need not load it.
        from steer_plugin.training.l2s import fit_network

        fitted = shifts if neutral is None else shifts.with_neutral(neutral)
        network, report = fit_network(fitted, config, validation=validation, seed=seed)
        return cls(
            network,
            str(shifts.job["write"]),
            str(shifts.job["read"]),
            context=str(shifts.job["context"]),
            positions=positions,
            alpha=alpha,
            model=model_of(shifts.job),
            report=report,
        )

    def with_alpha(self, alpha: Alpha) -> L2S:
        """The same network at another strength."""
        return self._changed(self.positions, alpha)

    def with_positions(self, positions: Positions | str) -> L2S:
        """The same network on other tokens."""
        return self._changed(positions, self.alpha)

    def _changed(self, positions: Positions | str, alpha: Alpha) -> L2S:
        return L2S(
            self.network,
            self.write,
            self.read.site,
            context=self.read.positions,
            positions=positions,
            alpha=alpha,
            model=self.model,
            report=self.report,
            trained_on=self.trained_on,
        )

    def meta(self) -> dict[str, JSON]:
        """Sites, positions, alpha, model and fitting report, as JSON."""
        return {
            "write": str(self.write),
            "read": str(self.read.site),
            "context": str(self.read.positions),
            "positions": str(self.positions),
            "alpha": saved_alpha(self.alpha),
            "model": self.model,
            "report": None if self.report is None else self.report.as_json(),
            "trained_on": self.trained_on,
        }

    def save(self, folder: Path | str) -> None:
        """Write network, sites, positions, alpha, model and fitting report as safetensors + JSON."""
        write_artefact(folder, self.kind, self.network.state_dict(), self.meta())

    @classmethod
    def load(cls, folder: Path | str) -> L2S:
        """Read what `save` wrote; steers without further arguments.

        Raises:
            ArtefactError: missing, corrupt, truncated, pickled, or of another kind.
        """
        tensors, meta = read_artefact(folder, cls.kind, NAMES)
        alpha, trained_on = meta["alpha"], meta.get("trained_on")
        return cls(
            _network(tensors, str(folder)),
            str(meta["write"]),
            str(meta["read"]),
            context=str(meta["context"]),
            positions=str(meta["positions"]),
            alpha=float(alpha) if isinstance(alpha, (int, float)) else torch.tensor(alpha),
            model=model_of(meta),
            trained_on=None if trained_on is None else str(trained_on),
        )

    @classmethod
    def from_published(
        cls,
        path: Path | str,
        write: Site | str | None = None,
        read: Site | str | None = None,
        *,
        context: Positions | str | None = None,
        positions: Positions | str = "paper",
        alpha: Alpha | None = None,
    ) -> L2S:
        """Load a network that the L2S authors published (.pt, read with weights_only=True).

        The three published files are known by their SHA-256, which sets model, sites, context, alpha and training data;
        an argument that is given replaces what is known. Other files need `write` and `read`; their context is
        "last_prompt" and their alpha 1 where nothing is said.

        Raises:
            ArtefactError: missing or corrupt file, or one that holds no such network.
            InputError: an unknown file without `write` and `read`.
        """
        state, known = published_network(Path(path))
        if known is None:
            if write is None or read is None:
                raise InputError(
                    f"{path} is none of the published files (another network, or a damaged one), and got write="
                    f"{write!r}, read={read!r}: say where it steers and what it looks at, as in L2S.from_published("
                    "path, write='resid_post.14', read='resid_post.14'); save(folder) then keeps both."
                )
            return cls(
                _network(state, str(path)),
                write,
                read,
                context="last_prompt" if context is None else context,
                positions=positions,
                alpha=1.0 if alpha is None else alpha,
            )
        return cls(
            _network(state, str(path)),
            known.write if write is None else write,
            known.read if read is None else read,
            context=known.context if context is None else context,
            positions=positions,
            alpha=known.alpha if alpha is None else alpha,
            model={"family": known.family, "name": known.model, "d_model": known.d_model, "n_layers": known.n_layers},
            trained_on=known.trained_on,
        )


def _network(state: dict[str, Tensor], where: str) -> SteeringNetwork:
    """Build the network of a file.

    Raises:
        ArtefactError: shapes that do not fit together, or values that are not finite.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    misfit = f"{where} holds no L2S network: shapes {shapes} do not fit together, expected (h, d), (h,) and (d, h)."
    try:
        network = SteeringNetwork.of(state)
    except (RuntimeError, ValueError) as error:
        raise ArtefactError(misfit) from error
    if network.encoder.in_features != network.decoder.out_features:
        raise ArtefactError(misfit)
    for name, tensor in network.state_dict().items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise ArtefactError(f"{where} is damaged: {name} holds {bad} NaN or infinite values, expected none.")
    return network
