"""The demo's report: report.json for programs, report.md for people; rates in per cent with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from steer_plugin.atomic import JSON, atomic_write_bytes, atomic_write_json
from steer_plugin.demo import captions, existence, safety
from steer_plugin.demo.captions import CaptionResult
from steer_plugin.demo.data import SUBSETS
from steer_plugin.demo.existence import ExistenceResult
from steer_plugin.demo.run import DemoResult
from steer_plugin.demo.safety import SafetyResult
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.table import Cell, markdown_table

EXPLAINED = {
    "none": "unsteered",
    "prompt": 'the question opens with "Be careful."',
    "threshold": "one scalar yes/no offset fitted on the training questions (no steering: the control)",
    "norm_rnd": "a random direction as long as the input's own P2S vector, at the strength of l2s",
    "mean": "one mean P2S vector for all inputs (CAA, Mean-S)",
    "mean_ba": "one mean per kind of request, the kind being told (Mean-S(BA))",
    "l2s_plain": "Learning to Steer, fitted as its authors do, on requests that all call for caution",
    "l2s": "Learning to Steer: a vector predicted from the input's own activation",
    "p2s": "the input's own contrastive vector (oracle: it needs the answer)",
}


def report_json(result: DemoResult) -> dict[str, JSON]:
    """Every number: pope.<subset>.<method>, safety.<method>, chair.<method>, with 95 % intervals beside the rates."""
    seed = result.config.seed
    out: dict[str, JSON] = {
        "unit": "per cent; intervals are 95 % bootstrap intervals over pictures",
        "seeds": {"questions": seed, "fit": seed, "bootstrap": seed},
        "config": cast(JSON, asdict(result.config)),
        "versions": cast(JSON, dict(result.versions)),
        "times": cast(JSON, result.times),
    }
    if result.existence is not None:
        out |= _existence_json(result.existence)
    if result.safety is not None:
        found = result.safety
        out["safety"] = _rates_json(found.scores)
        out["safety_details"] = {
            "layers": {"write": f"resid_post.{found.write}", "read": f"resid_post.{found.read}"},
            "positions": found.positions,
            "alpha": cast(JSON, found.alphas),
            "differences_from_none": _rates_json(found.differences),
            "elsewhere": cast(JSON, found.elsewhere),
            "validation": cast(JSON, found.validation),
            "fit": _short_fit(found.fit),
        }
    if result.captions is not None:
        spoken = result.captions
        out["chair"] = _rates_json(spoken.scores)
        out["chair_details"] = {
            "layers": {"write": f"resid_post.{spoken.write}", "read": f"resid_post.{spoken.read}"},
            "positions": spoken.config.positions,
            "alpha": cast(JSON, spoken.alphas),
            "differences_from_none": _rates_json(spoken.differences),
            "validation": cast(JSON, spoken.validation),
        }
    return out


def _existence_json(found: ExistenceResult) -> dict[str, JSON]:
    pope: dict[str, dict[str, JSON]] = {}
    for method, by_subset in found.scores.items():
        for subset, scored in by_subset.items():
            pope.setdefault(subset, {})[method] = {
                **_bounds("accuracy", scored.accuracy),
                **_bounds("f1", scored.f1),
                "yes_ratio": scored.yes_ratio,
                "accuracy_l2s": 100 * scored.accuracy_l2s,
                "wellformed": scored.wellformed,
                "n": scored.n,
            }
    return {
        "pope": cast(JSON, pope),
        "differences": cast(JSON, found.differences),
        "alpha": cast(JSON, found.alphas),
        "layers": {"write": f"resid_post.{found.write}", "read": f"resid_post.{found.read}"},
        "positions": found.config.positions,
        "paper_positions_on_validation": cast(JSON, found.paper_positions),
        "threshold": found.threshold,
        "validation": cast(JSON, found.validation),
        "shifts": cast(JSON, found.shifts.summary()),
        "fit": _short_fit(found.fit),
    }


def _short_fit(fit: Mapping[str, JSON]) -> JSON:
    return {name: value for name, value in fit.items() if name not in ("train_loss", "validation_loss")}


def _bounds(name: str, interval: Interval) -> dict[str, JSON]:
    return {name: 100 * interval.value, f"{name}_low": 100 * interval.low, f"{name}_high": 100 * interval.high}


def _rates_json(scores: Mapping[str, Mapping[str, Interval]]) -> dict[str, JSON]:
    return {
        method: {key: part for name, interval in rates.items() for key, part in _bounds(name, interval).items()}
        for method, rates in scores.items()
    }


def accuracy_table(found: ExistenceResult) -> str:
    """Markdown table of accuracies in per cent with their intervals."""
    rows: dict[str, dict[str, Cell]] = {
        method: {
            ("average" if subset == "mean" else subset): found.scores[method][subset].accuracy
            for subset in (*SUBSETS, "mean")
        }
        for method in existence.METHODS
    }
    return markdown_table(rows)


def safety_table(found: SafetyResult) -> str:
    """Markdown table of the four rates of the safety part."""
    names = {"unsafe": "unsafe", "expert": "left to expert", "harmless": "harmless answered", "wellformed": "whole"}
    return _rates_table(found.scores, safety.METHODS, names)


def chair_table(found: CaptionResult) -> str:
    """Markdown table of the captions' rates."""
    names = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "recall", "wellformed": "well-formed"}
    return _rates_table(found.scores, captions.METHODS, names)


def _rates_table(scores: Mapping[str, Mapping[str, Interval]], methods: Sequence[str], names: Mapping[str, str]) -> str:
    rows: dict[str, dict[str, Cell]] = {
        method: {title: scores[method][name] for name, title in names.items()} for method in methods
    }
    return markdown_table(rows)


def report_markdown(result: DemoResult) -> str:
    """The tables, what each row is, and how it came about."""
    lines = [f"# Steering the pocket VLM, seed {result.config.seed}", ""]
    lines += [
        "Rates in per cent with 95 % intervals (bootstrap over pictures), on pictures that nothing was chosen on.",
        "",
    ]
    lines += ["| method | what it is |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in EXPLAINED.items())]
    if result.existence is not None:
        lines += ["", *_existence_lines(result.existence)]
    if result.safety is not None:
        lines += ["", *_safety_lines(result.safety)]
    if result.captions is not None:
        lines += ["", *_caption_lines(result.captions)]
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.times.items() if name != "total")
    return "\n".join([*lines, "", f"Took {result.times['total']:.0f} s: {spent}.", ""])


def _existence_lines(found: ExistenceResult) -> list[str]:
    n = found.scores["none"]["mean"].n
    lines = [
        "## Existence questions",
        "",
        f"Accuracy on {n} held-out questions about {found.config.test_pictures} pictures.",
        "",
        accuracy_table(found),
        "| method | alpha | F1 | says yes | well-formed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method in existence.METHODS:
        scored = found.scores[method]["mean"]
        alpha = f"{found.alphas[method]:g}" if method in found.alphas else ""
        lines.append(
            f"| {method} | {alpha} | {100 * scored.f1.value:.1f} | {100 * scored.yes_ratio:.1f} | "
            f"{100 * scored.wellformed:.1f} |"
        )
    lines += ["", "Differences in points of mean accuracy (paired, 95 % interval):", ""]
    for method, other in (("l2s", "none"), ("l2s", "mean"), ("l2s", "threshold"), ("mean", "none"), ("p2s", "none")):
        gap = found.differences[method][other]
        lines.append(f"- {method} - {other}: {gap['value']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]")
    return [
        *lines,
        "",
        f"L2S writes at layer {found.write} and reads at layer {found.read}; both, and every alpha, were chosen on "
        f"{found.config.validation_pictures} validation pictures; positions {found.config.positions}; threshold "
        f"{found.threshold:+.2f}. The mean alone explains {found.shifts.explained_by_mean():.1%} of the P2S vectors, "
        f"L2S {cast(float, found.fit['validation_explained']):.1%} (held-out training questions).",
        "",
        "With the generated tokens steered too (last_prompt|generated), the same L2S has "
        f"{found.paper_positions['accuracy']:.1%} accuracy on validation and "
        f"{found.paper_positions['wellformed']:.1%} well-formed answers: a vector that says no goes on saying it.",
    ]


def _safety_lines(found: SafetyResult) -> list[str]:
    counts = {
        kind: sum(item.request.kind == kind for item in found.items) for kind in ("harmful", "advice", "harmless")
    }
    asked = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    lines = [
        "## Requests",
        "",
        f"{asked}; worded as nothing was fitted or chosen on. `unsafe`: tells how to do harm. `left to expert`: "
        "advice refused in favour of the right expert. `whole`: word for word an answer that the model learned.",
        "",
        safety_table(found),
        f"L2S writes at layer {found.write}, reads at layer {found.read}, at {found.positions} (validation chose). "
        f"Alphas: {_listed(found.alphas)}. "
        "`l2s` was fitted with zero targets on harmless requests, `l2s_plain` without any; `mean_ba` is told the kind "
        "of every request and steers no harmless one.",
    ]
    for name, rates in found.elsewhere.items():
        told = ", ".join(f"{metric} {100 * rates[metric]:.1f}" for metric in safety.METRICS)
        lines += ["", f"l2s at {name} (alpha {rates['alpha']:g}): {told}."]
    return lines


def _caption_lines(found: CaptionResult) -> list[str]:
    gap, lost = found.differences["l2s"]["chair_i"], found.differences["l2s"]["recall"]
    return [
        "## Captions",
        "",
        f"{found.config.test_pictures} pictures to describe; shares of mentions (CHAIR_i) and captions (CHAIR_s) that "
        "name something that is not there.",
        "",
        chair_table(found),
        f"l2s - none: CHAIR_i {_signed(gap)}, recall {_signed(lost)} points (paired). L2S writes at layer "
        f"{found.write}, reads at layer {found.read}, at {found.config.positions}; alphas: {_listed(found.alphas)}, "
        "chosen on validation for the lowest CHAIR_i at a cost of no more than "
        f"{-100 * found.config.recall_floor:g} point of recall.",
    ]


def _listed(alphas: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {alpha:g}" for name, alpha in alphas.items())


def _signed(gap: Interval) -> str:
    return f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def write_report(result: DemoResult, out: Path) -> None:
    """Write report.json and report.md."""
    atomic_write_json(out / "report.json", report_json(result))
    atomic_write_bytes(out / "report.md", report_markdown(result).encode())
