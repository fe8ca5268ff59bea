"""`steer-plugin train` and `steer-plugin experiments`: methods that are trained through the frozen model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from steer_plugin.cli_pocket import say
from steer_plugin.errors import InputError

train_app = typer.Typer(
    no_args_is_help=True,
    help="Train a steering method through the frozen model.",
    epilog="Example: steer-plugin train steervlm --pictures 200 --steps 100 --out steervlm-out",
)
experiments_app = typer.Typer(
    no_args_is_help=True,
    help="Repeat a paper's experiments on the pocket VLM.",
    epilog="Example: steer-plugin experiments steervlm --out steervlm-experiments",
)

Out = Annotated[Path, typer.Option(help="Output folder; a run that was interrupted resumes in it.")]
Model = Annotated[str, typer.Option(help="'pocket', a model folder, or a hub id.")]
Device = Annotated[
    str | None, typer.Option(help="Where the model goes: cuda:1, cpu, or auto (over all GPUs); its own GPU without it.")
]
Seed = Annotated[int, typer.Option(help="Seed of the module's start and of the order of the rows.")]


@train_app.command("steervlm")
def steervlm(
    out: Out = Path("steervlm-out"),
    model: Model = "pocket",
    device: Device = None,
    data: Annotated[
        str, typer.Option(help="'pocket', or a VNIA file: JSON lines of task, answer, pos, neg, image_id.")
    ] = "pocket",
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures, named by image_id.")] = None,
    missing: Annotated[str, typer.Option(help="Rows without their picture: error, or skip.")] = "error",
    pictures: Annotated[int, typer.Option(help="Pictures of the pocket world, with eight pairs each.")] = 2500,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; 1500 for the pocket VLM, 1000 otherwise.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows of a step and process; 32 for pocket, otherwise 16.")
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Batches that make one step.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the cosine; 3e-3 for pocket, otherwise 1e-3.")
    ] = None,
    reduction: Annotated[
        int | None, typer.Option(help="Down-projection; 1 for pocket, otherwise the paper's 8.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads; 4 for pocket, otherwise 8.")] = None,
    positions: Annotated[str, typer.Option(help="Steered tokens: paper, everywhere, or an expression.")] = "paper",
    checkpointing: Annotated[
        bool, typer.Option(help="Recompute the frozen layers in backward: slower, less memory.")
    ] = False,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    max_tokens: Annotated[int | None, typer.Option(help="Cut answers so that prompt and answer are no longer.")] = None,
    seed: Seed = 0,
) -> None:
    r"""Train SteerVLM's module; the model stays as it is. Writes out/steervlm.

    Example: steer-plugin train steervlm --pictures 200 --steps 100 --out small

    On published data: steer-plugin train steervlm \
      --model llava-hf/llava-1.5-7b-hf --data train.jsonl --images cc3m --out vnia
    """
    from steer_plugin.contrast import read_vnia
    from steer_plugin.demo.stance_training import pocket_config, pocket_training, stance_rows
    from steer_plugin.loading import load_model
    from steer_plugin.methods import SteerVLM, SteerVLMConfig
    from steer_plugin.pocket import World
    from steer_plugin.training.steervlm_config import SteerVLMTraining

    if data != "pocket" and images is None:
        raise InputError(f"--data {data} needs --images, the folder of its pictures.")
    vlm = load_model(model, device)
    small = data == "pocket"
    rows = (
        stance_rows(vlm, World(0), pictures, log=out / "captions.jsonl")
        if small or images is None
        else read_vnia(data, images, missing=missing)
    )
    config = pocket_config(vlm) if small else SteerVLMConfig(vlm.d_model, vlm.n_layers)
    training = pocket_training() if small else SteerVLMTraining()
    sizes = {"reduction": reduction, "heads": heads}
    asked = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    config = replace(config, **{name: value for name, value in sizes.items() if value is not None})
    training = replace(
        training, accumulate=accumulate, checkpointing=checkpointing, precision=precision, max_tokens=max_tokens,
        **{name: value for name, value in asked.items() if value is not None},
    )  # fmt: skip
    trained = SteerVLM.fit(vlm, rows, config, training, positions=positions, seed=seed, out=out)
    history = (trained.report or {}).get("history")
    say(f"{len(rows)} rows, {training.steps} steps; loss {history[-1]['loss']:.4f}" if history else f"{len(rows)} rows")  # type: ignore[index]
    say(f"saved: {out / 'steervlm'}")


@experiments_app.command("steervlm")
def steervlm_experiments(
    out: Out = Path("steervlm-experiments"),
    pictures: Annotated[int, typer.Option(help="Pictures of each group of pairs.")] = 100,
    module: Annotated[
        Path | None, typer.Option(help="Folder of a module of yours; the packaged ones by default.")
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw the figures.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
) -> None:
    """The paper's first experiments on the pocket VLM: methods, pair sensitivity, gates by task, ablations.

    Example: steer-plugin experiments steervlm --out steervlm-experiments
    """
    from steer_plugin.demo.stance_experiments import StanceConfig, report_markdown, run_stances
    from steer_plugin.demo.stance_figures import write_figures
    from steer_plugin.methods import SteerVLM

    modules = None if module is None else {"steervlm": SteerVLM.load(module)}
    result = run_stances(out, StanceConfig(pictures=pictures, seed=seed), modules=modules)
    say(report_markdown(result))
    say(f"report: {out / 'report.md'}, {out / 'report.json'}")
    if figures:
        for path in write_figures(result, out):
            say(f"figure: {path}")
