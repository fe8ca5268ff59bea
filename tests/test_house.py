"""The rules of the house, read off the tree: small files, dependencies downwards, frameworks only in the adapters."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "steer_plugin"
FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} - {"__init__"}
FRAMEWORKS = ("nnsight", "transformer_lens")
LONGEST = 300

# Which parts a part may not reach, neither itself nor through what it imports.
CLI = {part for part in PARTS if part.split("_")[0] == "cli"}
TOP = {"analysis", "evaluation", "pocket"} | CLI
ABOVE_ADAPTERS = TOP | {"methods", "contrast", "training"}
ABOVE_INTERVENTION = ABOVE_ADAPTERS | {"adapters"}
BOTTOM = ("errors", "artefact", "store", "sites", "positions", "layout", "record", "pictures")
UPWARDS: dict[str, set[str]] = {
    **dict.fromkeys(BOTTOM, ABOVE_INTERVENTION | {"families", "intervention"}),
    "family": ABOVE_INTERVENTION | {"families"},
    "families": ABOVE_INTERVENTION,
    "intervention": ABOVE_INTERVENTION,
    "adapters": ABOVE_ADAPTERS,
    "contrast": ABOVE_INTERVENTION - {"contrast"},
    "methods": TOP,
    "training": TOP,
    "analysis": {"pocket"} | CLI,
    "evaluation": {"pocket"} | CLI,
    "pocket": {"adapters", "methods"} | CLI,
}
# A path on somebody's machine: a home folder or a build machine's work folder.
MACHINE_PATH = re.compile(r"(?<![\w.*])/(?:work|root|home|Users)/\w|[A-Z]:\\Users\\")
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".jsonl", ".csv", ".ipynb", ".html", ".svg", ".sh", ""}


def module_name(path: Path) -> str:
    """Return the dotted name: steer_plugin/methods/l2s.py is steer_plugin.methods.l2s."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported(path: Path) -> frozenset[str]:
    """Return every module that a file imports, anywhere in it, as absolute dotted names."""
    names: set[str] = set()
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source != "steer_plugin":  # `from steer_plugin import sites` asks for the part alone
                names.add(source)
            names.update(f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return frozenset(names)


def part(name: str) -> str:
    """Return the part of the house that a module belongs to; "" is the package's own __init__."""
    found = name.split(".")[1:2]
    return found[0] if found and found[0] in PARTS else ""


@cache
def edges() -> dict[str, set[str]]:
    """Return, for every part, the parts that it imports."""
    graph: dict[str, set[str]] = {name: set() for name in ("", *PARTS)}
    for path in FILES:
        own = part(module_name(path))
        graph[own] |= {part(name) for name in imported(path) if name.split(".")[0] == "steer_plugin"} - {own}
    return graph


def reached(start: str) -> dict[str, list[str]]:
    """Return every part that a part reaches, each with the way there."""
    ways = {start: [start]}
    todo = [start]
    while todo:
        here = todo.pop()
        for there in edges().get(here, set()) - set(ways):
            ways[there] = [*ways[here], there]
            todo.append(there)
    return ways


def tracked() -> list[Path]:
    """Return the files that git knows or would take."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        out = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in out.split("\0") if name and (path := ROOT / name).is_file()]


def test_files_are_short():
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in FILES}
    assert FILES
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_only_adapters_import_a_framework():
    guilty = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in imported(path)
        if name.split(".")[0] in FRAMEWORKS and PACKAGE / "adapters" not in path.parents
    ]
    assert guilty == []


def test_methods_know_no_single_adapter():
    lowering = tuple(f"steer_plugin.adapters.{name}" for name in (*FRAMEWORKS, "torch_hooks"))
    guilty = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if part(module_name(path)) == "methods"
        for name in imported(path)
        if name.startswith(lowering)
    ]
    assert guilty == []


@pytest.mark.parametrize("name", sorted(UPWARDS))
def test_dependencies_point_downwards(name: str):
    ways = reached(name)
    assert [" -> ".join(ways[there]) for there in sorted(UPWARDS[name] & set(ways))] == []


def test_no_machine_paths():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.suffix in TEXT
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_import_loads_no_framework():
    code = f"import sys, steer_plugin; print([m for m in {FRAMEWORKS!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_version_is_stated_once():
    import steer_plugin

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert steer_plugin.__version__ == project["version"]
