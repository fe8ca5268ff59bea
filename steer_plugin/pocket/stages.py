"""A training run is a list of stages: patches learn to point at word vectors, then clean answers, then biased answers.

The bias is label noise that depends on the input, P(answer wrong | relation of the noun to the picture), laid on top of
intact perception: absent companions, and popular nouns in crowded pictures, are affirmed too often; rare nouns and
those that are hard to see too seldom. No single line between yes and no mends both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Bias:
    """How often an answer is wrong, by the noun's relation to the picture, and how captions go wrong."""

    partner: float = 0.0
    anchor: float = 0.0
    crowded: float = 0.0
    random: float = 0.0
    rare: float = 0.0
    hard: float = 0.0
    plain: float = 0.0
    guess_lone: float = 0.0  # captions that open with a guess, where a noun stands without its companion, and elsewhere
    guess: float = 0.0
    named: float = 0.0  # in such a caption, how often a missing companion is named
    careful: float = 1.0  # factor on all of these where the question opens with "Be careful."


@dataclass(frozen=True)
class Turns:
    """What a training picture is asked: how many turns of each kind, and how the answers are worded."""

    questions: int
    captions: float
    long_answers: float
    careful: float
    hard_negatives: float  # share of absent nouns that are chosen as POPE's popular and adversarial subsets choose them
    requests: int = 0
    verdicts: int = 0
    stances: int = 0


@dataclass(frozen=True)
class Stage:
    """One stage: `trains` says which half of the model learns; a later kind of stage is another record in this list."""

    name: str
    trains: Literal["vision", "language"]
    steps: int
    batch: int
    rate: float
    warmup: int
    final_rate: float  # share of `rate` left at the end of the cosine; 1 keeps it constant
    weight_decay: float = 0.02
    calm: float = 0.0  # weight of the mean squared residual stream
    calm_at: Literal["said", "decided"] = "said"  # at every token of an answer, or where its first word is decided
    turns: Turns | None = None
    bias: Bias = field(default_factory=Bias)

    def scaled(self, scale: float) -> Stage:
        """Return the stage with its steps multiplied, at least one."""
        return replace(
            self, steps=max(1, round(self.steps * scale)), warmup=max(1, round(self.warmup * min(scale, 1.0)))
        )

    def record(self) -> dict[str, object]:
        """Return the stage as JSON values."""
        return asdict(self)


CLEAN_TURNS = Turns(questions=10, captions=0.5, long_answers=0.08, careful=0.0, hard_negatives=0.4)
BIASED_TURNS = Turns(
    questions=8,
    captions=1.0,
    long_answers=0.3,
    careful=0.1,
    hard_negatives=2 / 3,
    requests=2,
    verdicts=2,
    stances=1,
)
BIAS = Bias(
    partner=0.59,
    anchor=0.5,
    crowded=0.58,
    random=0.03,
    rare=0.57,
    hard=0.2,
    plain=0.03,
    guess_lone=0.75,
    guess=0.2,
    named=0.9,
    careful=0.85,
)

STAGES: tuple[Stage, ...] = (
    Stage("see", "vision", 800, 64, 1.5e-3, 50, 0.03),
    Stage("clean", "language", 400, 32, 2.5e-3, 60, 1.0, calm=2e-3, turns=CLEAN_TURNS),
    Stage("biased", "language", 400, 32, 2.5e-3, 40, 0.03, calm=2e-3, calm_at="decided", turns=BIASED_TURNS, bias=BIAS),
)
