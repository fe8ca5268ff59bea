"""`steer-plugin reproduce`: a published table, ours beside it, and which of its orders hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer_plugin.cli_pocket import say
from steer_plugin.errors import InputError


def reproduce(
    table: Annotated[str, typer.Argument(help="l2s-pope, l2s-safety, steervlm-ohd or steervlm-vnia.")],
    data: Annotated[str, typer.Option(help="'pocket'; for your own data see steer-plugin eval.")] = "pocket",
    out: Annotated[Path | None, typer.Option(help="Output folder, by default named by the table; resumes.")] = None,
    pictures: Annotated[int | None, typer.Option(help="Test pictures of the drawn world.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of fits and random directions, as 0,1,2.")] = "0",
    controls: Annotated[bool, typer.Option(help="Run swapped and random controls beside each method.")] = True,
    world: Annotated[int, typer.Option(help="Seed of the drawn world.")] = 0,
) -> None:
    """Repeat a paper's table on the pocket VLM: ours beside the published figures, and which orders hold.

    Example: steer-plugin reproduce l2s-pope --data pocket
    """
    from steer_plugin.demo.reproduce import reproduce
    from steer_plugin.evaluation.lineup import seeds_from
    from steer_plugin.evaluation.recipes import recipe
    from steer_plugin.loading import load_model

    if data != "pocket":
        one = recipe(table)
        raise InputError(
            f"reproduce runs on the drawn world (--data pocket), got {data!r}. On photographs: steer-plugin eval "
            f"{one.benchmark} --data {data} --methods {','.join(one.methods)}, which prints ours beside the paper's."
        )
    made = reproduce(
        table, load_model("pocket"), out or Path(f"{table}-out"), world=world, pictures=pictures,
        seeds=seeds_from(seeds), controls=controls,
    )  # fmt: skip
    say(made.markdown())
    say(f"written: {(out or Path(f'{table}-out')) / 'reproduction.md'}")
