"""nnsight models: the run is lowered into nnsight's own reads and assignments, so the user's later reads see it.

    for each forward:  for each site in order of execution:  envoy.output = run.at(site, envoy.output)

`steering` stores that loop as an edit and yields a thin proxy, because a plain call of an edited model is silently
unsteered (nnsight 0.8: edits are replayed by traces only).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, cast

import nnsight
from nnsight import NNsight, TransformersModel
from nnsight.intervention.batching import Batcher
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.tracer import InterleavingTracer
from torch import Tensor, nn
from transformers import ProcessorMixin

from steer_plugin.adapters._attached import AttachedModel
from steer_plugin.adapters._hooks import hooked
from steer_plugin.adapters._parts import Framework
from steer_plugin.adapters._replay import QuietCall
from steer_plugin.adapters._run import Run
from steer_plugin.adapters._steered import SteeredModel
from steer_plugin.adapters._travel import managed
from steer_plugin.errors import FrameworkError
from steer_plugin.intervention import Intervention, Steerable, Write
from steer_plugin.sites import Site

# A request carries the source of registered packages only; without this line a server raises ModuleNotFoundError.
nnsight.register("steer_plugin")
TASK = "image-text-to-text"


def wrap(model: nn.Module, processor: ProcessorMixin | None = None) -> Envoy:
    """Wrap a Hugging Face model: a TransformersModel where there is a processor, else a bare NNsight."""
    # Without `task` it infers text-generation.
    return NNsight(model) if processor is None else TransformersModel(model, task=TASK, processor=processor)


class NNsightLowering(SteeredModel):
    """What acts inside a block, and all of an attached model that travels with a remote request."""

    framework: ClassVar[Framework] = "nnsight"

    def __init__(self, model: Envoy, processor: Any = None) -> None:
        own = getattr(model, "processor", None)
        # The envoy has no public name for the module that it wraps.
        root: nn.Module = model._module  # pyright: ignore[reportPrivateUsage]
        SteeredModel.__init__(self, model, root, processor if processor is not None else own)
        self.envoy = model
        if root.device.type == "meta" and self.parts.device.type != "meta":
            raise FrameworkError(
                "nnsight sends inputs to the device of the model's first parameter, and accelerate keeps that one "
                "elsewhere (cpu_offload, disk_offload). Give a device_map that leaves the vision tower in memory, or "
                "attach the plain Hugging Face model."
            )
        self._running: tuple[object, tuple[object, ...], dict[str, object]] | None = None
        self._blocks: list[tuple[weakref.ref[Run], weakref.ref[Batcher]]] = []
        self._notice_forwards()

    def _notice_forwards(self) -> None:
        """Note which forward is in progress: a block may call `apply` in the middle of one, after reads of its own."""
        me = weakref.ref(self)

        def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if (vlm := me()) is not None:
                vlm._pause_blocks()
                # With its trace: a forward that was broken off (Ctrl-C, an extraction's early stop) never ends here.
                vlm._running = (vlm.envoy.interleaver.batcher, args, kwargs)

        def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if (vlm := me()) is not None:
                vlm._running = None
                vlm._drop_blocks()

        root = self.parts.root
        for handle in (
            root.register_forward_pre_hook(before, with_kwargs=True),
            root.register_forward_hook(after, always_call=True),
        ):
            weakref.finalize(self, handle.remove)

    def ends(self, site: Site) -> tuple[nn.Module, str]:
        """Module and end where the tensor of a resolved site passes."""
        path, end = self.parts.point(site)
        return self.parts.root.get_submodule(path), end

    # -- lowering ------------------------------------------------------------------------------------------------

    def once(self, run: Run, places: Sequence[tuple[Site, Any, str]]) -> None:
        """Read and assign sites of one forward; runs inside an nnsight block."""
        for site, envoy, end in places:
            if end == "input":
                envoy.input = run.at(site, envoy.input)
            elif isinstance(output := envoy.output, tuple):
                envoy.output = (run.at(site, output[0]), *output[1:])
            else:
                envoy.output = run.at(site, output)

    def places(self, run: Run) -> list[tuple[Site, Any, str]]:
        """Envoy and end of each site, in order of execution; looked up once, not at every token."""
        return [(site, self.envoy.get(path), end) for site in run.sites for path, end in [self.parts.point(site)]]

    def every_forward(self, run: Run, steps: Iterations) -> None:
        """Do `once` for each forward of a generation.

        nnsight ends an open `tracer.iter[:]` loop by throwing OutOfOrderError into it; caught here after the first
        forward it means just that, and the warning about it is not repeated at every call.
        """
        places = self.places(run)
        first = True
        try:
            for _ in steps[:]:
                self.once(run, places)
                if first:
                    # Pictures are encoded once: later steps have no vision sites to wait for.
                    places = [place for place in places if not place[0].in_vision]
                    first = False
                if not places:
                    return
        except OutOfOrderError:
            if first:
                raise

    @managed
    def lowered(self, run: Run) -> Generator[SteeredEnvoy, None, None]:
        """Store the loop as an edit of a copy of the model; yields a proxy whose plain call traces."""
        model, edit = self.envoy, _Edit(self, run.writes, run.completion_tokens, run)
        # Typed as if `inplace` were set; without it the block binds a pair.
        with model.edit() as (_, edited):  # pyright: ignore[reportGeneralTypeIssues]
            edit.act()
        yield SteeredEnvoy(edited, self.parts.root)

    @managed
    def quiet(self, run: Run) -> Generator[QuietCall, None, None]:
        """Yield the decoder's envoy: called plainly it stands nnsight down, so no step of the user's is spent."""
        with hooked(self.ends, run):
            yield self.envoy.get(self.parts.family.decoder)

    def check_rows_may_ride(self) -> None:
        """Several data invokes: nnsight tells their rows apart by the size of the batch, which twins double.

        Raises:
            FrameworkError: more than one invoke has inputs.
        """
        batcher = self.envoy.interleaver.batcher
        if batcher is not None and batcher.batching:
            raise FrameworkError(
                "steering with an unsteered twin takes one invoke with inputs: nnsight 0.8 cannot tell the rows of "
                "several apart while twins ride behind them. Put the prompts into one batch, vlm.inputs([...])."
            )

    def inner(self, path: str) -> Callable[..., Any]:
        """A module's envoy: called plainly it stands nnsight down."""
        return self.envoy.get(path)

    def apply(self, *steering: Steerable, tracer: object | None = None) -> None:
        """Steer inside the user's own block: one forward, or with `tracer` every forward of a generation.

        Give generation its own empty `tracer.invoke()`: the loop over steps never returns to the lines after it.

        Raises:
            FrameworkError: a late read needs more than one pass, or this is no block.
        """
        run = self.one_pass(steering, single_forward=tracer is None)
        self.follow(run)
        if tracer is None:
            self.once(run, self.places(run))
        else:
            self.every_forward(run, cast("InterleavingTracer", tracer).iter)

    one_pass = AttachedModel.one_pass

    def follow(self, run: Run) -> None:
        """Put a run in force until the present trace is over.

        Raises:
            FrameworkError: there is none.
        """
        trace = self.envoy.interleaver.batcher  # each trace has its own
        if trace is None:
            raise FrameworkError(
                "apply() was called outside a block: write it inside `with model.trace(...):` or in an invoke of "
                "model.generate(...), or use `with vlm.steering(...) as steered:` around the call."
            )
        run.watch()
        self.equip(run)
        self._blocks.append((weakref.ref(run), weakref.ref(trace)))
        if self._running is not None and self._running[0] is trace:
            run.begin(*self._running[1:])

    def _pause_blocks(self) -> None:
        """Stop runs of traces that are over: a traceback, or a server, may keep a block's variables longer."""
        trace = self.envoy.interleaver.batcher
        for kept, own in self._blocks:
            if (trace is None or own() is not trace) and (run := kept()) is not None:
                run.paused = True

    def _drop_blocks(self) -> None:
        """Remove the hooks of stopped runs; not before a forward, when torch has already gathered them to be called."""
        runs = [(run, block) for block in self._blocks if (run := block[0]()) is not None]
        for run, _ in runs:
            if run.paused:
                run.close()
        self._blocks = [block for run, block in runs if not run.paused]

    def _generate(self, steered: SteeredEnvoy, inputs: Mapping[str, Any]) -> Tensor:
        return steered.run_generate(**inputs)

    def _forward(self, steered: SteeredEnvoy, inputs: Mapping[str, Any]) -> None:
        steered(**inputs, logits_to_keep=1)


class NNsightAttached(NNsightLowering, AttachedModel):
    """An nnsight `TransformersModel`, or `NNsight` around a Hugging Face model."""

    def __reduce__(self) -> tuple[type[NNsightLowering], tuple[Envoy, Any]]:
        """Travel as what is to be attached: nnsight puts the server's model in the envoy's place."""
        own = getattr(self.envoy, "processor", None)
        return NNsightLowering, (self.envoy, None if self.processor is own else self.processor)


class _Edit:
    """What an edit does in every trace; with a remote request go its writes, and each trace there has its own run."""

    def __init__(
        self,
        vlm: NNsightLowering,
        writes: tuple[Write, ...],
        completion_tokens: int | Sequence[int] | None,
        run: Run | None = None,
    ) -> None:
        self.vlm, self.writes, self.completion_tokens, self.run = vlm, writes, completion_tokens, run

    def __reduce__(self) -> tuple[type[_Edit], tuple[object, ...]]:
        """Leave the run behind: it hangs on this process's model."""
        return _Edit, (self.vlm, self.writes, self.completion_tokens)

    def act(self) -> None:
        """Steer every forward of the trace that is about to start."""
        run = self.run
        if run is None:
            run = Run(self.vlm.parts, Intervention(self.writes), completion_tokens=self.completion_tokens)
            self.vlm.follow(run)
        # Not `tracer.iter`: the tracer of a stored edit has lost its frame and cannot be serialised.
        self.vlm.every_forward(run, Iterations())


class SteeredEnvoy:
    """An edited nnsight model: `.trace`, `.generate`, `.session` and all envoys as usual; a plain call traces."""

    def __init__(self, edited: Any, root: nn.Module) -> None:
        self._edited = edited
        self._root = root

    def __getattr__(self, name: str) -> Any:
        """Everything else is the edited model's."""
        return getattr(self._edited, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One steered forward; returns the model's output."""
        return _traced(self._edited, *args, **kwargs)

    def run_generate(self, **inputs: Any) -> Tensor:
        """Generate and return token ids (row, pos)."""
        return _traced(self._edited, fn=self._root.generate, **inputs)

    @property
    def generate(self) -> Callable[..., Any]:
        """`with steered.generate(...)` as in nnsight; a bare NNsight wrapper has none, there it returns token ids."""
        return (
            self._edited.generate
            if isinstance(getattr(type(self._edited), "generate", None), Callable)
            else self.run_generate
        )


def _traced(edited: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one traced call and return what it returned.

    Raises:
        FrameworkError: asked to run elsewhere.
    """
    if kwargs.get("remote"):
        raise FrameworkError(
            f"remote={kwargs['remote']!r} needs a block that you write: nnsight sends its source and brings back what "
            "it saves. Use `with vlm.steering(...) as steered:` and inside it `with steered.trace(**inputs, "
            "remote=True):`, or steering.apply(vlm) in a block of the model's own."
        )
    kept: list[Any] = []
    with edited.trace(*args, **kwargs) as tracer:
        kept.append(tracer.result)
    return kept[0]
