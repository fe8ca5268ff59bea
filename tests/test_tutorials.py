"""A tutorial is kept twice, as text that people edit and as a notebook with outputs; both must say the same.

The notebooks are run by nbmake: see tutorials/conftest.py.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tutorials"
NAMES = sorted({path.stem for path in (*FOLDER.glob("[0-9]*.py"), *FOLDER.glob("*.ipynb"))})
# On anybody's machine: a home, a build folder, a temporary one, an installed package.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users|tmp|private|var)/\w|site-packages|ipykernel_\d")
LINK = re.compile(r"\]\(([^)\s]+)\)")

each = pytest.mark.parametrize("name", NAMES)


@cache
def notebook(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def markdown(name: str) -> list[str]:
    return [cell.source for cell in notebook(name).cells if cell.cell_type == "markdown"]


@each
def test_text_and_notebook_agree(name: str):
    text = jupytext.read(FOLDER / f"{name}.py")
    mine, theirs = (
        [(cell.cell_type, cell.source.strip()) for cell in one.cells if cell.source.strip()]
        for one in (text, notebook(name))
    )
    assert mine == theirs
    assert notebook(name).metadata["jupytext"]["formats"] == "ipynb,py:percent"


@each
def test_notebook_is_valid_and_was_run_from_top_to_bottom(name: str):
    nbformat.validate(notebook(name))
    code = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [cell.id for cell in notebook(name).cells if "execution" in cell.metadata]


@each
def test_outputs_hold_no_error_and_no_machine_path(name: str):
    for cell in notebook(name).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            shown = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/png")}
            said = json.dumps([output.get("text", ""), shown])
            assert MACHINE_PATH.search(said) is None, said


@each
def test_begins_and_ends_as_all_of_them_do(name: str):
    first, *_, last = markdown(name)
    number = int(name.split("_")[0])
    assert re.match(rf"# {number}\. \S", first)
    assert "What you will see:\n\n1. " in first
    assert re.search(r"^## Exercises\n\n1\. [\s\S]+^## Read on\n\n- ", last, re.MULTILINE)


@each
def test_links_lead_somewhere(name: str):
    for target in LINK.findall("\n".join(markdown(name))):
        if not target.startswith(("http", "#")):
            assert (FOLDER / target.split("#")[0]).is_file(), target


def test_docs_list_every_tutorial():
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "tutorials.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == NAMES
    assert [int(name.split("_")[0]) for name in NAMES] == list(range(1, len(NAMES) + 1))
