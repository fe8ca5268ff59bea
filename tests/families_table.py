"""Writes the table of families x frameworks x sites into docs/families.md from what the tests themselves reported.

    make families      runs tests/core/test_families.py with --junitxml, then this file on the report

A cell says yes when every test of that site passed; a site that the family refuses says so.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- begin: written by `make families` -->", "<!-- end -->"
SITES = ("resid_pre", "attn_raw", "attn_out", "mlp_raw", "mlp_out", "resid_post")
NAMES = {"torch": "Hugging Face", "nnsight": "nnsight", "transformer_lens": "TransformerLens"}
CASE = re.compile(r"(?P<test>\w+)\[(?:(?P<kind>\w+)-)?(?P<family>\w+)-(?P<framework>torch|nnsight|transformer_lens)\]")
Results = dict[tuple[str, str], dict[str, list[bool]]]


def results(report: Path) -> Results:
    """(family, framework) -> column -> outcomes of its tests."""
    found: Results = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        match = CASE.fullmatch(case.get("name", ""))
        if match is None:
            continue
        column = {"test_generation_equals_plain_hooks": "generation", "test_vision_sites_and_the_projector": "vision"}
        name = column.get(match["test"], match["kind"] or "")
        passed = case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
        found.setdefault((match["family"], match["framework"]), {}).setdefault(name, []).append(passed)
    return found


def table(found: Results) -> str:
    """The Markdown table; a family without a passing generation on a framework is not supported there."""
    columns = (*SITES, "vision", "generation")
    lines = [
        f"| family | framework | {' | '.join(f'`{site}`' for site in SITES)} | vision, projector | generation |",
        "| --- " * (2 + len(columns)) + "|",
    ]
    for family, framework in sorted(found, key=lambda key: (key[0], list(NAMES).index(key[1]))):
        outcome = found[family, framework]
        cells = ["yes" if outcome.get(name) and all(outcome[name]) else "**no**" for name in columns]
        lines.append(f"| {family} | {NAMES[framework]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(page: str, block: str) -> str:
    """The page with its generated part replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8"), table(results(Path(sys.argv[1])))), "utf-8")
