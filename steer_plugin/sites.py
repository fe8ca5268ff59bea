"""Where an intervention reads or writes: Site = (kind, layer), named as in TransformerLens.

A decoder layer l maps its input to its output as

    resid_pre_l -> (+ attn_out_l) -> (+ mlp_out_l) -> resid_post_l

and `attn_out`, `mlp_out` are always the tensors that are added to the residual stream. `attn_raw` and `mlp_raw` are
what the attention and the MLP themselves give: the same, unless a norm (Gemma 3), a gate or a scale follows. The vision
tower has the same kinds behind `vision_`; `projector` is what the language model receives for the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

from steer_plugin.errors import SiteError, nearest

DECODER_KINDS = ("resid_pre", "attn_raw", "attn_out", "mlp_raw", "mlp_out", "resid_post")
VISION_KINDS = tuple(f"vision_{kind}" for kind in DECODER_KINDS)
KINDS = (*VISION_KINDS, "projector", *DECODER_KINDS)
# Known by name, refused with a reason: better than "unknown site" for words that every user of TransformerLens knows.
REFUSED = {
    "resid_mid": "a write there changes only the MLP branch in TransformerLens; use attn_out of the same layer",
    "attn_scores": "attention scores exist only in eager kernels and no adapter lowers them yet",
    "attn_pattern": "attention patterns exist only in eager kernels and no adapter lowers them yet",
}


@dataclass(frozen=True)
class Site:
    """One place in the network: a kind and a layer (negative layers count from the end, as in Python).

    Raises:
        SiteError: unknown or refused kind, a layer where none belongs, or none where one does.
    """

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be a site."""
        if self.kind in REFUSED:
            raise SiteError(f"site {self.kind!r} cannot be used: {REFUSED[self.kind]}.")
        if self.kind not in KINDS:
            raise SiteError(f"unknown site {self.kind!r}.{nearest(self.kind, KINDS)} Known sites: {', '.join(KINDS)}.")
        if self.kind == "projector":
            if self.layer is not None:
                raise SiteError(f"the projector has no layers, got layer {self.layer!r}; use sp.projector().")
        elif not isinstance(self.layer, int) or isinstance(self.layer, bool):
            raise SiteError(f"site {self.kind!r} needs an integer layer, got {self.layer!r}; say {self.kind}(14).")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read "resid_post.14" (what `str(site)` writes); a Site passes through.

        Raises:
            SiteError: the text names no site.
        """
        if isinstance(text, Site):
            return text
        kind, dot, layer = text.partition(".")
        if not dot:
            return cls(kind) if kind == "projector" else cls(kind, None)
        try:
            return cls(kind, int(layer))
        except ValueError as error:
            if isinstance(error, SiteError):
                raise
            raise SiteError(f"site {text!r} needs an integer after the dot, as in 'resid_post.14'.") from error

    def __str__(self) -> str:
        """Write the site as `parse` reads it."""
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @property
    def in_vision(self) -> bool:
        """Whether the site lies before the text decoder, where tokens are picture patches."""
        return self.kind == "projector" or self.kind.startswith("vision_")

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key of execution: vision tower, projector, decoder; inside a layer input, attention, MLP, output."""
        if self.kind == "projector":
            return (1, 0, 0)
        bare = self.kind.removeprefix("vision_")
        return (0 if self.in_vision else 2, self.layer or 0, DECODER_KINDS.index(bare))

    def resolve(self, n_layers: int, n_vision_layers: int) -> Site:
        """Return the site with a non-negative layer that exists in a model of that depth.

        Raises:
            SiteError: the layer is out of range.
        """
        if self.layer is None:
            return self
        depth = n_vision_layers if self.in_vision else n_layers
        if depth == 0:
            raise SiteError(
                f"the record of this family names no vision layers, so {str(self)!r} cannot be reached; write at the "
                "projector or at resid_pre(0), or register the family with vision_layers=."
            )
        if not -depth <= self.layer < depth:
            raise SiteError(
                f"layer {self.layer} of site {str(self)!r} is out of range: this model has {depth} "
                f"{'vision' if self.in_vision else 'decoder'} layers, so 0 to {depth - 1} (or -{depth} to -1)."
            )
        return Site(self.kind, self.layer % depth)


def resid_pre(layer: int) -> Site:
    """Input of decoder layer `layer`."""
    return Site("resid_pre", layer)


def resid_post(layer: int) -> Site:
    """Output of decoder layer `layer`: the residual stream after it."""
    return Site("resid_post", layer)


def attn_out(layer: int) -> Site:
    """Attention output of decoder layer `layer` before its residual add (SteerVLM's x_l)."""
    return Site("attn_out", layer)


def mlp_out(layer: int) -> Site:
    """MLP output of decoder layer `layer` before its residual add."""
    return Site("mlp_out", layer)


def attn_raw(layer: int) -> Site:
    """Output of the attention module of decoder layer `layer`, before any norm or gate that follows it."""
    return Site("attn_raw", layer)


def mlp_raw(layer: int) -> Site:
    """Output of the MLP module of decoder layer `layer`, before any norm or gate that follows it."""
    return Site("mlp_raw", layer)


def vision_resid_pre(layer: int) -> Site:
    """Input of vision layer `layer`."""
    return Site("vision_resid_pre", layer)


def vision_resid_post(layer: int) -> Site:
    """Output of vision layer `layer`."""
    return Site("vision_resid_post", layer)


def vision_attn_out(layer: int) -> Site:
    """Attention output of vision layer `layer`."""
    return Site("vision_attn_out", layer)


def vision_mlp_out(layer: int) -> Site:
    """MLP output of vision layer `layer` (where VTI steers the picture)."""
    return Site("vision_mlp_out", layer)


def vision_attn_raw(layer: int) -> Site:
    """Output of the attention module of vision layer `layer`, before any scale that follows it."""
    return Site("vision_attn_raw", layer)


def vision_mlp_raw(layer: int) -> Site:
    """Output of the MLP module of vision layer `layer`, before any scale that follows it."""
    return Site("vision_mlp_raw", layer)


def projector() -> Site:
    """Output of the projector: the picture as the language model receives it."""
    return Site("projector")
