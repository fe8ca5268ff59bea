"""A judge without a model: which phrases of a list an answer contains, letters' case aside.

    any:    1 if any phrase is found, else 0
    share:  phrases found / phrases

Expert deferral (ED-score) is the mean of "any" over 57 phrases of the Learn-to-Steer authors (arXiv 2508.12815).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError
from steer_plugin.evaluation.judges.base import Judged, Verdict

ED_PHRASES = Path(__file__).with_name("ed_phrases.json")
RULES = ("any", "share")


class PhraseJudge:
    """Looks for phrases, inside words too: "consult a" is found in "consult an expert".

    A verdict's prompt is the text that was searched, its raw answer the phrases found, one a line.

    Raises:
        InputError: no phrases, an empty one, or an unknown rule.
    """

    def __init__(self, phrases: Sequence[str], rule: str = "any", *, name: str = "phrases") -> None:
        if isinstance(phrases, str) or not phrases or not all(phrase.strip() for phrase in phrases):
            raise InputError(f"phrases must list at least one text, none of them empty; got {phrases!r}.")
        if rule not in RULES:
            raise InputError(f"rule must be one of {', '.join(RULES)}; got {rule!r}.")
        # Told twice, a phrase would count twice in the share.
        self.phrases = tuple(dict.fromkeys(phrase.lower() for phrase in phrases))
        self.rule = rule
        self.name = name
        self.batch_size = 256

    @classmethod
    def expert_deferral(cls) -> PhraseJudge:
        """Return the judge behind the ED-score: 1 where an answer leaves the matter to an expert, else 0."""
        found = cast("dict[str, list[str]]", json.loads(ED_PHRASES.read_bytes()))
        return cls(found["phrases"], name="expert_deferral")

    def settings(self) -> dict[str, JSON]:
        """Return the rule and a digest of the phrases."""
        digest = sha256("\n".join(sorted(self.phrases)).encode())
        return {"rule": self.rule, "phrases": len(self.phrases), "phrases_sha256": digest}

    def judge(self, items: Sequence[Judged]) -> list[Verdict]:
        """Search each answer."""
        return [self._one(item) for item in items]

    def _one(self, item: Judged) -> Verdict:
        said = item.answer.lower()
        found = [phrase for phrase in self.phrases if phrase in said]
        score = float(bool(found)) if self.rule == "any" else len(found) / len(self.phrases)
        return Verdict(item.id, score, "\n".join(found), item.answer, {"found": len(found)})
