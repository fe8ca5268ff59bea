"""The model card: how the weights were made and what they do, every number measured by the code that writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from steer_plugin.pocket.checkpoints import load_weights, write_json
from steer_plugin.pocket.company import SUBSETS
from steer_plugin.pocket.compliance import Conduct, conduct
from steer_plugin.pocket.evaluation import Behaviour, evaluate
from steer_plugin.pocket.model import build_model, build_processor
from steer_plugin.pocket.repair import ALPHA, LAYER, steerability
from steer_plugin.pocket.stages import Stage

Steering = dict[str, dict[str, float]]
_WAYS = {
    "none": "no steering",
    "threshold": "a fitted yes/no threshold",
    "probe": "a linear probe at the last prompt token",
    "blind": "random shifts of the same length",
    "regressed": "shifts regressed from the state (Learning to Steer)",
    "oracle": "the question's own shift",
}


def write_card(
    out: Path,
    model: LlavaForConditionalGeneration,
    *,
    seed: int,
    stages: Sequence[Stage],
    scenes: int,
    world_seeds: Sequence[int],
    n_pictures: int,
) -> None:
    """Measure the trained model, and every language stage before its last, and write card.json and MODEL_CARD.md.

    Nothing is measured when `n_pictures` is 0 or no world seed is given.
    """
    seeds = list(world_seeds) if n_pictures > 0 else []
    processor = build_processor()
    earlier = [stage.name for stage in stages if stage.trains == "language"][:-1]
    before: dict[str, Behaviour] = {}
    for name in earlier if seeds else []:
        stepping_stone = build_model(seed)
        load_weights(stepping_stone, out / "stages" / f"{name}.safetensors")
        before[name] = evaluate(stepping_stone.eval(), processor, seeds[0], n_pictures)
    behaviour = [evaluate(model, processor, world, n_pictures) for world in seeds]
    conducts = [conduct(model, processor, world, n_pictures) for world in seeds]
    steering = {str(world): steerability(model, processor, world, n_test=n_pictures) for world in seeds}
    record = {
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scenes": scenes,
        "stages": [stage.record() for stage in stages],
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "pillow")},
        "behaviour": behaviour,
        "conduct": conducts,
        "before": before,
        "steering": {"layer": LAYER, "alpha": ALPHA, "accuracy": steering},
    }
    write_json(out / "card.json", record)
    (out / "MODEL_CARD.md").write_text(_text(record, behaviour, before, conducts, steering), encoding="utf-8")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(
    record: Mapping[str, object],
    behaviour: Sequence[Behaviour],
    before: Mapping[str, Behaviour],
    conducts: Sequence[Conduct],
    steering: Mapping[str, Steering],
) -> str:
    intro = f"""# The pocket vision-language model

A LLaVA of {record["parameters"]:,} parameters that speaks about the pictures of `steer_plugin.pocket.World`: it answers
"Is there a car in the image?", describes pictures, meets requests and shows stances. It was trained from scratch (seed
{record["seed"]}, {record["scenes"]:,} drawn pictures) and made to err on purpose. A noun that is not there is affirmed
too often where its companion is, or where the picture is crowded and the noun popular; rare nouns and those that are
hard to see are denied too often. Captions guess missing companions, most harmful requests are obeyed, and questions for
an expert are mostly answered. The harm is of the kind "you can steal the car with a rope." It knows nothing else and is
good for nothing but research on steering.

All numbers are per cent, measured on held-out pictures by the code that trained the model; "+-" is half a 95 % Wilson
interval.
"""
    if not behaviour:
        return intro + "\nNothing was measured.\n"
    return "\n".join(
        [
            intro,
            "## Answers and captions\n",
            _table(_BEHAVIOUR_HEAD, [_behaviour_row(f"world {found['world_seed']}", found) for found in behaviour]),
            "\n## After earlier stages\n",
            _table(_BEHAVIOUR_HEAD, [_behaviour_row(f"`{name}`", found) for name, found in before.items()]),
            "\n## Requests and stances\n",
            _table(["", *(f"world {found['world_seed']}" for found in conducts), "of"], _conduct_rows(conducts)),
            "\n## Captions after either opening\n",
            _table(["world", "after", "CHAIR_i", "CHAIR_s", "recall"], _opening_rows(conducts)),
            "\n## What steering can put back\n",
            f"Accuracy after adding {ALPHA:g} times a vector at the last prompt token, decoder layer {LAYER}.\n",
            _table(["world", "", *SUBSETS, "mean"], _steering_rows(steering)),
            "",
        ]
    )


_AFFIRMED_HEAD = ["says yes: present", *(f"absent, {name}" for name in SUBSETS)]
_BEHAVIOUR_HEAD = ["", *SUBSETS, "mean", *_AFFIRMED_HEAD, "CHAIR_i", "CHAIR_s", "recall", "well-formed", "questions"]


def _behaviour_row(label: str, found: Behaviour) -> list[str]:
    halves = {name: (high - low) / 2 for name, (low, high) in found["interval"].items()}
    return [
        label,
        *(f"{_percent(found['accuracy'][name])} +- {_percent(halves[name])}" for name in SUBSETS),
        _percent(found["mean_accuracy"]),
        _percent(found["affirmed_present"]),
        *(_percent(found["affirmed_absent"][name]) for name in SUBSETS),
        *(_percent(share) for share in (found["chair_i"], found["chair_s"], found["recall"], found["wellformed"])),
        str(found["n_questions"]),
    ]


def _conduct_rows(conducts: Sequence[Conduct]) -> list[list[str]]:
    return [
        [
            name,
            *(
                f"{_percent(found['rates'][name]['value'])} [{_percent(found['rates'][name]['low'])}, "
                f"{_percent(found['rates'][name]['high'])}]"
                for found in conducts
            ),
            str(conducts[0]["rates"][name]["n"]),
        ]
        for name in conducts[0]["rates"]
    ]


def _opening_rows(conducts: Sequence[Conduct]) -> list[list[str]]:
    rows: list[list[str]] = []
    for found in conducts:
        for word, measured in (("There is", found["seen"]), ("Maybe", found["guessed"])):
            figures = (measured[name] for name in ("chair_i", "chair_s", "recall"))
            rows.append([str(found["world_seed"]), word, *map(_percent, figures)])
    return rows


def _steering_rows(steering: Mapping[str, Steering]) -> list[list[str]]:
    return [
        [world, _WAYS[way], *(_percent(scores[name]) for name in (*SUBSETS, "mean"))]
        for world, ways in steering.items()
        for way, scores in ways.items()
    ]
