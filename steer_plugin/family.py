"""The record of one VLM family: module paths, and which module's input or output a site is.

    attn_out, mlp_out = what is added to the residual stream;  attn_raw, mlp_raw = what the attention and the MLP give

The two differ where a norm lies between them (Gemma 3). Records of the families that the package knows: `families`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from steer_plugin.errors import SiteError
from steer_plugin.sites import Site

End = Literal["input", "output"]


@dataclass(frozen=True)
class Family:
    """Module paths and habits of one VLM family; paths are relative to the Hugging Face root model.

    Attributes:
        name: how messages call it.
        model_types: `config.model_type` values that it covers.
        decoder: the text decoder whose forward runs the layers (twins and replay live at its boundary).
        layers: the decoder layers.
        attention, mlp: sub-modules of a decoder layer; their outputs are attn_raw and mlp_raw.
        attn_added, mlp_added: sub-modules whose outputs are added to the residual stream (attn_out, mlp_out); None: by
            the decoder's own type, else the attention and the MLP themselves.
        cross_attention: the sub-module that some layers have in place of `attention`; what they add is gated outside
            any module, so they have attn_raw and mlp_raw alone.
        scaled: why attn_out and mlp_out are no module's output in this model, if so (Granite's residual_multiplier).
        vision: the vision tower; its layers and what is in them are known by the tower's own type.
        vision_layers, vision_attention, vision_mlp, vision_width: the same, said outright; `vision_width` is a name in
            the vision config.
        vision_scaled: why vision_attn_out and vision_mlp_out are no module's output here, if so.
        projector: what maps picture features to the decoder's width.
        assistant_headers: texts that open the assistant turn, for models attached without a chat template.
        positions: "mask" when position_ids of a padded batch count the attention mask, "mask+1" when they begin with 1,
            "own" when the model makes them (mRoPE).
        replay: "exact" when cropping the KV cache by one and running that token again gives the same stream,
            "second_pass" when a late read needs a whole further pass.
        branches: what may run once for several continuations: "exact" any beginning of a prompt, "prompt" whole prompts
            (their tokens attend to each other both ways), "none" where a cache takes up one token at a time only.
        answer_type: what token_type_ids say of an answer's tokens, where the family has such.
        notes: what a user of its sites should know.
    """

    name: str
    model_types: tuple[str, ...]
    decoder: str
    layers: str
    attention: str = "self_attn"
    mlp: str = "mlp"
    attn_added: str | None = None
    mlp_added: str | None = None
    cross_attention: str | None = None
    scaled: str | None = None
    vision: str | None = None
    vision_layers: str | None = None
    vision_attention: str | None = None
    vision_mlp: str | None = None
    vision_width: str | None = None
    vision_scaled: str | None = None
    projector: str | None = None
    assistant_headers: tuple[str, ...] = ()
    positions: Literal["mask", "mask+1", "own"] = "mask"
    replay: Literal["exact", "second_pass"] = "exact"
    branches: Literal["exact", "prompt", "none"] = "exact"
    answer_type: int = 0
    notes: str = ""

    def point(self, site: Site, *, cross: bool = False) -> tuple[str, End]:
        """Return (module path, "input" or "output") of a resolved site; `cross`: its layer attends to the picture.

        Raises:
            SiteError: this family has no such place.
        """
        if site.kind == "projector":
            if self.projector is None:
                raise SiteError(f"family {self.name!r} has no projector module; use resid_pre(0).")
            return self.projector, "output"
        layers = self.vision_layers if site.in_vision else self.layers
        if layers is None:
            raise SiteError(f"family {self.name!r} names no vision layers, so {str(site)!r} cannot be reached.")
        path, bare = f"{layers}.{site.layer}", site.kind.removeprefix("vision_")
        if bare == "resid_pre":
            return path, "input"
        if bare == "resid_post":
            return path, "output"
        return f"{path}.{self._inside(site, bare, cross=cross)}", "output"

    def _inside(self, site: Site, bare: str, *, cross: bool) -> str:
        """Sub-module of a layer whose output is the site."""
        which, added = bare.split("_")
        if site.in_vision:
            if added == "out" and self.vision_scaled:
                raise SiteError(
                    f"{site} is no module's output in family {self.name!r}: {self.vision_scaled}. Use "
                    f"{str(site).replace('_out', '_raw')!r}, before that factor, or vision_resid_post.{site.layer}."
                )
            return self.vision_attention or "self_attn" if which == "attn" else self.vision_mlp or "mlp"
        if cross and added == "out":
            raise SiteError(
                f"layer {site.layer} of this {self.name!r} model is a cross-attention layer, which adds its parts "
                f"through a gate outside any module, so {str(site)!r} cannot be reached. Use "
                f"{str(site).replace('_out', '_raw')!r}, before the gate, or resid_post({site.layer})."
            )
        if self.scaled and added == "out":
            raise SiteError(
                f"{site} is no module's output in this {self.name!r} model: {self.scaled}. Use "
                f"{str(site).replace('_out', '_raw')!r}, before that factor, or resid_post({site.layer})."
            )
        if cross and which == "attn":
            return self.cross_attention or self.attention
        behind = (self.attn_added if which == "attn" else self.mlp_added) if added == "out" else None
        return behind or (self.attention if which == "attn" else self.mlp)

    def n_layers(self, root: nn.Module) -> int:
        """Number of decoder layers."""
        return len(list(root.get_submodule(self.layers).children()))

    def n_vision_layers(self, root: nn.Module) -> int:
        """Number of vision layers, 0 where they are not named."""
        return 0 if self.vision_layers is None else len(list(root.get_submodule(self.vision_layers).children()))
