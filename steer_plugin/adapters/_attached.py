"""An attached model: the one object through which a user steers, caches and generates, whatever the framework."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from steer_plugin.activations import Activations, gather
from steer_plugin.adapters._call import Forward, Tap
from steer_plugin.adapters._check import check_model
from steer_plugin.adapters._check_report import CheckReport
from steer_plugin.adapters._inputs import check_inputs, collate, encode, image_rows, with_positions
from steer_plugin.adapters._observe import ObservingModel
from steer_plugin.adapters._prepare import Taken, prepared
from steer_plugin.adapters._record import KEEP, Recorder, check_generation
from steer_plugin.adapters._run import Run
from steer_plugin.adapters._show import ShownPositions, shown_positions
from steer_plugin.context import Read
from steer_plugin.errors import FrameworkError, InputError
from steer_plugin.intervention import Intervention, Steerable
from steer_plugin.positions import Positions
from steer_plugin.record import Record
from steer_plugin.sites import Site


class AttachedModel(ObservingModel):
    """A vision-language model that can be steered; made by `sp.attach`.

    Attributes:
        model: what the user attached.
        parts: its Hugging Face root, decoder and sizes.
        processor: its processor, or None.
    """

    # -- way 1: inside a block that the user wrote ---------------------------------------------------------------

    def apply(self, *steering: Steerable, tracer: object | None = None) -> None:
        """Steer inside the user's own nnsight block; several are sorted by order of execution.

        Raises:
            FrameworkError: the model is not attached through nnsight, or a late read needs more than one pass.
        """
        raise FrameworkError(
            f"apply() works inside nnsight blocks; this model is attached through {self.framework}. "
            "Use vlm.steering(...), or hooks(...) with TransformerLens."
        )

    def hooks(self, *steering: Steerable) -> list[tuple[str, Callable[..., Tensor]]]:
        """Return [(hook name, function)] for TransformerLens' `bridge.hooks(fwd_hooks=...)`.

        Raises:
            FrameworkError: the model is not a TransformerBridge, or a late read needs more than one pass.
        """
        raise FrameworkError(
            f"hooks() makes TransformerLens hooks; this model is attached through {self.framework}. "
            "Use vlm.steering(...), or apply(...) inside an nnsight block."
        )

    def one_pass(self, steering: Sequence[Steerable], **options: Any) -> Run:
        """Make a run for a block that the user wrote, where only one pass is possible.

        Raises:
            FrameworkError: a late read.
        """
        run = Run(self.parts, Intervention.of(steering), **options)
        if run.late:
            write = run.writes[run.late[0]]
            raise FrameworkError(
                f"the write at {write.site} reads {write.reads[0].site}, which comes after it: that takes a "
                "second pass, and a block of your own has only one. Do the read beforehand with "
                "`prepared = steering.prepare(vlm, inputs)`, or use vlm.steering(...)."
            )
        return run

    def prepare(self, steering: Steerable, inputs: Mapping[str, Tensor]) -> Intervention:
        """Do the late reads on `inputs` now; the result fits into one pass over the same inputs."""
        check_inputs(self.parts, inputs)

        def values(others: Intervention, reads: Sequence[Read]) -> tuple[Tensor, ...]:
            taken = Taken(reads)
            run = Run(self.parts, Intervention.of([*self._stack, others]), taken.taps)
            with torch.no_grad(), self._installed(run) as steered:
                self._forward(steered, with_positions(self.parts, inputs))
            return taken.values

        return prepared(Run(self.parts, steering.intervention).writes, values)

    # -- way 3: whole jobs ---------------------------------------------------------------------------------------

    def generate(
        self, steering: Steerable | Sequence[Steerable] | Mapping[str, Tensor] | str | None = None, **inputs: Any
    ) -> Tensor:
        """Generate token ids (row, pos), prompt included, as Hugging Face does; keywords go to its `generate`.

        Raises:
            InputError: pictures that do not fit the prompt, or what the steering refuses.
        """
        if isinstance(steering, (Mapping, str)):
            raise InputError(
                f"vlm.generate got a {type(steering).__name__} where a steering belongs; inputs go by keyword, as in "
                "vlm.generate(**inputs, steering=..., max_new_tokens=32)."
            )
        check_inputs(self.parts, inputs)
        if inputs.get("return_dict_in_generate"):
            raise InputError(
                "vlm.generate returns token ids; for a whole output use `with vlm.steering(...) as steered:` and "
                "steered.generate(..., return_dict_in_generate=True)."
            )
        items = [] if steering is None else [steering] if isinstance(steering, Steerable) else list(steering)
        with torch.no_grad(), self.steering(*items) as steered:
            return self._generate(steered, inputs)

    def cache(
        self,
        inputs: Mapping[str, Tensor],
        sites: Site | str | Sequence[Site | str],
        positions: Positions | str = "everywhere",
        steering: Steerable | None = None,
        completion_tokens: int | Sequence[int] | None = None,
    ) -> Activations:
        """Run the prompt once and keep activations: Site -> (row, pos, d_model), ragged rows with a mask.

        Raises:
            SiteError, PositionError, InputError: unknown or empty requests.
        """
        check_inputs(self.parts, inputs)
        where = Positions.parse(positions)
        asked = [sites] if isinstance(sites, (Site, str)) else sites
        wanted = [self.parts.resolve(Site.parse(site)) for site in asked]
        if not wanted:
            raise InputError("vlm.cache needs at least one site, as in [sp.resid_post(14)].")
        vision = [site.in_vision for site in wanted]
        if any(vision) and not all(vision):
            raise InputError("cache vision sites and decoder sites apart: their tokens are not the same.")
        for site in wanted:
            self.parts.point(site)
            self.parts.check_positions(site, where)
        got: dict[Site, Tensor] = {}
        masks: list[Tensor] = []

        def take(site: Site) -> Callable[[Tensor, Forward], None]:
            def keep(hidden: Tensor, forward: Forward) -> None:
                mask: Tensor | bool = True if site.in_vision else forward.mask(where)
                if isinstance(mask, bool):
                    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
                picked, kept, columns = gather(hidden, mask)
                got[site] = picked.clone()
                masks[:] = [kept, columns]

            return keep

        extra = [] if steering is None else [steering]
        combined = Intervention.of([*self._stack, *extra])
        run = Run(self.parts, combined, [Tap(site, where, take(site)) for site in wanted], completion_tokens)
        with torch.no_grad(), self._installed(run) as steered:
            self._forward(steered, with_positions(self.parts, inputs))
        run.check_fired()
        return Activations(masks[0], masks[1], (self.parts.n_layers, self.parts.n_vision_layers), got)

    def record(
        self,
        steering: Steerable | None,
        inputs: Mapping[str, Tensor],
        *,
        max_new_tokens: int = 0,
        keep: Sequence[str] | str = KEEP,
        reduce: Sequence[str] | str = ("mean",),
        **generate_kwargs: Any,
    ) -> Record:
        """Run the prompt (or generate) and keep what the deltas note, such as SteerVLM's "gate", "s" and "change".

        `reduce` says how it is kept, several at once: "none" every value (layer, row, token, dim); "mean" and "norm"
        over the dimensions of each token; "dim_mean" over tokens by class, in memory that does not grow with them.

        Raises:
            InputError: a steering that notes nothing, unknown names or reductions, beams.
            PositionError: nothing was steered.
            FrameworkError: xarray is missing.
        """
        check_inputs(self.parts, inputs)
        check_generation(self.parts, max_new_tokens, generate_kwargs)
        recorder = Recorder(self.parts, keep, reduce, generate_kwargs)
        run = Run(self.parts, Intervention.of([*self._stack, *([] if steering is None else [steering])]))
        recorder.install(run)
        with torch.no_grad(), self._installed(run, check=max_new_tokens > 0) as steered:
            if max_new_tokens:
                ids = self._generate(steered, {**inputs, **generate_kwargs, "max_new_tokens": max_new_tokens})
            else:
                self._forward(steered, with_positions(self.parts, inputs))
                ids = inputs.get("input_ids")
        return recorder.record(ids)

    # -- inputs and looking --------------------------------------------------------------------------------------

    def inputs(
        self,
        prompts: str | Sequence[str],
        images: Image.Image | Path | str | Sequence[Any] | None = None,
    ) -> dict[str, Tensor]:
        """Build a left-padded batch from user prompts and their images (one image, or a list of images, per prompt).

        Raises:
            InputError: no processor, or other numbers of prompts and images.
        """
        if self.processor is None:
            raise InputError("vlm.inputs needs the model's processor: sp.attach(model, processor=processor).")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = image_rows(images, len(texts))
        return encode(self.processor, texts, rows, self.device)

    def decode(self, ids: Tensor) -> list[str]:
        """Turn token ids (row, pos) into text, special tokens left out.

        Raises:
            InputError: the model was attached without its processor.
        """
        if self.processor is None:
            raise InputError("vlm.decode needs the model's processor: sp.attach(model, processor=processor).")
        return [text.strip() for text in cast(Any, self.processor).batch_decode(ids, skip_special_tokens=True)]

    def batch(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack encodings of single prompts into one left-padded batch.

        Raises:
            InputError: rows whose keys differ.
        """
        pad_id = self.parts.root.config.get_text_config().pad_token_id
        return collate(rows, 0 if pad_id is None else int(pad_id))

    def check(self, inputs: Mapping[str, Tensor] | None = None, *, seed: int = 0, progress: bool = True) -> CheckReport:
        """Try on this very model that sites fire, strengths count, caches and batches agree; print what it returns.

        Takes some fifty short forwards on a picture of the package's own, or on `inputs`.

        Raises:
            InputError: neither inputs nor a processor to make some.
        """
        return check_model(self, inputs, seed=seed, progress=progress)

    def show_positions(
        self,
        inputs: Mapping[str, Tensor],
        positions: Positions | str = "paper",
        completion_tokens: int | Sequence[int] | None = None,
        *,
        show: bool = True,
    ) -> ShownPositions:
        """Print token by token which ones an expression selects (not with `show=False`); return mask and counts."""
        where = Positions.parse(positions)
        ids = inputs["input_ids"]
        real = self.parts.real_tokens(inputs.get("attention_mask"), ids.shape[0], ids.shape[1], ids.device)
        layout = self.parts.layout(ids, real, completion_tokens)
        shown = shown_positions(ids, layout, where, self.processor)
        if show:
            sys.stdout.write(f"{shown}\n")
        return shown
