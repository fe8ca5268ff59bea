"""The recipe of the packaged SteerVLM: rows, sizes and hyper-parameters on the pocket VLM.

Answers are the model's own captions with the closing that the pair asks for. Truth would teach the module to name what
the model cannot see: it lowers the recall of steered captions by seven points. Equal pairs ask for no closing and
unrelated ones for that of p+, so that neither prompt alone tells what to do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steer_plugin.adapters import AttachedModel
from steer_plugin.contrast import SteeringRow
from steer_plugin.demo.stances import FRESH_TOPICS, TOKENS, TRAINED_TOPICS, StanceItem
from steer_plugin.evaluation.asking import Method, answers
from steer_plugin.methods import SteerVLMConfig
from steer_plugin.pocket import ANY_WORD, World
from steer_plugin.pocket.language import DESCRIBE
from steer_plugin.pocket.stances import PairKind, draw_pair
from steer_plugin.pocket.streams import stream
from steer_plugin.training.steervlm_config import SteerVLMTraining

KINDS: tuple[PairKind, ...] = ("opposed", "opposed", "opposed", "equal", "unrelated")
# Words as such, and the topics that the model heard in training as often again.
TOPICS: tuple[str, ...] = (*(word for word in ANY_WORD if word not in FRESH_TOPICS), *TRAINED_TOPICS, *TRAINED_TOPICS)


def pocket_config(vlm: AttachedModel, **choices: object) -> SteerVLMConfig:
    """Sizes for the pocket VLM; `choices` are fields of the config.

    There is no down-projection here: how wide the module must be hangs on how much it has to tell apart. 128 / 8 = 16
    dimensions name 78 % of the topics that they were trained on, 64 name 45 % of those that they were not, 128 name
    65 %; the paper has 512.
    """
    return replace(SteerVLMConfig(vlm.d_model, vlm.n_layers, reduction=1, heads=4), **choices)  # pyright: ignore


def pocket_training(steps: int = 1500) -> SteerVLMTraining:
    """Hyper-parameters for the pocket VLM."""
    return SteerVLMTraining(
        steps=steps, batch_size=32, learning_rate=3e-3, warmup=0.03, save_every=200, log_every=50, closed=True
    )


def stance_rows(
    vlm: AttachedModel, world: World, pictures: int, pairs: int = 8, progress: bool = True, log: Path | None = None
) -> list[SteeringRow]:
    """Draw training rows: the model's own caption of each picture, with several pairs and the closings they ask for.

    Captions are kept in `log`, which several processes need.
    """
    cases = world.stances(pictures, "train")
    items = [StanceItem(case, "rows") for case in cases]
    own = answers(
        vlm, items, Method("own captions"), batch_size=64, max_new_tokens=TOKENS, progress=progress, log=log,
        job={"weights": vlm.parts.fingerprint()},
    )  # fmt: skip
    rows: list[SteeringRow] = []
    for number, (case, item) in enumerate(zip(cases, items, strict=True)):
        rng = stream("steering rows", world.seed, number)
        for turn in range(pairs):
            pair = draw_pair(KINDS[(number * pairs + turn) % len(KINDS)], TOPICS, "train", rng)
            answer = f"{own[item.key].rstrip('. ')}. {pair.closing}".strip()
            name = f"{case.scene_id}-{turn}"
            rows.append(SteeringRow(name, case.image, DESCRIBE, pair.target.text, pair.converse.text, answer))
    return rows
