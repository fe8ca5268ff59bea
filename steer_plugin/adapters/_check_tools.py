"""What the checks are made with: prompts, a picture that is the same everywhere, short runs and their differences."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from steer_plugin.adapters._call import Tap
from steer_plugin.adapters._check_report import Check
from steer_plugin.adapters._inputs import with_positions
from steer_plugin.adapters._run import Run
from steer_plugin.context import Context
from steer_plugin.errors import InputError, SiteError
from steer_plugin.intervention import Intervention, Write
from steer_plugin.positions import Positions, everywhere
from steer_plugin.sites import Site, resid_post

if TYPE_CHECKING:
    from steer_plugin.adapters._attached import AttachedModel

PROMPTS = ("Describe the image.", "What is the main colour of this picture? Answer with one word.")


class Scores:
    """Keeps the scores of every step of a generation."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.kept.append(scores.float().clone())
        return scores


class Trial:
    """The runs behind a report; every one is small and greedy."""

    def __init__(self, vlm: AttachedModel, inputs: Mapping[str, Tensor], seed: int) -> None:
        self.vlm, self.parts, self.inputs = vlm, vlm.parts, dict(inputs)
        draw = torch.Generator().manual_seed(seed)
        self.direction = torch.randn(vlm.d_model, generator=draw)
        self.middle = vlm.n_layers // 2
        self.site = resid_post(self.middle)
        self.unsteered = self.scores(None)
        with self.taps([self.site]) as got:
            if self.site not in got:
                raise SiteError(f"{self.site} never fires: are {self.parts.family.layers!r} the decoder's layers?")
            self.size = float(got[self.site].float().norm(dim=-1).median())

    def scores(
        self, steering: Intervention | None, new: int = 3, inputs: Mapping[str, Any] | None = None, **options: Any
    ) -> Float[Tensor, "step row word"]:
        """Scores of each step of a greedy generation."""
        kept = Scores()
        given = {**(self.inputs if inputs is None else inputs), **options}
        self.vlm.generate(
            **given, steering=steering, max_new_tokens=new, min_new_tokens=new, do_sample=False, logits_processor=[kept]
        )
        return torch.stack(kept.kept)

    def steering(self, site: Site, positions: str = "paper", alpha: float = 1.0, share: float = 0.5) -> Intervention:
        """A random vector, half as long as the stream is at the middle layer."""
        width = self.parts.width(site)
        pushed = self.direction[:1].expand(width) if width > len(self.direction) else self.direction[:width]
        vector = (pushed / pushed.norm() * share * getattr(self, "size", 1.0)).to(self.parts.root.dtype)

        def delta(hidden: Tensor, context: Context) -> Tensor:
            return vector.to(hidden)

        return Intervention((Write(site, Positions.parse(positions), delta, alpha),))

    @contextmanager
    def taps(
        self, sites: Sequence[Site], inputs: Mapping[str, Tensor] | None = None
    ) -> Generator[dict[Site, Tensor], None, None]:
        """One unsteered forward with a look at all of these sites."""
        got: dict[Site, Tensor] = {}

        def take(site: Site, hidden: Tensor, forward: object) -> None:
            got[site] = hidden.detach().clone()

        run = Run(self.parts, Intervention(()), [Tap(site, everywhere, partial(take, site)) for site in sites])
        with torch.no_grad(), self.vlm._installed(run) as steered:  # pyright: ignore[reportPrivateUsage]
            given = with_positions(self.parts, self.inputs if inputs is None else inputs)
            self.vlm._forward(steered, given)  # pyright: ignore[reportPrivateUsage]
        yield got

    @property
    def tolerance(self) -> float:
        """Share of the largest value that rounding of the model's dtype may change."""
        return {torch.float64: 1e-9, torch.float32: 1e-4}.get(self.parts.root.dtype, 4e-2)

    def apart(self, one: Tensor, other: Tensor) -> float:
        """Largest difference of finite scores, as a share of the largest; not of steps behind different tokens."""
        if one.ndim == 3 and one.shape == other.shape:
            same = (one.argmax(-1) == other.argmax(-1)).all(-1).tolist()
            until = next((step for step, equal in enumerate(same) if not equal), len(same)) + 1
            one, other = one[:until], other[:until]
        both = torch.isfinite(one) & torch.isfinite(other)
        if not bool(both.any()):
            return float("inf")
        return float((one - other)[both].abs().max() / one[both].abs().max().clamp(min=1e-9))

    def line(self, name: str, good: bool, found: str, mend: str) -> Check:
        return Check(name, "ok" if good else "failed", found, "" if good else mend)


def own_inputs(vlm: AttachedModel) -> dict[str, Tensor]:
    """One prompt with one picture.

    Raises:
        InputError: the model was attached without its processor.
    """
    if vlm.processor is None:
        raise InputError("vlm.check() needs the model's processor, or inputs of your own: vlm.check(inputs).")
    return vlm.inputs(PROMPTS[0], [stripes()])


def stripes() -> Image.Image:
    """A picture of coloured stripes: the same everywhere, and nothing to download."""
    side = 224
    x, y = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")
    pixels = torch.stack([x * 7 % 256, y * 5 % 256, (x + y) * 3 % 256], -1).to(torch.uint8)
    return Image.fromarray(pixels.numpy(), "RGB")
