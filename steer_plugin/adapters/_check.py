"""Does this very model steer as it should? A dozen short runs on the user's own weights, with a mend for each failure.

sites fire;  resid_pre + attn_out + mlp_out = resid_post;  alpha 0 changes no bit;  one token is one token;
cached = uncached;  a batch = its rows;  a late read = the same read done beforehand;  the framework = a plain hook
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from steer_plugin.adapters._call import Tap
from steer_plugin.adapters._check_report import Check, CheckReport
from steer_plugin.adapters._check_tools import PROMPTS, Scores, Trial, own_inputs, stripes
from steer_plugin.adapters._inputs import check_inputs, with_positions
from steer_plugin.adapters._run import Run
from steer_plugin.context import Context, Read
from steer_plugin.errors import SiteError, SteeringError
from steer_plugin.intervention import Intervention, Write
from steer_plugin.positions import Positions, everywhere
from steer_plugin.sites import DECODER_KINDS, VISION_KINDS, Site, resid_post

if TYPE_CHECKING:
    from steer_plugin.adapters._attached import AttachedModel

# A check that crashes has failed; what steering, torch or transformers may raise on an unfit model.
CRASHES = (SteeringError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)


class Checker(Trial):
    """The checks, each on a handful of runs."""

    # -- the checks ----------------------------------------------------------------------------------------------

    def family(self) -> Iterator[Check]:
        """Sizes, and what the record says about the sites."""
        parts = self.parts
        kinds = ", ".join(f"{parts.layer_kinds.count(kind)} {kind}" for kind in dict.fromkeys(parts.layer_kinds))
        yield Check("family", "ok", f"{parts.family.name}: {kinds}; {parts.n_vision_layers} vision layers")
        if parts.family.notes:
            yield Check("family", "note", parts.family.notes)
        if parts.family.replay != "exact":
            yield Check("late reads", "note", "a read behind its write takes a second whole pass in this family")

    def pictures(self) -> Iterator[Check]:
        """The prompt holds the image tokens that its pictures need."""
        check_inputs(self.parts, self.inputs)
        ids = self.inputs["input_ids"]
        count = 0 if self.parts.image_token_id is None else int((ids == self.parts.image_token_id).sum())
        mend = "put the picture into the prompt, or set image_token_id in the model's config"
        yield self.line("image tokens", count > 0, f"{count} in the prompt", mend)

    def fire(self) -> Iterator[Check]:
        """Every site of the first, the middle and the last layer passes a tensor of its width."""
        wanted: list[Site] = []
        for site in self._asked():
            try:
                self.parts.point(site)
                self.vlm.ends(site)
                wanted.append(site)
            except SiteError as error:
                yield Check(str(site), "note", f"refused: {error}")
        with self.taps(wanted) as got:
            pass
        silent = [str(site) for site in wanted if site not in got]
        odd = [str(s) for s in wanted if s in got and got[s].shape[-1] != self.parts.width(s) and s.kind != "projector"]
        mend = "register the family with the module names of this model: sp.register_family(sp.Family(...))"
        wrong = [*(f"{name} never fires" for name in silent), *(f"{name} has another width" for name in odd)]
        yield self.line("sites fire", not wrong, "; ".join(wrong) or f"{len(wanted)} of {len(wanted)}", mend)

    def _asked(self) -> list[Site]:
        layers, towers = self.vlm.n_layers, self.parts.n_vision_layers
        sites = [Site(kind, layer) for layer in sorted({0, layers // 2, layers - 1}) for kind in DECODER_KINDS]
        if towers:
            reach = self.parts.last_vision_layer
            sites += [Site(kind, layer) for layer in sorted({0, reach}) for kind in VISION_KINDS]
        return [*sites, *([Site("projector")] if self.parts.family.projector else [])]

    def added(self) -> Iterator[Check]:
        """What is called attn_out and mlp_out is what the residual stream gains."""
        if self.parts.family.scaled:
            yield Check("added to the stream", "note", f"attn_out and mlp_out are refused: {self.parts.family.scaled}")
            return
        worst, where, eps = -1.0, "", torch.finfo(self.parts.root.dtype).eps
        for layer in sorted({0, self.middle, self.vlm.n_layers - 1}):
            if self.parts.layer_kinds[layer] == "cross_attention":
                continue
            sites = [Site(kind, layer) for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
            with self.taps(sites) as got:
                before, attention, mlp, after = (got[site].float() for site in sites)
            # Against what is added, token by token: a factor of .2 on a large stream would hide in the stream's norm.
            lost = (before + attention + mlp - after).norm(dim=-1) - 4 * eps * after.norm(dim=-1)
            gap = float((lost / (after - before).norm(dim=-1).clamp(min=1e-9)).median().clamp(min=0))
            worst, where = max((worst, where), (gap, f"layer {layer}"))
        good = worst <= 0.05
        mend = "a norm or a scale lies between the module and the stream: register attn_added= and mlp_added= for it"
        found = f"resid_post - resid_pre = attn_out + mlp_out but for {worst:.1%} ({where})"
        yield self.line("added to the stream", good, found, mend)

    def zero(self) -> Iterator[Check]:
        """Strength 0, and the time after a block, are the unsteered model to the bit."""
        same = torch.equal(self.scores(self.steering(self.site, alpha=0.0)), self.unsteered)
        with self.vlm.steering(self.steering(self.site)):
            moved = self.scores(None)
        after = torch.equal(self.scores(None), self.unsteered)
        mend = "the model draws random numbers or keeps state: call model.eval(), and remove other libraries' hooks"
        for name, equal in (("alpha 0", same), ("after the block", after)):
            yield self.line(name, equal, f"{'' if equal else 'not '}identical", mend)
        moves = self.apart(moved, self.unsteered)
        yield from self._pictures_act()
        mend = "the layer's output is not used: are the layers of the decoder registered?"
        yield self.line("steering acts", moves > 0, f"scores move by {100 * moves:.0f} % of the largest", mend)

    def _pictures_act(self) -> Iterator[Check]:
        """A write at the last vision layer that is used, and at the projector, reaches the answer."""
        reach = self.parts.last_vision_layer
        sites = [Site("vision_resid_post", reach)] if self.parts.n_vision_layers else []
        for site in [*sites, *([Site("projector")] if self.parts.family.projector else [])]:
            moves = self.apart(self.scores(self.steering(site, "everywhere"), 1), self.unsteered[:1])
            mend = "this place is not used: register the family's projector and vision layers"
            yield self.line(f"{site} acts", moves > 0, f"scores move by {100 * moves:.0f} % of the largest", mend)

    def count(self) -> Iterator[Check]:
        """Asked for the last prompt token, one token of each row is written, and no other."""
        got: list[Tensor] = []
        tap = Tap(self.site, everywhere, lambda hidden, forward: got.append(hidden.detach().clone()))
        with torch.no_grad():
            for steering in (Intervention(()), self.steering(self.site, "last_prompt")):
                run = Run(self.parts, steering, [tap])
                with self.vlm._installed(run) as steered:  # pyright: ignore[reportPrivateUsage]
                    given = with_positions(self.parts, self.inputs)
                    self.vlm._forward(steered, given)  # pyright: ignore[reportPrivateUsage]
        counted, changed = self.vlm.counts, (got[0] != got[1]).any(-1).sum(-1).tolist()
        good = counted == [[1] * len(changed)] and changed == [1] * len(changed)
        found = f"counted {counted}, changed {changed} per row"
        yield self.line("one token", good, found, "inputs must be left-padded and carry their attention_mask")

    def cache(self) -> Iterator[Check]:
        """The same answer with and without a KV cache."""
        one, other = (self.scores(self.steering(self.site), use_cache=use) for use in (True, False))
        gap = self.apart(one, other)
        mend = "steer with a full KV cache: leave cache_implementation out"
        yield self.line("cached = uncached", gap <= self.tolerance, f"scores differ by {gap:.1e}", mend)

    def rows(self) -> Iterator[Check]:
        """A left-padded batch gives what its rows give alone."""
        if self.vlm.processor is None:
            return
        prompts, picture = list(PROMPTS), stripes()
        whole = self._ends_of(self.vlm.inputs(prompts, [picture, picture]))
        alone = [self._ends_of(self.vlm.inputs([prompt], [picture])) for prompt in prompts]
        gap = max(
            self.apart(mine, ours[row : row + 1])
            for row, one in enumerate(alone)
            for mine, ours in zip(one, whole, strict=True)
        )
        good = gap <= self.tolerance
        mend = "register the family with the right positions=, or run prompts one by one"
        yield self.line("a batch = its rows", good, f"values differ by {gap:.1e}", mend)

    def _ends_of(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of the first answer token, and the stream behind the last layer at the last prompt token."""
        site = resid_post(self.vlm.n_layers - 1)
        with self.taps([site], inputs) as got:
            return self.scores(self.steering(self.site), 1, inputs)[0], got[site][:, -1].float()

    def late(self) -> Iterator[Check]:
        """A vector that hangs on a later layer (L2S): found in passing, and found beforehand."""
        if self.vlm.n_layers < 2:
            return

        def delta(hidden: Tensor, context: Context) -> Tensor:
            read = context.reads[0].float()
            return (read / read.norm(dim=-1, keepdim=True) * self.size / 2).to(hidden)[:, None]

        read = Read.at(resid_post(self.vlm.n_layers - 1), "last_prompt")
        steering = Intervention((Write(resid_post(0), Positions.parse("paper"), delta, 1.0, reads=(read,)),))
        gap = self.apart(self.scores(steering), self.scores(self.vlm.prepare(steering, self.inputs)))
        mend = "register the family with replay='second_pass'"
        yield self.line("late reads", gap <= self.tolerance, f"scores differ by {gap:.1e}", mend)

    def framework(self) -> Iterator[Check]:
        """The attached framework gives what one torch hook of a few lines gives."""
        vector = self.steering(self.site).writes[0].delta

        def act(hidden: Tensor) -> Tensor:
            out = hidden.clone()
            out[:, -1] += vector(hidden, Context((), 0, hidden.shape[0]))
            return out

        def hook(module: nn.Module, args: object, output: Any) -> Any:
            return (act(output[0]), *output[1:]) if isinstance(output, tuple) else act(output)

        # Found without the adapter: the layer itself, inside a bridge's block if there is one.
        layer = self.parts.root.get_submodule(f"{self.parts.family.layers}.{self.middle}")
        layer = getattr(layer, "original_component", None) or layer
        handle = layer.register_forward_hook(hook, prepend=True)
        try:
            kept = Scores()
            self.parts.root.generate(  # pyright: ignore[reportCallIssue]
                **self.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, logits_processor=[kept]
            )
        finally:
            handle.remove()
        gap = self.apart(self.scores(self.steering(self.site)), torch.stack(kept.kept))
        mend = "attach the plain Hugging Face model, and please report this model"
        name = f"{self.vlm.framework} = a plain hook"
        yield self.line(name, gap <= self.tolerance, f"scores differ by {gap:.1e}", mend)


def check_model(
    vlm: AttachedModel, inputs: Mapping[str, Tensor] | None = None, *, seed: int = 0, progress: bool = True
) -> CheckReport:
    """Run all checks on one prompt with a picture (the package's own, or `inputs`).

    Raises:
        InputError: neither inputs nor a processor to make some.
    """
    report, given = CheckReport(repr(vlm)), own_inputs(vlm) if inputs is None else inputs
    try:
        checker = Checker(vlm, given, seed)
    except CRASHES as error:
        report.checks.append(_crashed("first runs", error))
        return report
    steps: list[Callable[[], Iterator[Check]]] = [
        checker.family, checker.pictures, checker.fire, checker.added, checker.zero, checker.count, checker.cache,
        checker.rows, checker.late, checker.framework,
    ]  # fmt: skip
    for step in tqdm(steps, desc="check", disable=not progress, leave=False):
        try:
            report.checks.extend(step())
        except CRASHES as error:
            report.checks.append(_crashed(step.__name__, error))
    return report


def _crashed(name: str, error: Exception) -> Check:
    told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Check(name, "failed", told, "see the message; the checks before it narrow it down")
