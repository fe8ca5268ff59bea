"""`steer-plugin store`: what a folder of activations holds, whether it is unharmed, and how to mend it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer_plugin.cli_pocket import say

if TYPE_CHECKING:
    from steer_plugin.store.shard import Damage, Kind

store_app = typer.Typer(
    no_args_is_help=True,
    help="Activations on disk: what is there, is it unharmed, mend it.",
    epilog="Example: steer-plugin store show shifts",
)

Folder = Annotated[Path, typer.Argument(help="Folder that an extraction or collection wrote.")]
Progress = Annotated[bool, typer.Option(help="Show a bar.")]


@store_app.command()
def show(folder: Folder) -> None:
    """Print the job, the rows, the tensors and the bytes of a store.

    Example: steer-plugin store show shifts
    """
    from steer_plugin.store import ShardStore

    store = ShardStore.open(folder, partial_ok=True)
    say(json.dumps(store.job, indent=1, ensure_ascii=False))
    order = store.manifest.order
    wanted = f" of {len(order.ids)}" if order is not None else ""
    say(f"rows: {len(store)}{wanted}, {'complete' if store.complete else 'not finished'}")
    say(f"shards: {len(store.shards)}, {sum(shard.bytes for shard in store.shards):,} bytes")
    for name, kind in store.layout.items():
        say(f"tensor: {name} {_shape(kind)} {kind.dtype}")


@store_app.command()
def check(folder: Folder, progress: Progress = True) -> None:
    """Read every byte of a store and name the shards that are damaged; exits with 1 if there are any.

    Example: steer-plugin store check shifts
    """
    from steer_plugin.store import ShardStore

    store = ShardStore.open(folder, partial_ok=True)
    found = store.verify(progress)
    _name(found)
    if found:
        say(f"Run the same job again: their {_rows(found)} rows alone are computed anew.")
        raise typer.Exit(1)
    say(f"unharmed: {len(store.shards)} shards, {len(store)} rows")


@store_app.command()
def drop_damaged(folder: Folder, progress: Progress = True) -> None:
    """Take damaged shards off the list, so that the same job, run again, computes their rows and no others.

    Example: steer-plugin store drop-damaged shifts
    """
    from steer_plugin.store import drop_damaged

    found = drop_damaged(folder, progress)
    _name(found)
    say(f"dropped: {len(found)} shards, {_rows(found)} rows")


def _name(found: Sequence[Damage]) -> None:
    for damage in found:
        say(f"damaged: {damage}; rows {', '.join(damage.ids[:3])}{' ...' if len(damage.ids) > 3 else ''}")


def _rows(found: Sequence[Damage]) -> int:
    return sum(len(damage.ids) for damage in found)


def _shape(kind: Kind) -> str:
    return f"({', '.join(['row', *(['token'] if kind.ragged else []), *map(str, kind.shape)])})"
