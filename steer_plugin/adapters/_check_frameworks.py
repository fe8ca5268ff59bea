"""One model on several frameworks: each checked, and each compared with the plain model under the same steering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, ProcessorMixin

from steer_plugin.adapters import attach
from steer_plugin.adapters._check import Checker, check_model
from steer_plugin.adapters._check_report import Check, CheckReport
from steer_plugin.adapters._check_tools import own_inputs
from steer_plugin.errors import FrameworkError


def check_frameworks(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    frameworks: Sequence[str],
    *,
    must: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[CheckReport]:
    """Check a plain model on each framework in turn; TransformerLens, which changes it in place, goes last.

    `must`: a framework that cannot host the model has failed; otherwise it is a note.
    """
    plain = attach(model, processor)
    inputs = own_inputs(plain)
    first = Checker(plain, inputs, seed)
    expected = first.scores(first.steering(first.site))
    for name in sorted(frameworks, key=lambda name: name == "transformer_lens"):
        try:
            vlm = attach(model, processor, framework=name)
        except FrameworkError as error:
            line = Check(name, "failed" if must else "note", f"not hosted: {error}")
            yield CheckReport(f"<{plain.parts.family.name} on {name}>", [line])
            continue
        report = check_model(vlm, inputs, seed=seed, progress=progress)
        if name != "torch":
            here = Checker(vlm, inputs, seed)
            gap = first.apart(here.scores(here.steering(here.site)), expected)
            good = gap <= first.tolerance
            mend = "" if good else "attach the plain model, and please report this one"
            line = Check(f"{name} = torch", "ok" if good else "failed", f"scores differ by {gap:.1e}", mend)
            report.checks.append(line)
        yield report
