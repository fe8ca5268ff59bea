"""`steer-plugin pocket`: train the pocket VLM, its card, a contact sheet, and its world in published formats."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from steer_plugin.processes import Processes

pocket_app = typer.Typer(
    no_args_is_help=True,
    help="The pocket VLM: train it, its card, its world as data.",
    epilog="Example: steer-plugin pocket show --out pocket.png",
)

Out = Annotated[Path, typer.Option(help="Output folder; a run that was interrupted resumes in it.")]
Seed = Annotated[int, typer.Option(help="Seed of the world's pictures.")]


@pocket_app.command()
def train(
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the pictures that train them.")] = 0,
) -> None:
    """Train the pocket VLM from scratch (resumable), and write its model card.

    Example: steer-plugin pocket train --seed 0 --out my-pocket
    """
    from steer_plugin import pocket

    pocket.train(seed, out)
    say(f"trained: {out}")


@pocket_app.command()
def card(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of `pocket train`, one for each seed.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the median run, with a card of all seeds.")] = None,
) -> None:
    """Print the packaged model's card; or compare runs of several seeds, and copy out the median one.

    Example: steer-plugin pocket card run0 run1 run2 --out my-pocket
    """
    from steer_plugin.pocket.model import WEIGHTS
    from steer_plugin.pocket.seeds import compare, ship

    if not runs:
        say((WEIGHTS / "MODEL_CARD.md").read_text(encoding="utf-8"))
        return
    compared = compare(runs) if out is None else ship(runs, out)
    say(compared.markdown())
    if out is not None:
        say(f"shipped seed {compared.seeds[compared.median]}: {out}")


@pocket_app.command()
def show(
    out: Annotated[Path, typer.Option(help="The picture file to write.")] = Path("pocket.png"),
    seed: Seed = 0,
    pictures: Annotated[int, typer.Option(help="Pictures on the sheet.")] = 24,
) -> None:
    """Draw a contact sheet of the pocket world with truths, answers and hallucinations.

    Example: steer-plugin pocket show --out pocket.png
    """
    from steer_plugin import pocket

    say(f"drawn: {pocket.show(out, seed=seed, n=pictures)}")


@pocket_app.command()
def export(
    out: Out = Path("pocket-world"),
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="pope, chair, mmsafety or vnia; all by default.")
    ] = None,
    seed: Seed = 0,
    pictures: Annotated[int, typer.Option(help="Pictures of each format.")] = 100,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
) -> None:
    r"""Write the world as folders in the published formats of POPE, CHAIR, MM-SafetyBench and VNIA.

    Example: steer-plugin pocket export --format pope --format chair \
      --pictures 200 --out pocket-world
    """
    from steer_plugin import pocket
    from steer_plugin.pocket.formats import FORMATS

    for folder in pocket.export(pocket.World(seed), out, tuple(formats or FORMATS), pictures=pictures, split=split):
        say(f"written: {folder}")


def say(text: str) -> None:
    """Print for the user; of several processes one does."""
    if Processes.current().main:
        sys.stdout.write(f"{text}\n")
