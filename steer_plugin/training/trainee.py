"""What is trained: the module alone, seen through the frozen model that it steers.

    loss = - sum over answer tokens t of log p(t | picture, task, answer before t, steered by lambda * g * s) / count

Source: arXiv 2510.26769, training objective. Answers stand behind left-padded prompts, so the first answer token is
decided in one column of the batch; the prompt in front of the steered tokens runs once, without gradients.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, ProcessorMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from steer_plugin.adapters import AttachedModel
from steer_plugin.adapters._chat import completion_ids
from steer_plugin.adapters._inputs import encode
from steer_plugin.contrast.rows import SteeringRow
from steer_plugin.errors import InputError
from steer_plugin.methods.steervlm import SteerVLM

IGNORED = -100


def processor_of(vlm: AttachedModel) -> ProcessorMixin:
    """The model's processor; raises InputError without one."""
    if vlm.processor is None:
        raise InputError("training needs the model's processor: sp.attach(model, processor).")
    return vlm.processor


@dataclass
class Collator:
    """Rows to one batch: prompts padded in front, answers behind, and labels for the answers alone."""

    vlm: AttachedModel
    max_tokens: int | None

    def answer(self, row: SteeringRow) -> list[int]:
        """Token ids of a row's answer, end of sequence included."""
        processor = processor_of(self.vlm)
        ids = completion_ids(processor, row.task, row.answer, f"row {row.id!r}")
        eos = cast("Any", processor).tokenizer.eos_token_id
        return ids if eos is None else [*ids, int(eos)]

    def vocabulary(self, rows: Sequence[SteeringRow]) -> Int[Tensor, " token"]:
        """Tokens that occur in some answer."""
        distinct = {(row.task, row.answer): row for row in rows}
        return torch.tensor(sorted({token for row in distinct.values() for token in self.answer(row)}))

    def __call__(self, rows: Sequence[SteeringRow]) -> dict[str, object]:
        """Build the batch; raises InputError for a row whose prompt leaves no room for an answer."""
        pictures = [[row.load_image()] for row in rows]
        prompt = encode(processor_of(self.vlm), [row.task for row in rows], pictures, torch.device("cpu"))
        lengths = prompt["attention_mask"].sum(-1).tolist()
        answers = [self._cut(row, length) for row, length in zip(rows, lengths, strict=True)]
        counts, width = [len(answer) for answer in answers], max(len(answer) for answer in answers)
        ids, labels = (
            torch.tensor([[*answer, *[fill] * (width - len(answer))] for answer in answers]) for fill in (0, IGNORED)
        )
        real = torch.tensor([[1] * count + [0] * (width - count) for count in counts])
        mask = torch.cat([prompt["attention_mask"], real], 1)
        return {
            **prompt,
            "input_ids": torch.cat([prompt["input_ids"], ids], 1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "labels": labels,
            "answers": counts,
            "pairs": [(row.p_plus, row.p_minus) for row in rows],
        }

    def _cut(self, row: SteeringRow, prompt: int) -> list[int]:
        answer = self.answer(row)
        room = len(answer) if self.max_tokens is None else self.max_tokens - prompt
        if room < 1:
            raise InputError(
                f"row {row.id!r}: its prompt has {prompt} tokens, so max_tokens={self.max_tokens} leaves none for the "
                "answer; raise max_tokens or leave the row out."
            )
        return answer[:room]


class Trainee(nn.Module):
    """The module as the only child: neither optimiser nor checkpoint holds the frozen model."""

    def __init__(
        self,
        vlm: AttachedModel,
        steering: SteerVLM,
        *,
        checkpointing: bool = False,
        vocabulary: Int[Tensor, " token"] | None = None,
    ) -> None:
        super().__init__()
        self.module = steering.module
        self._vocabulary = vocabulary  # tokens to score among; None: all
        self._held = (vlm, steering.with_positions(steering.positions.forced()), checkpointing)
        self._open = ExitStack()

    def forward(
        self,
        pairs: Sequence[tuple[str, str]],
        answers: Sequence[int],
        labels: Int[Tensor, "row answer"],
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Tensor,
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the loss; the steering stays in force until `close`, because checkpointing needs it in backward."""
        vlm, steering, checkpointing = self._held
        self.close()
        bound = steering.pair([plus for plus, _ in pairs], [minus for _, minus in pairs])
        root = self._open.enter_context(vlm.steering_root(bound, completion_tokens=list(answers)))
        if checkpointing:
            self._open.enter_context(recomputing(root))
        inputs = {name: value.to(vlm.device) for name, value in inputs.items()}
        # Recomputed layers drop the cache, so the prompt cannot be shared then.
        cached = {"use_cache": False} if checkpointing else {"past_key_values": DynamicCache(config=_text(root))}
        logits = root(**inputs, **cached, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        labels, logits = labels.to(logits.device), logits.float()
        if self._vocabulary is not None:
            known = torch.full_like(logits[0, 0], -torch.inf)
            known[self._vocabulary] = 0.0
            logits = logits + known
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    def close(self) -> None:
        """End the steering of the last forward."""
        self._open.close()


def _text(root: nn.Module) -> Any:
    return cast("Any", root).config.get_text_config()


@contextmanager
def recomputing(root: nn.Module) -> Generator[None, None, None]:
    """Checkpoint the frozen layers; they alone are told that this is training, so nothing drops out."""
    layers = [module for module in root.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [(layer, layer.training) for layer in layers]
    model = cast("Any", root)
    was_on = bool(model.is_gradient_checkpointing)
    if not was_on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = True  # not layer.train(): its children stay as they are
    try:
        yield
    finally:
        for layer, training in before:
            layer.training = training
        if not was_on:
            model.activation_checkpointing_disable()


def frozen(vlm: AttachedModel) -> Mapping[str, bool]:
    """Freeze the base model; returns what wanted gradients before, to be given to `thawed`."""
    before = {name: parameter.requires_grad for name, parameter in vlm.root.named_parameters()}
    vlm.root.requires_grad_(False)
    return before


def thawed(vlm: AttachedModel, before: Mapping[str, bool]) -> None:
    """Undo `frozen`."""
    for name, parameter in vlm.root.named_parameters():
        parameter.requires_grad_(before[name])
