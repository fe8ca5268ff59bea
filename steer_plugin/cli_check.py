"""`steer-plugin check`: does a model steer as it should, on each framework that can host it?"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from steer_plugin.adapters import FRAMEWORKS, check_framework
from steer_plugin.adapters._check_report import CheckReport

STYLES = {"ok": "green", "note": "yellow", "failed": "bold red"}


def check(
    model: Annotated[str, typer.Argument(help="'pocket', a model folder, or a hub id.")],
    framework: Annotated[
        list[str] | None, typer.Option(help="torch, nnsight or transformer_lens; repeat it. All installed by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or 'auto' for a device map.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the vector that is added.")] = 0,
) -> None:
    """Try on your own model that steering does what it says; exits with 1 if something fails.

    Example: steer-plugin check Qwen/Qwen2-VL-7B-Instruct
    """
    from steer_plugin.adapters._check_frameworks import check_frameworks
    from steer_plugin.loading import load_plain

    for name in framework or ():
        check_framework(name)
    asked = framework or [name for name in FRAMEWORKS if name == "torch" or find_spec(name) is not None]
    plain, processor = load_plain(model, device)
    failed = False
    for report in check_frameworks(plain, processor, asked, must=framework is not None, seed=seed):
        Console().print(_table(report))
        failed = failed or not report.ok
    if failed:
        raise typer.Exit(1)


def _table(report: CheckReport) -> Table:
    table = Table(title=report.model, title_justify="left", show_lines=False)
    for column in ("check", "", "found", "mend"):
        table.add_column(column)
    for one in report.checks:
        table.add_row(one.name, f"[{STYLES[one.state]}]{one.state}[/]", one.found, one.mend)
    return table
