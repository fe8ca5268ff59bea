"""The first experiments of SteerVLM's paper on the pocket VLM, in one call, and their report.

    methods      captions in the target stance: unsteered, prompted, ActAdd, CAA, SteerVLM at lambda 1 and 1.5
    pairs        (p+, p-) against (p-, p+) and (p+, p+)
    gates        mean gate of each layer, by task
    ablations    modules trained without u, and without the gate

Source: arXiv 2510.26769, sections on pair sensitivity, gates and ablations. Outcomes are reported as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

from steer_plugin import pocket
from steer_plugin.adapters import attach
from steer_plugin.artefact import versions
from steer_plugin.atomic import JSON, atomic_write_bytes, atomic_write_json
from steer_plugin.demo.bench import Bench
from steer_plugin.demo.stances import (
    GROUPS,
    METHODS,
    METRICS,
    TOKENS,
    Choice,
    Counts,
    StanceItem,
    StanceMethods,
    choose,
    counted,
    scored,
    stance_items,
)
from steer_plugin.evaluation.intervals import Interval, paired_difference, ratio
from steer_plugin.evaluation.table import Cell, markdown_table
from steer_plugin.methods import SteerVLM
from steer_plugin.pocket.language import DESCRIBE
from steer_plugin.record import Record

ABLATIONS = ("without_u", "without_gate")
EXPLAINED = {
    "none": "unsteered",
    "prompt": "the target in words before the task (the ceiling: it sees the words)",
    "actadd": "h(p+) - h(p-) of the bare prompts; layer and strength chosen on validation pairs",
    "caa": "mean difference of the two closings as forced answers, over training pictures; chosen likewise",
    "steervlm": "lambda 1",
    "steervlm 1.5": "lambda 1.5",
    "swapped": "SteerVLM with p+ and p- changed over: `converse` says how often their roles change too",
    "equal": "SteerVLM with (p+, p+)",
    "without_u": "a module trained without the unsteered activation",
    "without_gate": "a module trained without the gate",
}


@dataclass(frozen=True)
class StanceConfig:
    """Sizes of the experiments; pictures are per group."""

    pictures: int = 100
    validation_pictures: int = 40
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0)
    methods: tuple[str, ...] = METHODS
    seed: int = 0


@dataclass
class StanceResult:
    """What was found: counts and intervals by method and group, choices on validation, gates by task."""

    config: StanceConfig
    counts: dict[str, dict[str, dict[str, Counts]]]
    scores: dict[str, dict[str, dict[str, Interval]]]
    choices: dict[str, Choice]
    gates: dict[str, Record] = field(default_factory=dict[str, Record])
    examples: list[dict[str, JSON]] = field(default_factory=list[dict[str, JSON]])
    times: dict[str, float] = field(default_factory=dict[str, float])

    def kept(self, method: str, group: str) -> Interval:
        """Recall less that of the unsteered captions of the same pictures."""
        one, none = self.counts[method][group]["recall"], self.counts["none"][group]["recall"]
        return paired_difference(one, none, statistic=ratio, seed=self.config.seed)


def run_stances(
    out: Path | str,
    config: StanceConfig | None = None,
    *,
    modules: Mapping[str, SteerVLM] | None = None,
    progress: bool = True,
) -> StanceResult:
    """Run the experiments into `out`, where answers are kept: an interrupted run goes on.

    `modules` are the trained ones by name, "steervlm" and the ablations; the packaged ones by default.

    Raises:
        JobError: `out` holds experiments with other settings.
    """
    chosen, known = config or StanceConfig(), dict(modules or packaged())
    vlm = attach(*pocket.load())
    bench = Bench(vlm, pocket.World(chosen.seed), Path(out), chosen.seed, progress=progress)
    methods = {name: StanceMethods(bench, module) for name, module in known.items()}
    main = methods["steervlm"]
    choices = {
        name: bench.timed("choose", lambda name=name: choose(main, name, chosen.validation_pictures, chosen.alphas))
        for name in ("actadd", "caa") if name in chosen.methods
    }  # fmt: skip
    items = stance_items(bench.world, chosen.pictures)
    asked = [(name, main, name) for name in chosen.methods]
    asked += [(name, methods[name], "steervlm") for name in ABLATIONS if name in methods]
    counts: dict[str, dict[str, dict[str, Counts]]] = {}
    texts: dict[str, dict[str, str]] = {}
    for name, family, kind in asked:
        these = [StanceItem(item.case, item.group, worded=True) for item in items] if name == "prompt" else items
        at = choices.get(name, Choice())
        method = family.method(kind, these, at.layer, at.alpha)
        job: dict[str, JSON] = {
            "config": cast(JSON, asdict(chosen)),
            "module": family.steervlm.digest(),
            "as": name,
        }
        answered = bench.timed(
            name, lambda method=method, these=these, job=job, name=name: bench.ask(
                these, replace(method, name=name), "stances", job, TOKENS
            ),
        )  # fmt: skip
        counts[name] = counted(these, answered)
        texts[name] = {item.id: answered[item.key] for item in these}
    result = StanceResult(
        chosen, counts, {name: scored(rows, chosen.seed) for name, rows in counts.items()}, choices,
        bench.timed("gates", lambda: gates_by_task(bench, main.steervlm)), _examples(items, texts), bench.times,
    )  # fmt: skip
    write_report(result, Path(out))
    return result


def packaged() -> dict[str, SteerVLM]:
    """The modules that ship with the package."""
    return {name: SteerVLM.load(pocket.trained(name)) for name in ("steervlm", *ABLATIONS)}


def gates_by_task(bench: Bench, steervlm: SteerVLM, pictures: int = 24) -> dict[str, Record]:
    """Record the gates on the same pictures and pairs under different tasks."""
    cases = bench.world.stances(pictures, "test", wordings="train", topics=GROUPS["trained"][0])
    bound = steervlm.pair([c.pair.target.text for c in cases], [c.pair.converse.text for c in cases])
    tasks = {"caption": DESCRIBE, "question": "Is there a dog in the image?", "advice": "Can my employer cut my pay?"}
    return {
        name: bench.vlm.record(
            bound, bench.vlm.inputs([task] * pictures, [case.image for case in cases]), max_new_tokens=TOKENS,
            reduce=("mean", "norm", "dim_mean"), do_sample=False,
        )
        for name, task in tasks.items()
    }  # fmt: skip


def _examples(items: Sequence[StanceItem], texts: Mapping[str, Mapping[str, str]]) -> list[dict[str, JSON]]:
    firsts = [next(item for item in items if item.group == group) for group in GROUPS]
    return [
        {
            "group": item.group, "p_plus": item.case.pair.target.text, "p_minus": item.case.pair.converse.text,
            **{name: said[item.id] for name, said in texts.items()},
        }
        for item in firsts
    ]  # fmt: skip


def write_report(result: StanceResult, out: Path) -> None:
    """Write report.json and report.md."""
    atomic_write_json(out / "report.json", report_json(result))
    atomic_write_bytes(out / "report.md", report_markdown(result).encode())


def report_json(result: StanceResult) -> dict[str, JSON]:
    """Every number, shares with 95 % bootstrap intervals over pictures."""
    scores = {
        name: {
            group: {
                **{metric: [one.value, one.low, one.high] for metric, one in found.items()},
                "kept": [(kept := result.kept(name, group)).value, kept.low, kept.high],
            }
            for group, found in by_group.items()
        }
        for name, by_group in result.scores.items()
    }
    gates = {task: record.summary(("layer",), name="gate")["mean"].tolist() for task, record in result.gates.items()}
    return {
        "config": cast(JSON, asdict(result.config)), "scores": cast(JSON, scores),
        "choices": {name: asdict(choice) for name, choice in result.choices.items()},
        "gate_by_layer": cast(JSON, gates), "examples": cast(JSON, result.examples),
        "times": cast(JSON, result.times), "versions": cast(JSON, dict(versions())),
    }  # fmt: skip


def report_markdown(result: StanceResult) -> str:
    """The tables for people, in per cent."""
    parts = [
        "# SteerVLM on the pocket VLM",
        "",
        f"{result.config.pictures} pictures per group, World {result.config.seed}.",
        "",
    ]
    for metric in (*METRICS, "kept"):
        rows: dict[str, dict[str, Cell]] = {
            name: {
                group: result.kept(name, group) if metric == "kept" else found[metric]
                for group, found in by_group.items()
            }
            for name, by_group in result.scores.items()
        }
        parts += [f"## {metric}", "", markdown_table(rows), ""]
    gates = {
        task: {f"layer {layer}": value for layer, value in enumerate(record.summary(("layer",), name="gate")["mean"])}
        for task, record in result.gates.items()
    }
    parts += ["## Mean gate (%)", "", markdown_table(cast("dict[str, dict[str, Cell]]", gates), corner="task"), ""]
    parts += ["## Methods", "", *(f"- `{name}`: {EXPLAINED[name]}" for name in result.scores if name in EXPLAINED), ""]
    return "\n".join(parts)
