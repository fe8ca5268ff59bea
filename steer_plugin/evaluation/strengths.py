"""Strength and layers of a lineup's fitted methods, chosen on validation items before anything is tested.

Each method gets its own strength by `calibrate`; layers are chosen by L2S (by the first fitted method without it) and
shared by all, as in the papers' tables. Norm-Rnd is as strong as L2S.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from steer_plugin.adapters import AttachedModel
from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON, json_bytes
from steer_plugin.errors import InputError
from steer_plugin.evaluation.actadd import ActAdd
from steer_plugin.evaluation.benchmark import Benchmark, Training
from steer_plugin.evaluation.bounds import Bound
from steer_plugin.evaluation.calibrate import Calibration, calibrate
from steer_plugin.evaluation.fitting import Fitting
from steer_plugin.evaluation.lineup import FITTED, Lineup
from steer_plugin.intervention import Steerable
from steer_plugin.shifts import Shifts
from steer_plugin.sites import Site

Sites = tuple[str, str]  # write and read


@dataclass
class Strengths:
    """How strengths and layers are chosen.

    Attributes:
        bound: on damage; `KLBound()` by default.
        alphas: least and largest strength.
        layers: pairs of (write, read) to choose from; the lineup's own by default.
        max_points: steered points for each method.
    """

    bound: Bound | None = None
    alphas: tuple[float, float] = (0.05, 16.0)
    layers: Sequence[Sites] = ()
    max_points: int = 24
    found: dict[str, Calibration] = field(default_factory=dict[str, Calibration])

    def choose(
        self,
        vlm: AttachedModel,
        benchmark: Benchmark,
        lineup: Lineup,
        out: Path,
        *,
        batch_size: int = 32,
        progress: bool = True,
    ) -> tuple[Lineup, Fitting]:
        """Return the lineup with its sites and strengths, and what it was fitted on.

        A method that calibration would rather leave out (strength 0) is tested at its best strength within the bound:
        the table shows what it does, the calibration says why not.

        Raises:
            InputError: no method with a strength to choose, or no validation items.
            JobError: `out` holds another calibration.
        """
        training, names = benchmark.training, [name for name in (*FITTED, "p2s", "actadd") if name in lineup.methods]
        if not names:
            raise InputError(
                f"{', '.join(lineup.methods)} have no strength to choose; give alpha, or one of mean, l2s."
            )
        if training is None or training.validation is None:
            raise InputError(f"{benchmark.name} has no validation items to choose strengths on; give alpha.")
        if "norm_rnd" in {*lineup.methods} - {*lineup.alphas} and not {"l2s", "p2s"} & {*lineup.methods}:
            raise InputError("norm_rnd is as strong as l2s, or p2s: let one of them take part, or give its alpha.")
        # A benchmark that cannot score single answers says so now, not behind hours of extraction.
        training.validation.behaviour({item.key: "" for item in training.validation.items})
        self.found.clear()
        sites = list(self.layers) or [_sites(lineup)]
        fittings = {
            f"{write} from {read}": Fitting(
                vlm, training, replace(lineup, write=write, read=read), out, batch_size, progress
            )
            for write, read in sites
        }
        for fitting in fittings.values() if {*FITTED} & {*names} else ():
            fitting.prepare(lineup.seeds[:1] if "l2s" in names else ())
        order, alphas = sorted(names, key=lambda name: name != "l2s"), dict[str, float]()
        for name in order:
            makers = {place: _maker(fitting, name, training.validation) for place, fitting in fittings.items()}
            template = str(getattr(vlm.processor, "chat_template", None))
            job = _job(training, fittings, name, training.validation.pairs) | {"template": sha256(template.encode())}
            made = self._calibrate(vlm, training.validation, makers, job, name, out, batch_size, progress)
            self.found[name] = made
            # The first choice settles the layers for everybody.
            place, alphas[name] = (made.name, made.alpha) if made.alpha else self._best(made, list(fittings))
            fittings = {place: fittings[place]}
        fitting = next(iter(fittings.values()))
        chosen = replace(fitting.lineup, alphas={**alphas, **lineup.alphas})
        fitting.lineup = chosen
        return chosen, fitting

    def as_json(self) -> dict[str, JSON]:
        """Every choice with its curve."""
        return {name: made.as_json() for name, made in self.found.items()}

    def _best(self, made: Calibration, places: Sequence[str]) -> tuple[str, float]:
        """Layers and strength of the best behaviour within the bound; the first and the least where none keeps it."""
        fine = [point for point in made.curve if point.feasible and point.alpha]
        return max(fine, key=lambda point: point.behaviour.value).where if fine else (places[0], self.alphas[0])

    def _calibrate(
        self,
        vlm: AttachedModel,
        held: Benchmark,
        makers: Mapping[str, Callable[[Sequence[str], float], Steerable | None]],
        job: Mapping[str, JSON],
        name: str,
        out: Path,
        batch_size: int,
        progress: bool,
    ) -> Calibration:
        return calibrate(
            vlm, makers, held.items, held.behaviour, bound=self.bound, groups=list(held.groups), alphas=self.alphas,
            max_points=max(self.max_points, len(makers)), batch_size=batch_size, max_new_tokens=held.max_new_tokens,
            out=out / "calibration" / f"{name}.jsonl", job={**job, "data": dict(held.source)}, progress=progress,
        )  # fmt: skip


def _job(
    training: Training, fittings: Mapping[str, Fitting], name: str, prompts: Mapping[str, tuple[str, str]]
) -> dict[str, JSON]:
    """What decides the answers of a method besides its strength: a search of another fit is not taken up."""
    lineup = next(iter(fittings.values())).lineup
    pairs: list[JSON] = [
        [p.id, p.prompt, p.suffix, p.positive, p.negative, p.behaviour] for p in (*training.pairs, *training.oracle)
    ]
    return {
        "method": name, "choices": list(fittings), "positions": lineup.positions, "target": training.target,
        "context": training.context, "neutral": list(training.neutral),
        "equalise": [list(group) for group in training.equalise], "pairs": sha256(json_bytes(pairs, "the pairs")),
        **({"preset": training.preset, "learning_rate": training.learning_rate, "hidden": lineup.hidden,
            "seed": lineup.seeds[0]} if name == "l2s" else {}),
        **({"prompts": sha256(repr(lineup.pair or sorted(prompts.items())).encode())} if name == "actadd" else {}),
    }  # fmt: skip


def _sites(lineup: Lineup) -> Sites:
    if lineup.write is None:
        raise InputError("nothing says where to write; give a site such as 'resid_post.14', or layers to choose from.")
    return lineup.write, lineup.read or lineup.write


def _maker(fitting: Fitting, name: str, held: Benchmark) -> Callable[[Sequence[str], float], Steerable | None]:
    if name == "actadd":
        lineup = fitting.lineup
        shifts = ActAdd(fitting.vlm, Site.parse(str(lineup.write)), lineup.positions, held.pairs, lineup.pair)
        return shifts.rows
    told: Training | None = held.training
    oracle: list[Shifts] = []
    if name == "p2s":
        if told is None or not told.oracle:
            raise InputError(f"{held.name} has no contrastive pairs of its validation items; give alpha for p2s.")
        oracle.append(fitting.oracle(told.oracle, "validation"))
    seed = fitting.lineup.seeds[0]
    return lambda ids, alpha: fitting.steering(name, ids, alpha, seed, oracle[0] if oracle else None, told)
