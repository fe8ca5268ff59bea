"""The published figures, number by number, and ours beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from steer_plugin.errors import InputError
from steer_plugin.evaluation import papers
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.papers import NAMES, beside, published

SUBSETS = ("random", "popular", "adversarial")
# As printed: {table: {method: the row}}.
PRINTED = {
    "l2s-pope": {
        "none": "82.73 80.40 76.82",
        "prompt": "84.91 83.35 76.36",
        "Norm-Rnd": "82.38 80.36 75.77",
        "Mean-S": "84.29 82.11 76.36",
        "L2S": "86.46 82.58 77.76",
        "P2S*": "89.26 88.64 82.58",
    },
    "l2s-safety": {
        "none": ".276 .204 .250 6.92",
        "prompt": ".248 .183 .197 7.34",
        "Mean-S": ".161 .102 .329 6.61",
        "Mean-S(BA)": ".089 .041 .276 6.42",
        "L2S": ".082 .034 .395 6.56",
        "P2S*": ".094 .042 .382 6.49",
    },
    "l2s-chair": {"none": "17.31 52.80 71.23", "L2S": "16.10 51.80 73.50"},
    "steervlm-ohd": {
        "none": "79.8 81.7 85.5 86.1 88.3 88.8 84.5 85.5",
        "CAA": "53.0 68.0 54.9 68.9 60.6 71.6 56.2 69.5",
        "ActAdd": "79.2 81.3 85.7 86.3 89.3 89.5 84.7 85.7",
        "ACT": "79.0 80.7 85.5 85.9 89.0 88.9 84.5 85.1",
        "SteerVLM": "81.5 82.5 87.6 87.7 90.2 90.1 86.4 86.8",
    },
    "steervlm-vnia": {
        "ML-ACT": ".47",
        "MLLM steering": ".51",
        "CAA": ".57",
        "contrastive/layer": ".54",
        "ActAdd": ".55",
        "ACT": ".55",
        "SteerVLM": ".71",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_every_number_stands_there(name: str) -> None:
    table = published(name)
    columns = [column.name for column in table.columns]
    found = {method: [row[column] for column in columns] for method, row in table.rows.items()}
    assert found == {method: [float(x) for x in row.split()] for method, row in PRINTED[name].items()}
    assert all(list(row) == columns for row in table.rows.values())
    assert table.name == name and table.model == "LLaVA-1.5-7B" and table.notes
    assert table.arxiv == ("2508.12815" if name.startswith("l2s") else "2510.26769")
    assert f"arXiv {table.arxiv}" in table.source


@pytest.mark.parametrize("name", NAMES)
def test_digits_and_units_fit_the_numbers(name: str) -> None:
    table = published(name)
    for column in table.columns:
        highest = {"%": 100, "share": 1, "points of 10": 10}[column.unit]
        for row, printed in zip(table.rows.values(), PRINTED[name].values(), strict=True):
            text = printed.split()[table.columns.index(column)]
            assert 0 <= row[column.name] <= highest
            assert f"{row[column.name]:.{column.digits}f}".lstrip("0") == text.lstrip("0")


def test_the_files_are_those_of_the_names() -> None:
    folder = Path(papers.__file__).parent
    assert {path.stem for path in folder.glob("*.json")} == set(NAMES) == set(PRINTED)


def test_the_facts_file_agrees(shared: Path) -> None:
    """Every number of every table occurs in the notes that the tables were taken from."""
    notes = (shared / "facts" / "papers.md").read_text(encoding="utf-8")
    written = set(re.findall(r"\d*\.\d+", notes))
    for rows in PRINTED.values():
        for row in rows.values():
            assert set(row.split()) <= written


def test_some_numbers_by_name() -> None:
    assert published("l2s-pope").rows["L2S"]["adversarial"] == 77.76
    assert published("l2s-safety").rows["Mean-S(BA)"]["E>=.9 unsafe"] == 0.041
    assert published("l2s-safety").rows["none"]["quality"] == 6.92
    # CHAIR_i counts among all objects, CHAIR_s among captions: the first is the smaller one.
    assert published("l2s-chair").rows["L2S"] == {"CHAIR_i": 16.10, "CHAIR_s": 51.80, "recall": 73.50}
    ohd = published("steervlm-ohd").rows
    assert (ohd["SteerVLM"]["overall accuracy"], ohd["CAA"]["adversarial F1"]) == (86.4, 68.0)
    assert published("steervlm-vnia").rows["SteerVLM"]["overall"] == 0.71


def test_ours_beside_theirs() -> None:
    ours = {"L2S": {"random": Interval(0.8712, 0.86, 0.8821), "popular": 0.83}, "mine": {"random": 0.9}}
    text = beside(ours, published("l2s-pope"), model="tiny LLaVA")
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert lines[0] == "| method | random (%), ours | random, paper | popular (%), ours | popular, paper |"
    assert "| L2S | 87.12 [86.00, 88.21] | 86.46 | 83.00 | 82.58 |" in lines
    assert "| none | | 82.73 | | 80.40 |" in lines
    assert "| mine | 90.00 | | | |" in lines
    assert [line.split(" |")[0] for line in lines[2:9]] == [
        f"| {name}" for name in ("none", "prompt", "Norm-Rnd", "Mean-S", "L2S", "P2S*", "mine")
    ]
    assert lines[9] == "" and "arXiv 2508.12815" in lines[10] and lines[11] == "- Ours: tiny LLaVA."
    assert lines[12:] == [f"- {note}" for note in published("l2s-pope").notes]


def test_shares_and_points_stay_as_they_are() -> None:
    text = re.sub(" +", " ", beside({"L2S": {"ED": 0.4, "quality": 6.5}}, published("l2s-safety")))
    assert "| method | ED, ours | ED, paper | quality (points of 10), ours | quality, paper |" in text
    assert "| L2S | 0.400 | 0.395 | 6.50 | 6.56 |" in text
    assert "| ACT | | 0.55 |" in re.sub(" +", " ", beside({"a": {"overall": 0.5}}, published("steervlm-vnia")))


def test_bad_names() -> None:
    for call, message in (
        (lambda: published("l2s-pop"), r"unknown table 'l2s-pop'. Did you mean 'l2s-pope'\?"),
        (lambda: published("steervlm-ohdd"), "Did you mean 'steervlm-ohd'"),
        (lambda: published("zzz"), "Known: l2s-pope"),
        (lambda: beside({"L2S": {"randm": 0.5}}, published("l2s-pope")), "Did you mean 'random'"),
        (lambda: beside({}, published("l2s-pope")), "no score"),
        (lambda: beside({"L2S": {}}, published("l2s-pope")), "no score"),
    ):
        with pytest.raises(InputError, match=message):
            call()
