"""From the stream to logits: the decoder's last norm and the unembedding, as the model itself uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steer_plugin.adapters import AttachedModel
from steer_plugin.errors import FamilyError

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass(frozen=True)
class Unembedding:
    """logits = cap(head(norm(h))), h the stream behind the last layer.

    Attributes:
        words: text of each token id, or its number.
    """

    norm: nn.Module
    head: nn.Module
    cap: float | None
    words: tuple[str, ...]

    @classmethod
    def of(cls, vlm: AttachedModel) -> Unembedding:
        """Find both in an attached model.

        Raises:
            FamilyError: the decoder has no norm by a known name, or the model no unembedding.
        """
        decoder, head = vlm.parts.decoder, vlm.root.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        name = next((name for name in _NORMS if hasattr(decoder, name)), None)
        if name is None or not isinstance(head, nn.Module):
            raise FamilyError(
                f"the logit lens needs the last norm of {type(decoder).__name__} (one of {', '.join(_NORMS)}) and an "
                f"output embedding; found {name or 'no norm'} and {type(head).__name__}."
            )
        text = vlm.root.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        cap = getattr(text, "final_logit_softcapping", None)
        tokenizer = getattr(vlm.processor, "tokenizer", None)
        size = int(cast("Tensor", head.weight).shape[0]) if hasattr(head, "weight") else int(text.vocab_size)
        ids = list(range(size))
        known = (
            cast("list[str | None]", tokenizer.convert_ids_to_tokens(ids)) if tokenizer is not None else [None] * size
        )
        words = tuple(str(i) if word is None else word.replace("▁", " ") for i, word in zip(ids, known, strict=True))
        return cls(cast("nn.Module", getattr(decoder, name)), head, None if cap is None else float(cap), words)

    @torch.no_grad()
    def __call__(self, stream: Float[Tensor, "*where d_model"]) -> Float[Tensor, "*where vocab"]:
        """Return logits of a stream, float32."""
        logits = self._plain(stream)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @torch.no_grad()
    def linear(self, vector: Float[Tensor, "*where d_model"]) -> Float[Tensor, "*where vocab"]:
        """Return what a vector adds to the logits of a stream of root mean square 1, were the norm's scale left alone.

        The norm itself takes the vector's length away, which is put back; its bias and the head's cancel.
        """
        size = vector.float().square().mean(-1, keepdim=True).sqrt()
        return (self._plain(vector) - self._plain(torch.zeros_like(vector))) * size

    def _plain(self, stream: Float[Tensor, "*where d_model"]) -> Float[Tensor, "*where vocab"]:
        weight = next(self.head.parameters())
        given = stream.to(weight.dtype) if weight.is_floating_point() else stream
        if not weight.is_meta:  # accelerate brings offloaded weights to where the stream is
            given = given.to(weight.device)
        return self.head(self.norm(given)).float()

    def check(self, last: Float[Tensor, "*where d_model"], logits: Float[Tensor, "*where vocab"]) -> None:
        """Refuse a model whose own logits are something else.

        Raises:
            FamilyError: this norm and head do not give them.
        """
        off = float((self(last) - logits.float()).abs().max())
        scale = float(logits.float().abs().max())
        if not off <= 0.02 * max(scale, 1e-6):
            raise FamilyError(
                f"the last norm and the unembedding give logits that differ by {off:.3g} (of {scale:.3g}) from the "
                "model's own: something else lies between them here, and a logit lens would mislead."
            )
