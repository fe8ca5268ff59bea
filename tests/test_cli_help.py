"""The help of every command: an example of that very command, which parses, and a word on each option."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from steer_plugin.cli import app

ROOT: Any = get_command(app)


def walked(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every group and command below `command`, with the words that lead to it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walked(inner, (*path, name))


COMMANDS = dict(walked(ROOT))


def examples(command: Any) -> list[list[str]]:
    """Return the words of each `steer-plugin ...` line in a help text; a backslash joins it to the next."""
    text = f"{command.help}\n{command.epilog}".replace("\\\n", " ")
    return [shlex.split(line.partition("steer-plugin ")[2]) for line in text.splitlines() if "steer-plugin " in line]


def test_the_walk_finds_groups_and_commands():
    assert {(), ("demo",), ("eval",), ("eval", "pope"), ("store", "drop-damaged"), ("train", "steervlm")} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "steer-plugin")
def test_help_shows_an_example_of_the_command(path: tuple[str, ...]):
    shown = CliRunner().invoke(app, [*path, "--help"], catch_exceptions=False)
    assert shown.exit_code == 0
    words = " ".join(shown.output.split())
    assert "Example" in words
    assert " ".join(("steer-plugin", *path)) in words


def test_every_example_parses():
    """A stale option, a missing one or an unknown command in an example would be an error here; nothing is run."""
    for path, command in COMMANDS.items():
        assert examples(command), path
        for words in examples(command):
            target: Any = ROOT
            while words and words[0] in getattr(target, "commands", {}):
                target = target.commands[words.pop(0)]
            assert not hasattr(target, "commands"), f"{path}: the example ends in a group"
            target.make_context("example", words)


def test_every_option_says_what_it_is():
    silent = [(*path, one.name) for path, command in COMMANDS.items() for one in command.params if not one.help]
    assert silent == []
