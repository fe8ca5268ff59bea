"""The whole demo on the embedded pocket VLM: existence questions, requests, captions; three tables out of one model."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import ProcessorMixin

from steer_plugin import pocket
from steer_plugin.adapters import attach
from steer_plugin.artefact import versions
from steer_plugin.demo.bench import Bench
from steer_plugin.demo.captions import CaptionConfig, CaptionResult, run_captions
from steer_plugin.demo.existence import ExistenceConfig, ExistenceResult, run_existence
from steer_plugin.demo.safety import SafetyConfig, SafetyResult, run_safety


@dataclass(frozen=True)
class DemoConfig:
    """Seed of pictures, fits and bootstraps, and the sizes of the three parts; a part that is None is left out."""

    seed: int = 0
    existence: ExistenceConfig | None = field(default_factory=ExistenceConfig)
    safety: SafetyConfig | None = field(default_factory=SafetyConfig)
    captions: CaptionConfig | None = field(default_factory=CaptionConfig)
    batch_size: int = 64


@dataclass
class DemoResult:
    """What the parts found."""

    config: DemoConfig
    existence: ExistenceResult | None
    safety: SafetyResult | None
    captions: CaptionResult | None
    times: dict[str, float] = field(default_factory=dict[str, float])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])


def run_demo(
    out: Path, config: DemoConfig | None = None, *, model: Path | None = None, progress: bool = True
) -> DemoResult:
    """Run the whole job into `out`; what an interrupted run has extracted and asked is used again.

    `model` is a folder made by `steer-plugin pocket train`, the packaged pocket VLM by default.

    Raises:
        JobError: `out` holds a demo with other settings, or cannot be written.
    """
    config = config or DemoConfig()
    begun = time.perf_counter()
    loaded, processor = pocket.load(model)
    vlm = attach(loaded, cast(ProcessorMixin, processor))
    bench = Bench(vlm, pocket.World(config.seed), Path(out), config.seed, config.batch_size, progress)
    existence = None if config.existence is None else run_existence(bench, config.existence)
    safety = None if config.safety is None else run_safety(bench, config.safety)
    captions = None if config.captions is None else run_captions(bench, config.captions)
    bench.times["total"] = time.perf_counter() - begun
    return DemoResult(config, existence, safety, captions, dict(bench.times), _versions())


def _versions() -> dict[str, str]:
    return {**versions(), "numpy": np.__version__, "threads": str(torch.get_num_threads()), "os": platform.system()}
