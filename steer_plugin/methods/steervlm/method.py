"""SteerVLM: x_l <- x_l + lambda * g(s, p+, p-) * s at attn_out of every layer, s = h(x, u, p+, p-).

x is the steered stream's attention output, u the unsteered one's at the same token, p+ and p- the activations of a
target and a converse prompt at the same layer. Source: arXiv 2510.26769; a reconstruction (`config.py`: what is ours).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.atomic import JSON
from steer_plugin.context import Aside, Context
from steer_plugin.errors import ArtefactError, InputError
from steer_plugin.intervention import Alpha, Intervention, Steerable, Write, check_alpha
from steer_plugin.methods._replicas import Replicas
from steer_plugin.methods._saved import model_of, read_artefact, saved_alpha, write_artefact
from steer_plugin.methods.hub import HubArtefact
from steer_plugin.methods.steervlm.config import SteerVLMConfig
from steer_plugin.methods.steervlm.module import PairMemory, SteerVLMModule
from steer_plugin.positions import Positions
from steer_plugin.sites import attn_out

if TYPE_CHECKING:
    from steer_plugin.adapters import AttachedModel
    from steer_plugin.contrast.rows import SteeringRow
    from steer_plugin.training.steervlm_config import SteerVLMTraining


class SteerVLM(HubArtefact, Steerable):
    """The module, the pair that it is bound to, on which tokens, and how strongly (lambda is `alpha` here).

    Raises:
        InputError: alpha not finite.
        PositionError: unknown positions.
    """

    kind = "steervlm"

    def __init__(
        self,
        module: SteerVLMModule,
        *,
        pairs: Sequence[tuple[str, str]] = (),
        positions: Positions | str = "paper",
        alpha: Alpha = 1.0,
        model: Mapping[str, JSON] | None = None,
        report: Mapping[str, JSON] | None = None,
    ) -> None:
        if not callable(alpha):
            check_alpha(alpha)
        self.module = module
        self.pairs = tuple(pairs)
        self.positions = Positions.parse(positions)
        self.alpha = alpha
        self.model = model
        self.report = report
        self._replicas = Replicas()

    def __repr__(self) -> str:
        """Name size, pairs, positions and strength."""
        config = self.module.config
        bound = "no pair" if not self.pairs else f"{len(self.pairs)} pair(s)"
        return (
            f"SteerVLM(d_model {config.d_model}, {config.n_layers} layers, {bound}, on {str(self.positions)!r}, "
            f"alpha {self.alpha})"
        )

    @classmethod
    def new(cls, config: SteerVLMConfig, seed: int = 0) -> SteerVLM:
        """An untrained module, drawn from a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = SteerVLMModule(config)
        return cls(module.requires_grad_(False).eval())

    @classmethod
    def fit(
        cls,
        vlm: AttachedModel,
        rows: Sequence[SteeringRow],
        config: SteerVLMConfig | None = None,
        training: SteerVLMTraining | None = None,
        *,
        positions: Positions | str = "paper",
        seed: int = 0,
        out: Path | str | None = None,
        progress: bool = True,
    ) -> SteerVLM:
        """Train a new module on rows (picture, task, p+, p-, answer) through the frozen model.

        `config` sizes the module and makes the unpublished choices, `training` says how; `seed` draws the module and
        the order of the rows. With `out`, checkpoints are kept there and the same call resumes after a crash.

        Raises:
            InputError: no rows, rows without room for an answer, a pair that cannot be read, no processor.
            JobError: `out` holds another training.
        """
        # Imported here: training needs accelerate, steering does not.
        from steer_plugin.training.steervlm import train_steervlm

        sized = SteerVLMConfig(vlm.d_model, vlm.n_layers) if config is None else config
        fresh = cls.new(sized, seed).with_positions(positions)
        return train_steervlm(vlm, rows, fresh, training, out=out, seed=seed, progress=progress)

    def pair(self, p_plus: str | Sequence[str], p_minus: str | Sequence[str]) -> SteerVLM:
        """Bind a target and a converse prompt; lists bind one pair per batch row. Equal prompts are allowed: neutral.

        Raises:
            InputError: an empty prompt, or lists of other lengths.
        """
        plus, minus = ([side] if isinstance(side, str) else list(side) for side in (p_plus, p_minus))
        if len(plus) != len(minus) or not plus:
            raise InputError(f"got {len(plus)} target and {len(minus)} converse prompts; give as many of each.")
        for name, side in (("p_plus", plus), ("p_minus", minus)):
            for text in side:
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f"{name} must be a text that is not empty, got {text!r}; say what is wanted.")
        return self._changed(pairs=tuple(zip(plus, minus, strict=True)))

    def with_alpha(self, alpha: Alpha) -> SteerVLM:
        """The same module at another lambda."""
        return self._changed(alpha=alpha)

    def with_positions(self, positions: Positions | str) -> SteerVLM:
        """The same module on other tokens."""
        return self._changed(positions=positions)

    def _changed(
        self,
        pairs: Sequence[tuple[str, str]] | None = None,
        positions: Positions | str | None = None,
        alpha: Alpha | None = None,
    ) -> SteerVLM:
        made = SteerVLM(
            self.module,
            pairs=self.pairs if pairs is None else pairs,
            positions=self.positions if positions is None else positions,
            alpha=self.alpha if alpha is None else alpha,
            model=self.model,
            report=self.report,
        )
        made._replicas = self._replicas
        return made

    @property
    def intervention(self) -> Intervention:
        """One write at attn_out of every layer, by the one module.

        Raises:
            InputError: no pair is bound.
        """
        if not self.pairs:
            raise InputError("SteerVLM needs its prompt pair: steervlm.pair('I love rain.', 'I hate rain.').")
        config = self.module.config
        asides = tuple(Aside(tuple(pair[side] for pair in self.pairs), *config.aside) for side in (0, 1))
        model = {"d_model": config.d_model, "n_layers": config.n_layers, **(self.model or {})}
        return Intervention(
            tuple(
                Write(
                    attn_out(layer), self.positions, self._delta, self.alpha, width=config.d_model, made_for=model,
                    asides=asides, unsteered=config.unsteered,
                )
                for layer in range(config.n_layers)
            )
        )  # fmt: skip

    def _delta(self, hidden: Float[Tensor, "row pos d_model"], context: Context) -> Float[Tensor, "row pos d_model"]:
        weight = self.module.steerer.down.weight
        # While training both are made anew: gradient checkpointing must find the same graph when it runs again.
        training = torch.is_grad_enabled() and weight.requires_grad

        def here() -> SteerVLMModule:
            return self._replicas.on(self.module, hidden.device)

        module = self.module
        if weight.device != hidden.device:
            module = here() if training else context.once("module", here)

        def remember() -> PairMemory:
            plus, minus = context.asides
            return module.remember(plus.tokens, plus.real, minus.tokens, minus.real)

        memory = remember() if training else context.once("pair", remember)
        s, gate, change = module(hidden, context.unsteered, memory)
        if context.note is not None:
            context.note("s", s)
            context.note("gate", gate if gate is not None else torch.ones_like(s))
            context.note("change", change)
        return change

    def digest(self) -> str:
        """SHA-256 of the module's weights: tells modules apart, whatever their names."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            found.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
        return found.hexdigest()

    def meta(self) -> dict[str, JSON]:
        """Config, pairs, sites, positions, alpha, model and training report, as JSON."""
        return {
            "config": self.module.config.as_json(),
            "pairs": [list(pair) for pair in self.pairs],
            "sites": [str(attn_out(layer)) for layer in range(self.module.config.n_layers)],
            "positions": str(self.positions),
            "alpha": saved_alpha(self.alpha),
            "model": self.model,
            "report": self.report,
        }

    def save(self, folder: Path | str) -> None:
        """Write module, config, positions, alpha, model and training report as safetensors + JSON; pairs too."""
        write_artefact(folder, self.kind, self.module.state_dict(), self.meta())

    @classmethod
    def load(cls, folder: Path | str) -> SteerVLM:
        """Read what `save` wrote.

        Raises:
            ArtefactError: missing, corrupt, of another kind, or tensors that do not fit the config beside them.
        """
        tensors, meta = read_artefact(folder, cls.kind, ())
        stored = meta.get("config")
        if not isinstance(stored, Mapping):
            raise ArtefactError(f"the artefact in {folder} has no SteerVLM config; train it again.")
        module = SteerVLMModule(SteerVLMConfig.from_json(stored))
        load_state(module, tensors, str(folder))
        alpha, pairs, report = meta["alpha"], meta["pairs"], meta["report"]
        return cls(
            module.requires_grad_(False).eval(),
            pairs=[(str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list)]
            if isinstance(pairs, list)
            else (),
            positions=str(meta["positions"]),
            alpha=float(alpha) if isinstance(alpha, (int, float)) else torch.tensor(alpha),
            model=model_of(meta),
            report=report if isinstance(report, Mapping) else None,
        )


def load_state(module: SteerVLMModule, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill a module with tensors.

    Raises:
        ArtefactError: other names or shapes than the module's config asks for.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if own != given:
        odd = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        shown = ", ".join(f"{name} {given.get(name)} instead of {own.get(name)}" for name in odd[:3])
        raise ArtefactError(f"{where} was made with another SteerVLM config: {shown}.")
    dtype = next(iter(tensors.values())).dtype
    module.to(dtype).load_state_dict(dict(tensors))
