"""The one stack of steering of an attached model: nested blocks add up, and nothing is left behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from steer_plugin.adapters._asides import Asides, Reader, install_asides
from steer_plugin.adapters._compiled import unwrapped
from steer_plugin.adapters._hooks import hooked
from steer_plugin.adapters._parts import Framework, ModelParts
from steer_plugin.adapters._replay import QuietCall, install_replay
from steer_plugin.adapters._run import Run
from steer_plugin.adapters._travel import managed
from steer_plugin.adapters._twins import install_twins
from steer_plugin.intervention import Intervention, Steerable
from steer_plugin.sites import Site


class SteeredModel(ABC):
    """A model, its parts and its one stack of steering; adapters say how a run is put in force.

    Attributes:
        model: what the user attached.
        parts: its Hugging Face root, decoder and sizes.
        processor: its processor, or None.
    """

    framework: ClassVar[Framework]

    def __init__(self, model: object, root: nn.Module, processor: ProcessorMixin | None) -> None:
        self.model = model
        self.processor = processor
        self.parts = ModelParts.of(root, processor)
        self.asides = Asides(self.parts, processor)
        self._stack: list[Intervention] = []
        self._run: Run | None = None
        self._last: Run | None = None

    def __repr__(self) -> str:
        """Name framework, family and sizes."""
        return (
            f"<{self.parts.family.name} attached through {self.framework}: {self.n_layers} layers, "
            f"d_model {self.d_model}>"
        )

    @property
    def root(self) -> nn.Module:
        """The Hugging Face model underneath."""
        return self.parts.root

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self.parts.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.parts.d_model

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.parts.device

    # -- what an adapter says ------------------------------------------------------------------------------------

    @abstractmethod
    def ends(self, site: Site) -> tuple[nn.Module, str]:
        """Module and end ("input" or "output") where the tensor of a resolved site passes."""

    @abstractmethod
    def lowered(self, run: Run) -> AbstractContextManager[Any]:
        """Put a run in force; yields what the user calls."""

    @abstractmethod
    def _generate(self, steered: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Generate on what `lowered` yields."""

    @abstractmethod
    def _forward(self, steered: Any, inputs: Mapping[str, Any]) -> None:
        """One forward on what `lowered` yields."""

    @managed
    def quiet(self, run: Run) -> Generator[QuietCall, None, None]:
        """Yield a way to call the decoder inside a forward so that the run's sites fire."""
        yield self.parts.decoder

    @managed
    def _reading(self, reader: Reader) -> Generator[tuple[Callable[..., Tensor], Callable[..., object]], None, None]:
        """Put a reader in place of whatever steers; yields the embedding and the decoder."""
        outer = self._run
        was_paused = outer is not None and outer.paused
        if outer is not None:
            outer.paused = True
        try:
            with hooked(self.ends, reader):
                yield self.inner(self.parts.embedding), self.inner(self.parts.family.decoder)
        finally:
            if outer is not None:
                outer.paused = was_paused

    def check_rows_may_ride(self) -> None:
        """Refuse twins behind the batch where the framework would take them for the user's; called in a forward."""
        return

    def inner(self, path: str) -> Callable[..., Any]:
        """A module of the root model, to be called so that the user's framework takes no notice."""
        return self.parts.root.get_submodule(path)

    def equip(self, run: Run, *, plainly: bool = False) -> None:
        """Give a run all that takes more than one look: texts of its own, late reads, twins.

        Raises:
            InputError: a text that cannot be read.
        """
        self.asides.serve(run, self._reading)
        # Under plain hooks the decoder is called as it is: those hooks fire in it already.
        quiet = partial(SteeredModel.quiet, self) if plainly else self.quiet
        install_asides(run, quiet)
        install_replay(run, quiet)
        install_twins(run, quiet, self.check_rows_may_ride)

    # -- way 2: around any call ----------------------------------------------------------------------------------

    @managed
    def steering(
        self, *steering: Steerable, completion_tokens: int | Sequence[int] | None = None
    ) -> Generator[Any, None, None]:
        """Steer every forward and generate in the block; nests and adds; yields what the user calls.

        Raises:
            SiteError, InputError, PositionError: before any work, what this model cannot host; at the end, a write that
                matched no token.
        """
        added = Intervention.of(steering)
        run = Run(self.parts, Intervention.of([*self._stack, added]), completion_tokens=completion_tokens)
        self._stack.append(added)
        try:
            with self._installed(run, check=True) as steered:
                yield steered
        finally:
            self._stack.pop()

    @managed
    def steering_root(
        self, *steering: Steerable, completion_tokens: int | Sequence[int] | None = None
    ) -> Generator[nn.Module, None, None]:
        """Steer the Hugging Face model itself by torch hooks, whatever framework it is attached through; for training.

        Raises:
            SiteError, InputError, PositionError: before any work, what this model cannot host.
        """
        run = Run(self.parts, Intervention.of([*self._stack, *steering]), completion_tokens=completion_tokens)
        with self._installed(run, plainly=True):
            yield self.parts.root

    @managed
    def _installed(self, run: Run, *, check: bool = False, plainly: bool = False) -> Generator[Any, None, None]:
        """Put a run in force in place of the one that was, and that one back afterwards."""
        outer, self._run, self._last = self._run, run, run
        if outer is not None:
            outer.paused = True
        try:
            with ExitStack() as stack:
                run.held = True
                if isinstance(self.model, nn.Module) and unwrapped(self.model) is not self.model:
                    run.run_eagerly()
                run.watch()
                self.equip(run, plainly=plainly)
                yield stack.enter_context(hooked(self.ends, run) if plainly else self.lowered(run))
        except BaseException:
            run.close()
            raise
        else:
            run.close(check=check)
        finally:
            self._run = outer
            if outer is not None:
                outer.paused = False

    @property
    def counts(self) -> list[list[int]]:
        """Tokens written by each write of the steering in force (or of the last one), per row of the last prompt."""
        return [] if self._last is None else self._last.counts()
