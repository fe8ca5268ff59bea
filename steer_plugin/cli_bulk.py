"""`steer-plugin extract` and `collect`: P2S vectors, and activations, of thousands of prompts; several processes share.

accelerate launch --num_processes 8 -m steer_plugin.cli extract --pairs pairs.jsonl --write resid_post.14
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from steer_plugin.cli_pocket import say
from steer_plugin.contrast.pair import ContrastivePair
from steer_plugin.errors import InputError

Pairs = Annotated[
    Path, typer.Option(help="JSONL or CSV: image, prompt, positive, negative[, id, suffix, behaviour]; or 'pocket'.")
]
Model = Annotated[str, typer.Option(help="'pocket', a model folder, or a hub id.")]
Device = Annotated[
    str | None, typer.Option(help="Where the model goes: cuda:1, cpu, or auto (over all GPUs); its own GPU without it.")
]
BatchSize = Annotated[str, typer.Option(help="Prompts at a time, or 'auto': as many as fit into memory.")]
Seed = Annotated[int, typer.Option(help="Seed of the pocket world's questions, and of what is sampled.")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def extract(
    pairs: Pairs,
    write: Annotated[str, typer.Option(help="Site that will be steered, such as resid_post.14.")],
    out: Annotated[Path, typer.Option(help="Output folder; a run that was interrupted resumes in it.")] = Path(
        "shifts"
    ),
    model: Model = "pocket",
    device: Device = None,
    read: Annotated[str | None, typer.Option(help="Site of the context; the write site by default.")] = None,
    context: Annotated[str, typer.Option(help="Token of the context: last_prompt or user_end.")] = "last_prompt",
    target: Annotated[str, typer.Option(help="last, average_forced or average_sampled.")] = "average_forced",
    batch_size: BatchSize = "16",
    seed: Seed = 0,
) -> None:
    r"""Extract P2S vectors and contexts from contrastive pairs.

    Example: steer-plugin extract --model llava-hf/llava-1.5-7b-hf \
      --pairs pairs.jsonl --write resid_post.14 --out shifts
    """
    from steer_plugin.adapters import parse_target
    from steer_plugin.loading import load_model

    shifts = load_model(model, device).extract(
        _read(pairs, seed),
        write,
        read,
        out,
        context=context,
        target=parse_target(target),
        batch_size=_size(batch_size),
        seed=seed,
    )
    for name, value in shifts.summary().items():
        say(f"{name}: {value:.4g}")


def collect(
    pairs: Pairs,
    site: Annotated[list[str], typer.Option(help="Site to keep, such as resid_post.14; repeat it.")],
    out: Annotated[Path, typer.Option(help="Output folder; a run that was interrupted resumes in it.")] = Path(
        "activations"
    ),
    model: Model = "pocket",
    device: Device = None,
    positions: Annotated[str, typer.Option(help="Tokens to keep, such as last_prompt or image.")] = "last_prompt",
    reduce: Annotated[str, typer.Option(help="mean over these tokens, or none: each of them.")] = "mean",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 on disk.")] = "float32",
    batch_size: BatchSize = "auto",
    seed: Seed = 0,
) -> None:
    r"""Keep activations of the pairs' prompts, without their completions, in a store.

    Example: steer-plugin collect --pairs pocket --site resid_post.1 \
      --site resid_post.2 --positions image --out acts
    """
    from steer_plugin.loading import load_model

    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}.")
    store = load_model(model, device).collect(
        _read(pairs, seed), site, positions, out=out, reduce=reduce, dtype=DTYPES[dtype], batch_size=_size(batch_size)
    )
    say(f"{len(store)} prompts, {', '.join(store.names)}: {out}")


def _read(pairs: Path, seed: int) -> list[ContrastivePair]:
    from steer_plugin.contrast import read_pairs
    from steer_plugin.demo.data import fitting_items
    from steer_plugin.pocket import World

    return [item.pair for item in fitting_items(World(seed), 700)] if str(pairs) == "pocket" else read_pairs(pairs)


def _size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
