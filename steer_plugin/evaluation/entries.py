"""From a lineup to what is asked: each method as one run, or one per seed, and its controls behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from steer_plugin.adapters import AttachedModel
from steer_plugin.artefact import sha256, tensor_bytes
from steer_plugin.atomic import JSON, json_bytes
from steer_plugin.evaluation.actadd import ActAdd
from steer_plugin.evaluation.asking import Method
from steer_plugin.evaluation.benchmark import Benchmark
from steer_plugin.evaluation.bounds import identity
from steer_plugin.evaluation.fitting import Fitting, digest
from steer_plugin.evaluation.lineup import FITTED, ORACLES, Entry, Lineup
from steer_plugin.intervention import Steerable
from steer_plugin.methods import L2S, MeanSteering, SteerVLM
from steer_plugin.methods.controls import random_like, swapped, swapped_pair
from steer_plugin.shifts import Shifts
from steer_plugin.sites import Site

Make = Callable[[Sequence[str], int], "Steerable | None"]  # from the ids of a batch and the seed


def entries(
    vlm: AttachedModel,
    benchmark: Benchmark,
    lineup: Lineup,
    out: Path,
    *,
    fitting: Fitting | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Entry]:
    """Make every method of a lineup, "none" first, each followed by its controls; fits what has to be fitted.

    Raises:
        InputError: a method that this benchmark cannot host.
        JobError: `out` holds another extraction.
    """
    lineup.check(benchmark)
    names = list(dict.fromkeys(["none", *lineup.methods]))
    fitted = [name for name in names if name in (*FITTED, *ORACLES)]
    made: list[Entry] = []
    if fitted and fitting is None and benchmark.training is not None:
        fitting = Fitting(vlm, benchmark.training, lineup, out, batch_size, progress)
    oracle = _oracle(benchmark, fitting) if any(name in ORACLES for name in fitted) else None
    for name in names:
        if name == "none":
            made.append(Entry(name, ((lineup.seeds[0], Method(name)),)))
        elif name == "prompt":
            made.append(_prompted(benchmark, lineup))
        elif name in fitted and fitting is not None:
            made += _fitted(name, fitting, lineup, oracle)
        elif name == "actadd":
            made += _actadd(vlm, benchmark, lineup)
    for name, steering in lineup.steerings.items():
        made += _saved(name, steering, benchmark, lineup)
    return made


def digest_of(steering: Steerable) -> str | None:
    """SHA-256 of what a steering adds; None where no tensor says it."""
    if isinstance(steering, L2S):
        return sha256(tensor_bytes(steering.network.state_dict()))
    if isinstance(steering, SteerVLM):
        return steering.digest()
    if isinstance(steering, MeanSteering):
        return sha256(tensor_bytes({"vector": steering.vector}))
    held = identity(steering)["tensors"]
    return None if held == sha256(b"") else str(held)


def _oracle(benchmark: Benchmark, fitting: Fitting | None) -> Shifts | None:
    if fitting is None or benchmark.training is None:
        return None
    return fitting.oracle(benchmark.training.oracle, "test")


def _prompted(benchmark: Benchmark, lineup: Lineup) -> Entry:
    if benchmark.worded and not lineup.prompt:
        method = Method("prompt", worded=benchmark.worded)
    else:
        method = Method("prompt", prefix=lineup.prompt or benchmark.prompt)
    return Entry("prompt", ((lineup.seeds[0], method),))


def _fitted(name: str, fitting: Fitting, lineup: Lineup, oracle: Shifts | None) -> list[Entry]:
    alpha = lineup.of(name)
    if name in FITTED:
        fitting.prepare(lineup.seeds if name == "l2s" else ())
    vectors = fitting.shifts if oracle is None or name in FITTED else oracle
    note: dict[str, JSON] = {
        "alpha": alpha, "write": lineup.write, "read": lineup.read or lineup.write, "positions": lineup.positions,
        "shifts": digest(vectors), **_more(name, fitting),
    }  # fmt: skip
    make = lambda ids, seed: fitting.steering(name, ids, alpha, seed, oracle)  # noqa: E731
    own = Entry(name, _runs(name, make, note, lineup, seeded=name in ("l2s", "norm_rnd")))
    if name == "norm_rnd" or not lineup.controls:
        return [own]
    return [own, *_controls(name, make, note, lineup, seeded=name == "l2s")]


def _more(name: str, fitting: Fitting) -> dict[str, JSON]:
    """What decides a method besides its shifts."""
    training = fitting.training
    if name == "mean_ba":
        return {"told": sha256(json_bytes(sorted(training.told.items()), "what is told"))}
    if name != "l2s":
        return {}
    return {
        "preset": training.preset, "learning_rate": training.learning_rate, "hidden": fitting.lineup.hidden,
        "neutral": None if fitting.neutral is None else digest(fitting.neutral),
        # Refitted under other versions a network is another one.
        "networks": [digest_of(fitting.network(seed)) for seed in fitting.lineup.seeds],
    }  # fmt: skip


def _actadd(vlm: AttachedModel, benchmark: Benchmark, lineup: Lineup) -> list[Entry]:
    alpha, site = lineup.of("actadd"), Site.parse(str(lineup.write))
    shifts = ActAdd(vlm, site, lineup.positions, benchmark.pairs, lineup.pair)
    words = repr(lineup.pair or sorted(benchmark.pairs.items()))
    note: dict[str, JSON] = {
        "alpha": alpha, "write": str(site), "positions": lineup.positions, "pairs": sha256(words.encode())
    }  # fmt: skip
    make: Make = lambda ids, seed: shifts.rows(ids, alpha)  # noqa: E731
    own = Entry("actadd", _runs("actadd", make, note, lineup))
    return [own, *(_controls("actadd", make, note, lineup) if lineup.controls else [])]


def _saved(name: str, steering: Steerable, benchmark: Benchmark, lineup: Lineup) -> list[Entry]:
    if isinstance(steering, SteerVLM):
        return _steervlm(name, steering, benchmark, lineup)
    writes: list[JSON] = [f"{w.site} {w.positions} {w.alpha}" for w in steering.intervention.writes]
    note: dict[str, JSON] = {"writes": writes, "tensors": digest_of(steering)}
    make: Make = lambda ids, seed: steering  # noqa: E731
    own = Entry(name, _runs(name, make, note, lineup))
    return [own, *(_controls(name, make, note, lineup) if lineup.controls else [])]


def _steervlm(name: str, steering: SteerVLM, benchmark: Benchmark, lineup: Lineup) -> list[Entry]:
    pairs = benchmark.pairs if lineup.pair is None else {}
    words = repr(sorted(pairs.items()) or lineup.pair or steering.pairs)
    note: dict[str, JSON] = {
        "module": digest_of(steering), "pairs": sha256(words.encode()), "positions": str(steering.positions),
        "alpha": str(steering.alpha),
    }  # fmt: skip
    make: Make = lambda ids, seed: bound(steering, ids, pairs, lineup.pair)  # noqa: E731
    other: Make = lambda ids, seed: swapped_pair(bound(steering, ids, pairs, lineup.pair))  # noqa: E731
    own, turned = Entry(name, _runs(name, make, note, lineup)), f"{name}, pair swapped"
    if not lineup.controls:
        return [own]
    return [own, Entry(turned, _runs(turned, other, note, lineup), name), *_controls(name, make, note, lineup)]


def bound(
    steervlm: SteerVLM, ids: Sequence[str], pairs: Mapping[str, tuple[str, str]], pair: tuple[str, str] | None
) -> SteerVLM:
    """Bind a SteerVLM to the pairs of a batch, to one pair for all, or leave it as it was saved."""
    if pairs:
        return steervlm.pair([pairs[one][0] for one in ids], [pairs[one][1] for one in ids])
    return steervlm if pair is None else steervlm.pair(*pair)


def _controls(name: str, make: Make, note: Mapping[str, JSON], lineup: Lineup, *, seeded: bool = False) -> list[Entry]:
    def opposite(ids: Sequence[str], seed: int) -> Steerable | None:
        own = make(ids, seed)
        return None if own is None else swapped(own)

    def anywhere(ids: Sequence[str], seed: int) -> Steerable | None:
        own = make(ids, seed)
        return None if own is None else random_like(own, ids, seed)

    turned, random = f"{name}, swapped", f"{name}, random"
    return [
        Entry(turned, _runs(turned, opposite, note, lineup, seeded=seeded), name),
        Entry(random, _runs(random, anywhere, note, lineup, seeded=True), name),
    ]


def _runs(
    name: str, make: Make, note: Mapping[str, JSON], lineup: Lineup, *, seeded: bool = False
) -> tuple[tuple[int, Method], ...]:
    seeds = lineup.seeds if seeded else lineup.seeds[:1]
    return tuple(
        (seed, Method(name, lambda ids, s=seed: make(ids, s), note={**note, "seed": seed if seeded else None}))
        for seed in seeds
    )
