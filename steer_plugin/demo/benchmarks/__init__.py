"""The five benchmarks on the drawn world of the pocket VLM: no file is needed, and the truth is known.

pope       existence questions                 ohd    the same on three worlds, as on three sources
chair      captions                            vnia   captions under a target prompt and its converse
mmsafety   harmful, expert and harmless requests

No picture is in two of the three parts that methods are fitted on, chosen on and tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from steer_plugin.demo.benchmarks.captions import caption_benchmark
from steer_plugin.demo.benchmarks.questions import ohd_benchmark, pope_benchmark
from steer_plugin.demo.benchmarks.requests import request_benchmark
from steer_plugin.demo.benchmarks.stances import stance_benchmark
from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.benchmark import Benchmark
from steer_plugin.pocket import World

__all__ = ["SIZES", "Sizes", "pocket_benchmark"]


class Sizes(NamedTuple):
    """Pictures to test, to fit and to choose on; of "ohd" those to test and choose on are of each of three worlds."""

    pictures: int
    train: int
    validation: int


SIZES: Mapping[str, Sizes] = MappingProxyType(
    {
        "pope": Sizes(400, 700, 120),
        "ohd": Sizes(130, 700, 40),
        "chair": Sizes(300, 400, 150),
        "mmsafety": Sizes(200, 300, 60),
        "vnia": Sizes(200, 8, 100),
    }
)

_MAKERS: Mapping[str, Callable[[World, int, int, int], Benchmark]] = MappingProxyType(
    {"pope": pope_benchmark, "ohd": ohd_benchmark, "chair": caption_benchmark, "mmsafety": request_benchmark}
)


def pocket_benchmark(
    name: str,
    world: World,
    *,
    pictures: int | None = None,
    train: int | None = None,
    validation: int | None = None,
    group: str = "trained",
) -> Benchmark:
    """Return "pope", "ohd", "chair", "mmsafety" or "vnia" on a drawn world.

    `pictures`, `train` and `validation` are pictures to test, to fit and to choose strengths on, those of `SIZES` by
    default; for "vnia", `train` is taken for each closing. `group`, one of `demo.stances.GROUPS`, is for "vnia" alone.

    Raises:
        InputError: an unknown name or group, or fewer than two pictures: intervals resample them.
    """
    if name not in SIZES:
        raise InputError(f"no benchmark {name!r} on the pocket world.{nearest(name, SIZES)} Known: {', '.join(SIZES)}.")
    usual, given = SIZES[name], {"pictures": pictures, "train": train, "validation": validation}
    sizes = Sizes(**{what: getattr(usual, what) if n is None else _size(what, n) for what, n in given.items()})
    if name == "vnia":
        return stance_benchmark(world, *sizes, group)
    if group != "trained":
        raise InputError(f"group={group!r} is for vnia; {name} has no groups of topics and wordings. Leave it out.")
    return _MAKERS[name](world, *sizes)


def _size(what: str, number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 2:
        raise InputError(f"{what} is {number!r}: expected a whole number of pictures from 2 up.")
    return number
