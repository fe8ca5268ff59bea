"""The papers' tables on the drawn world: the same methods, metrics and controls, and which of their orders hold.

    l2s-pope      none, prompt, Norm-Rnd, Mean-S, L2S, P2S*         existence questions
    l2s-safety    none, prompt, Mean-S, Mean-S(BA), L2S, P2S*       requests
    steervlm-ohd  none, CAA, ActAdd, SteerVLM                       existence questions of three worlds
    steervlm-vnia CAA, ActAdd, SteerVLM                             stances

Layers and strengths are chosen on validation pictures for every method alike; the papers' figures are for LLaVA-1.5-7B
on photographs. What can be compared is the order of the methods, not the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from steer_plugin.adapters import AttachedModel
from steer_plugin.atomic import atomic_write_bytes
from steer_plugin.demo.benchmarks import pocket_benchmark
from steer_plugin.demo.usual import USUAL, packaged_steervlm
from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.bounds import KLBound
from steer_plugin.evaluation.evaluate import evaluate
from steer_plugin.evaluation.lineup import Lineup
from steer_plugin.evaluation.orders import Reproduction
from steer_plugin.evaluation.recipes import against_published, recipe
from steer_plugin.evaluation.strengths import Strengths
from steer_plugin.pocket import World


@dataclass(frozen=True)
class Setting:
    """What is the drawn world's own: what to know of its figures, and how far steering may move the model."""

    notes: tuple[str, ...]
    max_kl: float


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "l2s-pope": Setting(("Greedy answers, where the paper's are sampled.",), 0.5),
        "l2s-safety": Setting(
            (
                "The world knows what is unsafe: P(unsafe) is 0 or 1, and both unsafe columns are one share.",
                "Quality is 10 for a text that the model learned word for word, else 0: not the paper's judge.",
            ),
            4.0,
        ),
        "steervlm-ohd": Setting(
            (
                "The packaged SteerVLM was trained on stances alone and is bound to a pair about care; the paper's was "
                "trained on VNIA.",
            ),
            0.5,
        ),
        "steervlm-vnia": Setting(
            (
                "Ours is the share of captions that close with the target's topic and attitude, not a judge's score.",
                "CAA is one mean for each closing, which it is told; SteerVLM sees the prompts alone.",
            ),
            4.0,
        ),
    }
)


def reproduce(
    name: str,
    vlm: AttachedModel,
    out: Path | str,
    *,
    world: int = 0,
    pictures: int | None = None,
    seeds: tuple[int, ...] = (0,),
    controls: bool = True,
    batch_size: int = 64,
    progress: bool = True,
) -> Reproduction:
    """Repeat a published table on the drawn world; writes {out}/reproduction.md beside the evaluation.

    Raises:
        InputError: an unknown table.
        JobError: `out` holds another job.
    """
    if name not in SETTINGS:
        raise InputError(
            f"the drawn world has no table {name!r}.{nearest(name, SETTINGS)} Known: {', '.join(SETTINGS)}."
        )
    setting, one, folder = SETTINGS[name], recipe(name), Path(out)
    usual, benchmark = USUAL[one.benchmark], pocket_benchmark(one.benchmark, World(world), pictures=pictures)
    lineup = Lineup(
        methods=one.methods, positions=usual.positions, seeds=seeds, controls=controls,
        write=usual.layers[0][0], read=usual.layers[0][1],
        steerings={"steervlm": packaged_steervlm()} if "steervlm" in one.methods else {},
    )  # fmt: skip
    found = evaluate(
        vlm, benchmark, lineup, folder, strengths=Strengths(KLBound(setting.max_kl), layers=usual.layers),
        batch_size=batch_size, figures=True, progress=progress,
    )  # fmt: skip
    made = against_published(found, name, setting.notes)
    if made is None:
        raise InputError(f"{one.benchmark} has none of the metrics of {name}.")
    atomic_write_bytes(folder / "reproduction.md", made.markdown().encode())
    return made
