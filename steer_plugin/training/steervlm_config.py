"""How a SteerVLM module is trained; the paper publishes none of it, so every value is ours."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class SteerVLMTraining:
    """Hyper-parameters of a training run; the loss is cross-entropy on the answers' tokens, the optimiser AdamW.

    Attributes:
        steps: optimiser steps.
        batch_size: rows of each step and process: n processes take n times as many per step.
        accumulate: batches whose gradients add up to one step.
        learning_rate, warmup: peak of a cosine schedule, and the share of the steps that leads up to it.
        weight_decay, max_grad_norm: AdamW's decay, and the norm that gradients are clipped to.
        alpha: lambda while training; the paper uses 1.
        checkpointing: recompute the frozen layers in backward instead of keeping their activations.
        precision: "no", or autocast to "bf16" or "fp16".
        save_every, log_every: steps between checkpoints, and between entries of the report.
        closed: score answers among the tokens that occur in some training answer. Otherwise a word that never does is
            pushed down in every row, and a module cannot name later what it was never taught to name.
        max_tokens: prompt and answer together; longer answers are cut. None: as long as the model's context.

    Raises:
        InputError: values that cannot be.
    """

    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    alpha: float = 1.0
    checkpointing: bool = False
    precision: str = "no"
    save_every: int = 100
    log_every: int = 10
    closed: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            if int(getattr(self, name)) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        if self.learning_rate <= 0 or self.max_grad_norm <= 0 or not 0 <= self.warmup < 1:
            raise InputError(
                f"learning_rate ({self.learning_rate}) and max_grad_norm ({self.max_grad_norm}) must be positive, and "
                f"warmup ({self.warmup}) a share of the steps between 0 and 1."
            )
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")

    def as_json(self) -> dict[str, JSON]:
        """Every field."""
        return asdict(self)
