"""A whole evaluation in one call: fit, choose strengths, ask, judge, score, compare, cost, draw.

found = evaluate(vlm, benchmark, Lineup(("none", "mean", "l2s"), write="resid_post.14"), "out", strengths=Strengths())
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis._figure import new_figure
from steer_plugin.atomic import JSON
from steer_plugin.evaluation.asking import Sampling
from steer_plugin.evaluation.benchmark import Benchmark
from steer_plugin.evaluation.entries import entries
from steer_plugin.evaluation.fitting import Fitting
from steer_plugin.evaluation.lineup import Lineup
from steer_plugin.evaluation.result import Evaluation
from steer_plugin.evaluation.runner import COSTED, Runner
from steer_plugin.evaluation.strengths import Strengths
from steer_plugin.processes import Processes


def evaluate(
    vlm: AttachedModel,
    benchmark: Benchmark,
    lineup: Lineup,
    out: Path | str,
    *,
    strengths: Strengths | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    costed: int = COSTED,
    batch_size: int = 32,
    seed: int = 0,
    figures: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Evaluate methods on a benchmark; a killed run resumes in `out`, which holds tables, figures and every answer.

    `strengths` chooses strengths and layers on validation items; without it those of the lineup stand. Answers are
    greedy, or drawn by `sampling`, and as long as the benchmark says, or `max_new_tokens`. Costs are measured on
    `costed` items (0 leaves them out), `seed` is that of bootstrap and permutations, and `figures` draws scores.png,
    costs.png and calibration-*.png. Of several processes (docs/scale.md) each calls this with the same arguments and
    gets the whole result.

    Raises:
        InputError: what this benchmark, model or lineup cannot do, before any work.
        JobError: `out` holds another job, or cannot be written.
        FrameworkError: figures without matplotlib.
    """
    folder, fitting = Path(out), cast("Fitting | None", None)
    runner = Runner(
        vlm, benchmark, folder, batch_size=batch_size, seed=seed, sampling=sampling, max_new_tokens=max_new_tokens,
        costed=costed, progress=progress,
    )  # fmt: skip
    runner.check()
    if figures:
        new_figure(1.0, 1.0)  # says now, not behind the work, that matplotlib is missing
    # Layers to choose from stand in for the lineup's own.
    some = strengths.layers[0][0] if strengths is not None and strengths.layers else lineup.write
    replace(lineup, write=some).check(benchmark)
    if strengths is not None:
        lineup, fitting = strengths.choose(vlm, benchmark, lineup, folder, batch_size=batch_size, progress=progress)
    made = entries(vlm, benchmark, lineup, folder, fitting=fitting, batch_size=batch_size, progress=progress)
    found = runner.run(made, _choices(lineup, strengths))
    if figures and Processes.current().main:
        from steer_plugin.evaluation.figures import write_figures

        write_figures(found, folder)
        for name, one in ({} if strengths is None else strengths.found).items():
            one.plot().savefig(folder / f"calibration-{name}.png", dpi=150)
    return found


def _choices(lineup: Lineup, strengths: Strengths | None) -> Mapping[str, JSON]:
    # Saved steerings are described by their entries; asdict would copy their weights.
    kept = {**asdict(replace(lineup, steerings={}, alphas=dict(lineup.alphas))), "steerings": sorted(lineup.steerings)}
    return {"lineup": cast(JSON, kept), "calibration": None if strengths is None else strengths.as_json()}
