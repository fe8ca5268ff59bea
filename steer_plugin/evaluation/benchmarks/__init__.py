"""The benchmarks on real data folders, each a `Benchmark`: POPE, OHD, CHAIR, MM-SafetyBench, VNIA.

`open_benchmark` opens one by name; docs/data.md says which files each of them reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.benchmark import Benchmark
from steer_plugin.evaluation.benchmarks.chair import ChairBenchmark
from steer_plugin.evaluation.benchmarks.mmsafety import MmSafetyBenchmark
from steer_plugin.evaluation.benchmarks.ohd import OhdBenchmark
from steer_plugin.evaluation.benchmarks.pope import PopeBenchmark
from steer_plugin.evaluation.benchmarks.vnia import VniaBenchmark
from steer_plugin.evaluation.judges import Judge

__all__ = [
    "BENCHMARKS",
    "ChairBenchmark",
    "MmSafetyBenchmark",
    "OhdBenchmark",
    "PopeBenchmark",
    "VniaBenchmark",
    "open_benchmark",
    "options_of",
]

_READERS: Mapping[str, Callable[..., Benchmark]] = MappingProxyType(
    {
        "pope": PopeBenchmark.read,
        "ohd": OhdBenchmark.read,
        "chair": ChairBenchmark.read,
        "mmsafety": MmSafetyBenchmark.read,
        "vnia": VniaBenchmark.read,
    }
)
BENCHMARKS: tuple[str, ...] = tuple(_READERS)


def open_benchmark(
    name: str,
    data: Path,
    *,
    images: Path | Mapping[str, Path] | None = None,
    judges: Mapping[str, Judge] | None = None,
    **options: object,
) -> Benchmark:
    """Open a benchmark by its name: "pope", "ohd", "chair", "mmsafety" or "vnia".

    `images` is the folder of its pictures where they do not lie in `data`; `judges` are by role ("unsafe" and "quality"
    for mmsafety, "stance" for vnia); `options` are those of the benchmark's `read` (see `options_of`).
    Raises InputError for an unknown name or option, what the benchmark does not take, and all that its `read` refuses.
    """
    reader = _reader(name)
    known = options_of(name)
    for option in options:
        if option not in known:
            raise InputError(f"{name} has no option {option!r}.{nearest(option, known)} Options: {', '.join(known)}.")
    takes = inspect.signature(reader).parameters
    given: dict[str, object] = {}
    for what, value, instead in (
        ("images", images, "its pictures lie in the folder of the data"),
        ("judges", judges or None, "it is scored without a judge"),
    ):
        if value is not None and what not in takes:
            raise InputError(f"{name} takes no {what}: {instead}. Leave {what} out.")
        if value is not None:
            given[what] = value
    if isinstance(images, Mapping) and name != "ohd":
        raise InputError(f"{name} takes one folder of images, not {dict(images)!r}. Give its path.")
    return reader(Path(data), **given, **options)


def options_of(name: str) -> list[str]:
    """Return the names of a benchmark's options; raises InputError for an unknown benchmark."""
    return [
        option for option in inspect.signature(_reader(name)).parameters if option not in ("data", "images", "judges")
    ]


def _reader(name: str) -> Callable[..., Benchmark]:
    if name not in _READERS:
        raise InputError(
            f"There is no benchmark {name!r}.{nearest(name, BENCHMARKS)} Benchmarks: {', '.join(BENCHMARKS)}."
        )
    return _READERS[name]
