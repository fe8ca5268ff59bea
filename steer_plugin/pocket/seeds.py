"""Several training seeds side by side: every measured figure per seed, mean and spread; the median seed is shipped.

The seed to ship is the median by one figure named beforehand: the accuracy that Learning to Steer reaches on existence
questions (`regressed` in the cards, mean over subsets and worlds). It is neither the best nor the worst.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from steer_plugin.atomic import JSON, atomic_write_bytes, atomic_write_json, make_folder
from steer_plugin.errors import ArtefactError, InputError

HEADLINE = "steering: regressed"
DEMO = Path("demo") / "report.json"
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
          "processor_config.json", "chat_template.jinja")  # fmt: skip
Figures = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Figures in per cent by training seed, and the run whose headline is the median."""

    seeds: tuple[int, ...]
    figures: tuple[Figures, ...]
    median: int

    def table(self, prefix: str = "") -> str:
        """Return a Markdown table of the figures whose names open with `prefix`."""
        head = ["", *(f"seed {seed}" for seed in self.seeds), "mean", "range"]
        lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        for name in self.figures[0]:
            if name.startswith(prefix):
                values = [found[name] for found in self.figures]
                cells = [f"{value:.1f}" for value in (*values, float(np.mean(values)), max(values) - min(values))]
                lines.append(f"| {name.removeprefix(prefix).strip(': ')} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def markdown(self) -> str:
        """Return the comparison as a section of a model card."""
        sections = dict.fromkeys(name.split(":")[0] for name in self.figures[0])
        lines = [
            "## Over training seeds\n",
            f"Per cent, means over the worlds of each card; range = largest - smallest. Shipped: seed "
            f'{self.seeds[self.median]}, the median by "{HEADLINE}".',
        ]
        for section in sections:
            lines += [f"\n### {section.capitalize()}\n", self.table(f"{section}:")]
        return "\n".join([*lines, ""])


def compare(runs: Sequence[Path | str]) -> Comparison:
    """Compare finished runs of `train`; a run's `demo/report.json` (steer-plugin demo --out RUN/demo) counts in.

    Raises:
        InputError: fewer than two runs, or two of one seed.
        ArtefactError: a folder without a measured card, or cards that measured different things.
    """
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise InputError(f"comparing needs at least two runs, got {len(folders)}: give one folder for each seed.")
    cards = [_card(folder) for folder in folders]
    seeds = tuple(int(cast(int, card["seed"])) for card in cards)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"the runs have the seeds {seeds}: expected one run of each.")
    figures = tuple(_measured(card, folder) for card, folder in zip(cards, folders, strict=True))
    for folder, found in zip(folders, figures, strict=True):
        if found.keys() != figures[0].keys():
            other = sorted(found.keys() ^ figures[0].keys())[0]
            raise ArtefactError(f"{folder} and {folders[0]} did not measure the same: only one has {other!r}.")
    order = sorted(range(len(runs)), key=lambda run: figures[run][HEADLINE])
    return Comparison(seeds, figures, order[(len(order) - 1) // 2])


def ship(runs: Sequence[Path | str], out: Path | str) -> Comparison:
    """Copy the median run's model into `out`, with a card that shows all seeds; errors as in `compare`."""
    compared = compare(runs)
    source, out = Path(runs[compared.median]), Path(out)
    lacking = [name for name in (*_FILES, "MODEL_CARD.md") if not (source / name).is_file()]
    if lacking:
        raise ArtefactError(f"{source} lacks {', '.join(lacking)}: let `pocket train` finish there first.")
    if any(out.resolve() == Path(run).resolve() for run in runs):
        raise InputError(f"{out} is one of the runs; give another folder.")
    make_folder(out)
    for name in _FILES:
        aside = out / f".{name}.new"
        shutil.copyfile(source / name, aside)
        aside.replace(out / name)
    by_seed: dict[str, JSON] = {
        str(seed): cast(JSON, found) for seed, found in zip(compared.seeds, compared.figures, strict=True)
    }
    card = _card(source) | {"training_seeds": by_seed, "headline": HEADLINE}
    atomic_write_json(out / "card.json", card)
    text = (source / "MODEL_CARD.md").read_text(encoding="utf-8")
    atomic_write_bytes(out / "MODEL_CARD.md", f"{text.rstrip()}\n\n{compared.markdown()}".encode())
    return compared


def _card(folder: Path) -> dict[str, JSON]:
    card = _json(folder / "card.json", "Give folders made by pocket train.")
    if not card.get("behaviour"):
        raise ArtefactError(f"{folder / 'card.json'} holds no measurements. Train with card seeds and pictures.")
    return card


def _json(path: Path, mend: str) -> dict[str, JSON]:
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}). {mend}") from error
    if not isinstance(found, dict):
        raise ArtefactError(f"{path} holds a {type(found).__name__}, expected an object. {mend}")
    return cast("dict[str, JSON]", found)


def _measured(card: Mapping[str, JSON], folder: Path) -> Figures:
    """Return all figures of a run; ArtefactError when its card or its demo lacks some."""
    try:
        return _figures(card) | _demo(folder)
    except (KeyError, IndexError) as error:
        raise ArtefactError(
            f"the card or the demo in {folder} lacks {error}: it was made by another version, or left out parts. "
            "Measure it again."
        ) from error


def _figures(card: Mapping[str, JSON]) -> Figures:
    """Flatten a card into named figures, each the mean over the worlds that it was measured on."""
    worlds = cast("list[dict[str, JSON]]", card["behaviour"])
    out: Figures = {}
    for subset in cast("dict[str, float]", worlds[0]["accuracy"]):
        out[f"existence: accuracy, {subset}"] = _mean([_at(world, "accuracy", subset) for world in worlds])
    out["existence: accuracy, mean"] = _mean([_at(world, "mean_accuracy") for world in worlds])
    out["existence: present and affirmed"] = _mean([_at(world, "affirmed_present") for world in worlds])
    for name in ("chair_i", "chair_s", "recall", "wellformed"):
        out[f"captions: {name}"] = _mean([_at(world, name) for world in worlds])
    conducts = cast("list[dict[str, JSON]]", card["conduct"])
    for word in ("seen", "guessed"):
        out[f"captions: chair_i, {word}"] = _mean([_at(one, word, "chair_i") for one in conducts])
    for name in cast("dict[str, JSON]", conducts[0]["rates"]):
        out[f"requests and stances: {name}"] = _mean([_at(one, "rates", name, "value") for one in conducts])
    ways = cast("dict[str, dict[str, dict[str, float]]]", cast("dict[str, JSON]", card["steering"])["accuracy"])
    for way in list(ways.values())[0]:  # noqa: RUF015
        out[f"steering: {way}"] = _mean([world[way]["mean"] for world in ways.values()])
    return {name: 100 * value for name, value in out.items()}


def _demo(folder: Path) -> Figures:
    """Return the demo's figures of a run, none where it was not run; they are in per cent already."""
    path = folder / DEMO
    if not path.is_file():
        return {}
    report = _json(path, "Run the demo again.")
    out: Figures = {}
    for method, scored in cast("dict[str, dict[str, float]]", cast("dict[str, JSON]", report["pope"])["mean"]).items():
        out[f"demo, existence: {method}"] = scored["accuracy"]
    gaps = cast("dict[str, dict[str, dict[str, float]]]", report["differences"])
    for other in ("none", "mean", "threshold"):
        for bound in ("value", "low", "high"):
            named = f"demo, existence: l2s - {other}" + ("" if bound == "value" else f", 95 % {bound}")
            out[named] = gaps["l2s"][other][bound]
    for part, metrics in (("safety", ("unsafe", "expert", "harmless", "wellformed")), ("chair", ("chair_i", "recall"))):
        for method, scored in cast("dict[str, dict[str, float]]", report[part]).items():
            for metric in metrics:
                out[f"demo, {part}: {method}, {metric}"] = scored[metric]
    return out


def _at(tree: Mapping[str, JSON], *path: str) -> float:
    value: JSON = cast(JSON, tree)
    for name in path:
        value = cast("dict[str, JSON]", value)[name]
    return float(cast(float, value))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
