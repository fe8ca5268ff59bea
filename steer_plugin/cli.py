"""`steer-plugin`: demo, check, extract, collect, store, fit, train, steer, eval, reproduce, experiments, pocket."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from steer_plugin.cli_bulk import collect, extract
from steer_plugin.cli_check import check
from steer_plugin.cli_eval import eval_app
from steer_plugin.cli_pocket import pocket_app, say
from steer_plugin.cli_reproduce import reproduce
from steer_plugin.cli_steering import load_steering
from steer_plugin.cli_store import store_app
from steer_plugin.cli_train import experiments_app, train_app
from steer_plugin.errors import InputError, SteeringError, nearest
from steer_plugin.intervention import Steerable
from steer_plugin.methods import L2S, MeanSteering, SteerVLM
from steer_plugin.processes import Processes
from steer_plugin.shifts import Shifts

SHARED = ("extract", "collect", "eval", "train")  # what several processes can work at together
EXAMPLE = """Example, on the small model of the package (nothing is downloaded):

steer-plugin extract --pairs pocket --write resid_post.2 --out shifts
steer-plugin fit --shifts shifts --learning-rate 1e-3 --alpha 2 --out l2s
steer-plugin eval pope --steering l2s --pictures 50 --out pope-out
"""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=EXAMPLE, help=(
    "Steer vision-language models: extract P2S vectors, fit Learning to Steer, steer your own pictures, evaluate."
))  # fmt: skip
app.add_typer(eval_app, name="eval")
app.add_typer(pocket_app, name="pocket")
app.add_typer(train_app, name="train")
app.add_typer(experiments_app, name="experiments")
app.add_typer(store_app, name="store")
app.command()(extract)
app.command()(collect)
app.command()(check)
app.command()(reproduce)

Out = Annotated[Path, typer.Option(help="Output folder; a run that was interrupted resumes in it.")]
Model = Annotated[str, typer.Option(help="'pocket', a model folder, or a hub id.")]
Seed = Annotated[int, typer.Option(help="Seed of questions, fitting and bootstrap.")]


@app.command()
def demo(
    out: Out = Path("demo-out"),
    seed: Seed = 0,
    figures: Annotated[bool, typer.Option(help="Draw the figures.")] = True,
    test_pictures: Annotated[int, typer.Option(help="Held-out pictures of the existence questions.")] = 400,
    model: Annotated[Path | None, typer.Option(help="Folder of a pocket VLM trained by you.")] = None,
) -> None:
    """Learning to Steer from pictures to tables, on the embedded pocket VLM: existence, requests, captions.

    Example: steer-plugin demo --out demo-out
    """
    from steer_plugin.demo import DemoConfig, run_demo
    from steer_plugin.demo.existence import ExistenceConfig
    from steer_plugin.demo.figures import write_figures
    from steer_plugin.demo.report import accuracy_table, chair_table, safety_table, write_report

    config = DemoConfig(seed=seed, existence=ExistenceConfig(test_pictures=test_pictures))
    result = run_demo(out, config, model=model)
    write_report(result, out)
    tables = (
        ("Existence questions, accuracy", result.existence and accuracy_table(result.existence)),
        ("Requests", result.safety and safety_table(result.safety)),
        ("Captions", result.captions and chair_table(result.captions)),
    )
    for title, table in tables:
        say(f"{title}\n\n{table}")
    say(f"layers, alphas and positions were chosen on validation pictures; {result.times['total']:.0f} s")
    say(f"report: {out / 'report.md'}, {out / 'report.json'}")
    if figures:
        for path in write_figures(result, out):
            say(f"figure: {path}")


@app.command()
def fit(
    shifts: Annotated[Path, typer.Option(help="Folder that `extract` wrote.")],
    out: Out = Path("steering"),
    method: Annotated[str, typer.Option(help="l2s or mean.")] = "l2s",
    preset: Annotated[str, typer.Option(help="pope, safety (the authors' code), mse (the paper), fast.")] = "pope",
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the preset's.")] = None,
    hidden: Annotated[int, typer.Option(help="Hidden units of the network.")] = 100,
    alpha: Annotated[float, typer.Option(help="Strength that the saved steering carries.")] = 1.0,
    positions: Annotated[str, typer.Option(help="paper, authors_code, or an expression.")] = "paper",
    seed: Seed = 0,
) -> None:
    """Fit a steering on extracted shifts and save it.

    Example: steer-plugin fit --shifts shifts --method l2s --preset pope --out l2s
    """
    from steer_plugin.training.config import preset as preset_of

    loaded = Shifts.load(shifts)
    if method == "mean":
        MeanSteering.fit(loaded, positions=positions, alpha=alpha).save(out)
        say(f"mean of {len(loaded)} shifts, explains {loaded.explained_by_mean():.1%} of them")
    elif method == "l2s":
        changes = {"hidden": hidden} | ({} if learning_rate is None else {"learning_rate": learning_rate})
        fitted = L2S.fit(loaded, preset_of(preset, **changes), seed=seed, positions=positions, alpha=alpha)
        fitted.save(out)
        say(str(fitted.report))
    else:
        raise InputError(f"unknown method {method!r}.{nearest(method, ('l2s', 'mean'))} Known: l2s, mean.")
    say(f"saved: {out}")


@app.command()
def steer(
    image: Annotated[Path, typer.Option(help="Picture file.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    steering: Annotated[Path, typer.Option(help="Folder that `fit` wrote, or a published .pt network.")],
    model: Model = "pocket",
    alpha: Annotated[float | None, typer.Option(help="Strength; the saved one by default.")] = None,
    p_plus: Annotated[str | None, typer.Option(help="Target prompt, for SteerVLM.")] = None,
    p_minus: Annotated[str | None, typer.Option(help="Converse prompt, for SteerVLM.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
) -> None:
    r"""Ask one question about one picture, unsteered and steered side by side.

    Example: steer-plugin steer --image photo.jpg --steering l2s \
      --question "Is there a dog in the image?"
    """
    from steer_plugin.loading import load_model

    loaded = load_steering(steering)
    if isinstance(loaded, SteerVLM) and p_plus is not None and p_minus is not None:
        loaded = loaded.pair(p_plus, p_minus)
    changed: Steerable = loaded if alpha is None else loaded.with_alpha(alpha)
    vlm = load_model(model)
    inputs = vlm.inputs(question, image)
    table = Table("", "answer")
    for name, what in (("unsteered", None), ("steered", changed)):
        ids = vlm.generate(steering=what, **inputs, max_new_tokens=max_new_tokens, do_sample=False)
        table.add_row(name, vlm.decode(ids[:, inputs["input_ids"].shape[1] :])[0])
    Console().print(table)


def _check_processes(command: str) -> None:
    processes = Processes.current()
    if processes.several and command not in SHARED:
        raise InputError(
            f"'{command}' runs in one process, and {processes.count} were started: start it without a launcher. "
            f"Several processes share {', '.join(SHARED)}."
        )


def main() -> None:
    """Run the command line; our own errors end it with their message, not with a traceback."""
    disable_progress_bar()
    try:
        _check_processes(" ".join(sys.argv[1:2]))
        app()
    except SteeringError as error:
        sys.stderr.write(f"steer-plugin: {error}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt as stop:
        sys.stderr.write("steer-plugin: interrupted; run the same command again to resume.\n")
        raise SystemExit(130) from stop


if __name__ == "__main__":
    main()
