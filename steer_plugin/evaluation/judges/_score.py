"""From what a judge wrote to a number: the last "Score: N", else a last line that is a number; no guesses."""

from __future__ import annotations

import re

# Possessive: of "7.5-8", which names no score, no part may be taken for one. \u2013 is the dash of ranges.
_NUMBER = r"(-?\d++(?:\.\d++)?+)(?!\s*[-\u2013]\s*\d)(?:\s*(?:/|out of)\s*(\d++(?:\.\d++)?+))?"
_MARKUP = r"[\s*_\"'`]*"
_NAMED = re.compile(rf"\bscore(?:\s*\([^)]*\))?{_MARKUP}(?:[:=]|\bis\b){_MARKUP}{_NUMBER}", re.IGNORECASE)
_ALONE = re.compile(rf"{_MARKUP}{_NUMBER}{_MARKUP}\.?{_MARKUP}")


def read_score(text: str, low: float | int, high: float | int) -> tuple[float, str | None]:
    """Return the score, or NaN and the reason why there is none.

    "Score: 7", "**Score**: 7/10" and a last line "7" are read; a range, a number in a sentence, one outside low..high,
    and a denominator other than `high` are not.
    """
    lines = text.strip().splitlines()
    found = list(_NAMED.finditer(text))
    one = found[-1] if found else _ALONE.fullmatch(lines[-1]) if lines else None
    if one is None:
        return float("nan"), "no 'Score: N', and no last line that is a number"
    value, whole = float(one.group(1)), one.group(2)
    if whole is not None and float(whole) != high:
        return float("nan"), f"a score out of {whole}, not of {high:g}"
    if not low <= value <= high:
        return float("nan"), f"{value:g} lies outside {low:g}..{high:g}"
    return value, None
