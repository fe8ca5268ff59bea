"""The data of `steer-plugin eval`: a folder, a table of the Hub or the drawn world, with the judges that score it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError
from steer_plugin.processes import Processes

if TYPE_CHECKING:
    from steer_plugin.evaluation.benchmark import Benchmark, Training
    from steer_plugin.evaluation.judges import Judge
else:
    Benchmark = Training = Judge = object  # imported when needed; run-time type checkers look the names up


@dataclass(frozen=True)
class Judging:
    """What the command line says about judges."""

    guard: str | None
    judge: str | None
    url: str | None
    requests: int
    cache: Path


def pocket_data(benchmark: str, seed: int, pictures: int | None, fits: bool) -> Benchmark:
    """A benchmark on the drawn world."""
    from steer_plugin.demo.benchmarks import pocket_benchmark
    from steer_plugin.pocket import World

    # Where nothing is fitted, no hundreds of pictures are drawn to fit on.
    train, validation = (None, None) if fits else (2, 2)
    return pocket_benchmark(benchmark, World(seed), pictures=pictures, train=train, validation=validation)


def folder_data(
    benchmark: str, data: Path, images: Path | None, options: Mapping[str, object], judging: Judging
) -> Benchmark:
    """A benchmark on published data, or on a table of POPE as the Hub has it (parquet, save_to_disk)."""
    from steer_plugin.evaluation.benchmarks import open_benchmark, options_of

    known = options_of(benchmark)
    taken = {name: value for name, value in options.items() if name in known}
    if benchmark == "pope" and (data.suffix == ".parquet" or (data / "dataset_info.json").is_file()):
        from steer_plugin.evaluation.benchmarks import PopeBenchmark
        from steer_plugin.evaluation.benchmarks.pope import digest_of_items_pictures
        from steer_plugin.evaluation.hub_data import pope_items_from

        if images is not None:
            raise InputError(f"--images {images}: a table brings its pictures. Leave it out.")
        table = pope_items_from(data)
        source: dict[str, JSON] = {"table": data.name, "pictures_sha256": digest_of_items_pictures(table)}
        share, seed = float(str(taken["fitting"])), int(str(taken["seed"]))
        return PopeBenchmark.split(table, fitting=share, seed=seed, source=source)
    if not data.is_dir():
        raise InputError(f"there is no folder {data}; docs/data.md says which files {benchmark} needs.")
    return open_benchmark(benchmark, data, images=images, judges=_judges(benchmark, judging), **taken)


def pairs_to_fit(pairs: Path) -> Training:
    """Contrastive pairs of the caller's own."""
    from steer_plugin.contrast import read_pairs
    from steer_plugin.evaluation.benchmark import Training

    return Training(read_pairs(pairs))


def _judges(benchmark: str, judging: Judging) -> dict[str, Judge]:
    from steer_plugin.evaluation.judges import QUALITY, STANCE, Budget, LlamaGuardJudge, OpenAIJudge

    found, processes = dict[str, Judge](), Processes.current()
    if judging.guard is not None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where = processes.device()
        dtype = torch.float32 if where == "cpu" else torch.bfloat16
        guard = AutoModelForCausalLM.from_pretrained(judging.guard, dtype=dtype, device_map=where).eval()
        found["unsafe"] = LlamaGuardJudge(guard, AutoTokenizer.from_pretrained(judging.guard))
    if judging.judge is not None:
        # Processes share what is to be judged evenly, and so what may be spent.
        spend = Budget(requests=max(1, judging.requests // processes.count))
        role, rubric = ("stance", STANCE) if benchmark == "vnia" else ("quality", QUALITY)
        found[role] = OpenAIJudge(
            judging.judge, judging.url, rubric=rubric, budget=spend, cache=judging.cache, name=role
        )  # fmt: skip
    return found
