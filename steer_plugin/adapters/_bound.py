"""A TransformerBridge that shows one batch's pictures in every run, for tools that pass token ids alone.

`transformer_lens.patching` calls `model.run_with_hooks(tokens, fwd_hooks=...)`: on a bridge itself the picture would be
left out without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from steer_plugin.errors import FrameworkError, InputError


class BoundBridge:
    """What TransformerLens' own tools take for a model: `cfg`, `run_with_hooks`, `run_with_cache`, `to_tokens`.

    Attributes:
        bridge: the bridge itself; what is not said here is asked of it.
        inputs: the batch, token ids included.
    """

    def __init__(self, bridge: TransformerBridge, inputs: Mapping[str, Tensor]) -> None:
        self.bridge = bridge
        self.inputs = dict(inputs)

    def __getattr__(self, name: str) -> Any:
        """Anything else is the bridge's.

        Raises:
            FrameworkError: `generate`, which would drop the picture.
        """
        if name == "generate":
            raise FrameworkError("bridge.generate drops the picture; use vlm.generate(**inputs), or original_model's.")
        if name == "bridge":  # not there yet, as in a copy
            raise AttributeError(name)
        return getattr(self.bridge, name)

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """The bridge's config."""
        return self.bridge.cfg

    @property
    def tokens(self) -> Tensor:
        """(row, pos) token ids of the batch."""
        return self.inputs["input_ids"]

    def run_with_hooks(self, tokens: Tensor | None = None, **kwargs: Any) -> Any:
        """`bridge.run_with_hooks` on the batch, pictures and mask included.

        Raises:
            InputError: token ids of another shape, or with other image tokens.
        """
        return self.bridge.run_with_hooks(self._fitting(tokens), **{**self._beside(), **kwargs})

    def run_with_cache(self, tokens: Tensor | None = None, **kwargs: Any) -> Any:
        """`bridge.run_with_cache` on the batch, pictures and mask included.

        Raises:
            InputError: token ids of another shape, or with other image tokens.
        """
        return self.bridge.run_with_cache(self._fitting(tokens), **{**self._beside(), **kwargs})

    def to_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
        """`bridge.to_tokens`; it does not expand image tokens."""
        return self.bridge.to_tokens(*args, **kwargs)

    def __call__(self, tokens: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the bridge on the batch."""
        return self.bridge(self._fitting(tokens), **{**self._beside(), **kwargs})

    forward = __call__

    def _beside(self) -> dict[str, Any]:
        return {key: value for key, value in self.inputs.items() if key != "input_ids"}

    def _fitting(self, tokens: Tensor | None) -> Tensor:
        """Token ids that these pictures belong to; words may differ, as in a patch between two questions."""
        own = self.tokens
        if tokens is None:
            return own
        image = getattr(self.bridge.original_model.config, "image_token_id", None)
        same = tokens.shape == own.shape and (
            image is None or torch.equal(tokens.to(own.device) == image, own == image)
        )
        if not same:
            raise InputError(
                f"token ids of shape {tuple(tokens.shape)} do not fit the pictures of this batch, whose ids have shape "
                f"{tuple(own.shape)}, image tokens in the same places; bind the bridge to their own inputs."
            )
        return tokens
