"""A VLM taken apart by its family's record: the modules, sizes and token ids that lowering needs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from steer_plugin.adapters._chat import header_tokens
from steer_plugin.adapters._weights import execution_device, sample, stored, stored_version
from steer_plugin.atomic import JSON
from steer_plugin.errors import ArtefactError, FamilyError, InputError, SiteError
from steer_plugin.families import family_of
from steer_plugin.family import End, Family
from steer_plugin.intervention import Intervention
from steer_plugin.layout import TokenLayout
from steer_plugin.positions import Positions
from steer_plugin.sites import Site

_PICTURE_KEYS = ("pixel_values", "mm_encoder_outputs", "image_features", "image_hidden_states")


@dataclass(frozen=True)
class ModelParts:
    """The Hugging Face root model, its text decoder, and what its config and processor say."""

    root: PreTrainedModel
    decoder: nn.Module
    embedding: str
    family: Family
    n_layers: int
    n_vision_layers: int
    d_model: int
    d_vision: int
    image_token_id: int | None
    headers: tuple[tuple[int, ...], ...] | None
    layer_kinds: tuple[str, ...]
    signature: inspect.Signature

    @classmethod
    def of(cls, root: nn.Module, processor: ProcessorMixin | None) -> ModelParts:
        """Take a root model apart.

        Raises:
            FamilyError: not a known vision-language model, or its modules are not where the family's record says.
        """
        if not isinstance(root, PreTrainedModel):
            raise FamilyError(f"expected a Hugging Face vision-language model, got {type(root).__name__}.")
        family = family_of(root.config)
        try:
            decoder = root.get_submodule(family.decoder)
            n_layers, n_vision = family.n_layers(root), family.n_vision_layers(root)
        except AttributeError as error:
            raise FamilyError(
                f"{type(root).__name__} is no {family.name!r} model as its record expects ({error}); attach the "
                "ForConditionalGeneration class, or register a family with the right module paths."
            ) from error
        config = root.config
        token = getattr(config, "image_token_id", None)
        vision = getattr(config, "vision_config", None)
        return cls(
            root=root,
            decoder=decoder,
            embedding=next(name for name, module in root.named_modules() if module is root.get_input_embeddings()),
            family=family,
            n_layers=n_layers,
            n_vision_layers=n_vision,
            d_model=int(config.get_text_config().hidden_size),
            d_vision=int(getattr(vision, family.vision_width or "hidden_size", 0)),
            image_token_id=None if token is None else int(token),
            headers=header_tokens(family, processor),
            layer_kinds=_layer_kinds(root, family),
            # nnsight wraps the instance's forward; the class still has the true signature.
            signature=inspect.signature(type(root).forward),
        )

    @property
    def last_vision_layer(self) -> int:
        """The vision layer whose output becomes the picture's features."""
        taken = getattr(self.root.config, "vision_feature_layer", None)
        several = [taken] if isinstance(taken, int) else cast("list[int]", taken or [])
        # hidden_states counts the embeddings as 0, so entry k is the output of layer k - 1.
        entries = [(k if k >= 0 else self.n_vision_layers + 1 + k) - 1 for k in several]
        return max(entries, default=self.n_vision_layers - 1)

    def point(self, site: Site) -> tuple[str, End]:
        """Return (module path, "input" or "output") of a resolved site.

        Raises:
            SiteError: this model has no such place.
        """
        cross = not site.in_vision and site.layer is not None and self.layer_kinds[site.layer] == "cross_attention"
        path, end = self.family.point(site, cross=cross)
        try:
            self.root.get_submodule(path)
        except AttributeError as error:
            raise SiteError(
                f"family {self.family.name!r} has no {str(site)!r} in this model: there is no module {path!r}. Write "
                "at another site, or register the family with the right module names."
            ) from error
        return path, end

    def resolve(self, site: Site) -> Site:
        """Return the site with a layer that this model has."""
        return site.resolve(self.n_layers, self.n_vision_layers)

    def width(self, site: Site) -> int:
        """Width of the tensor at a site."""
        return self.d_vision if site.in_vision and site.kind != "projector" else self.d_model

    def identity(self) -> dict[str, JSON]:
        """What an artefact remembers of the model that it was made for."""
        name = str(getattr(self.root.config, "_name_or_path", "") or "")
        return {"family": self.family.name, "name": Path(name).name, "d_model": self.d_model, "n_layers": self.n_layers}

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's device, also while accelerate keeps its weights elsewhere."""
        return execution_device(self.root.get_submodule(self.embedding)) or self.root.device

    def fingerprint(self) -> str:
        """Digest of a few numbers of each parameter: tells weights apart that share a name, without reading all.

        Offloading changes nothing about it; quantisation does.
        """
        digest = hashlib.sha256()
        for name, parameter in self.root.named_parameters():
            # TransformerLens puts its wrappers into the model itself; the weights are the same.
            digest.update(name.replace("._original_component", "").encode())
            weight = stored(self.root, name) if parameter.is_meta else parameter
            if weight is not None:
                digest.update(sample(weight))
        return digest.hexdigest()

    def version(self) -> tuple[int, int]:
        """Two numbers that change when a weight is changed or replaced; costs no look at the weights.

        A file of offloaded weights that is changed on disk goes unnoticed.
        """
        address, changes = 0, 0
        for name, parameter in self.root.named_parameters():
            if parameter.is_meta:  # accelerate makes another object at every forward
                own, count = stored_version(self.root, name)
                address, changes = address ^ own, changes + count
                continue
            address ^= hash((id(parameter), parameter.data_ptr()))
            changes += 0 if parameter.is_inference() else parameter._version
        return address, changes

    def check(self, intervention: Intervention) -> None:
        """Refuse, before any work, what this model cannot host.

        Raises:
            SiteError: layer out of range, or no such place in this family.
            InputError: a vector of another width.
            PositionError: text positions at a vision site.
        """
        for write in intervention.writes:
            made_for, here = write.made_for or {}, self.identity()
            for key in ("family", "d_model", "n_layers"):
                if key in made_for and made_for[key] != here[key]:
                    raise ArtefactError(
                        f"this steering was made for a model with {key} {made_for[key]!r}; the attached one has "
                        f"{here[key]!r}. Fit it again on this model."
                    )
            site = self.resolve(write.site)
            self.point(site)
            self.check_positions(site, write.positions)
            self._check_reaches(site)
            width = self.width(site)
            if write.width is not None and write.width != width:
                raise InputError(
                    f"steering vector of width {write.width} cannot be written at {site}: the model has {width} there. "
                    "Was it made for another model?"
                )
            for read in write.reads:
                if read.site.in_vision:
                    raise SiteError(
                        f"an intervention cannot read at {read.site}: generate encodes pictures before the forward "
                        "that is steered; read resid_pre(0) on 'image' instead."
                    )
                self.point(self.resolve(read.site))

    def _check_reaches(self, site: Site) -> None:
        """Vision layers behind the one whose features are taken change nothing."""
        last = self.last_vision_layer
        if site.in_vision and site.layer is not None and site.layer > last:
            raise SiteError(
                f"a write at {site} would change nothing: the features are the output of vision layer {last} "
                f"(vision_feature_layer); write at layer {last} or before."
            )

    def check_positions(self, site: Site, positions: Positions) -> None:
        """Vision sites know patches only: all of them.

        Raises:
            InputError: anything but "everywhere" or "image" there.
        """
        if site.in_vision and str(positions) not in ("everywhere", "image"):
            raise InputError(
                f"positions {str(positions)!r} mean nothing at {site}, whose tokens are picture patches; "
                "use positions='everywhere' there."
            )

    def bind(self, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
        """Name the arguments of a root forward."""
        bound = self.signature.bind_partial(self.root, *args, **kwargs)
        named = dict(bound.arguments)
        for extra in (p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD):
            named.update(cast("dict[str, object]", named.pop(extra, {})))
        return named

    def real_tokens(self, mask: object, rows: int, width: int, device: torch.device) -> Bool[Tensor, "row pos"]:
        """Read a 2-D attention mask; no mask means no padding.

        Raises:
            InputError: a mask of another shape.
        """
        if mask is None:
            return torch.ones(rows, width, dtype=torch.bool, device=device)
        if not isinstance(mask, Tensor) or tuple(mask.shape) != (rows, width):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"attention_mask must have shape {(rows, width)} (row, pos), got {shape}.")
        return mask.bool()

    def layout(
        self,
        input_ids: Int[Tensor, "row pos"] | None,
        real: Bool[Tensor, "row pos"],
        completion_tokens: int | Sequence[int] | None,
    ) -> TokenLayout:
        """Classify the tokens of a prompt."""
        return TokenLayout.of(input_ids, real, self.image_token_id, self.headers, completion_tokens)

    def check_pictures(self, input_ids: Tensor | None, named: Mapping[str, object]) -> None:
        """Refuse a picture prompt without a picture.

        Raises:
            InputError: image tokens, but nothing to fill them.
        """
        if input_ids is None or self.image_token_id is None or any(named.get(key) is not None for key in _PICTURE_KEYS):
            return
        count = int((input_ids == self.image_token_id).sum())
        if count:
            raise InputError(
                f"the prompt holds {count} image tokens but no image was given (pixel_values is missing); "
                "pass the processor's whole output."
            )


def _layer_kinds(root: PreTrainedModel, family: Family) -> tuple[str, ...]:
    """What each decoder layer attends to: "full_attention", "sliding_attention" or "cross_attention"."""
    layers = list(root.get_submodule(family.layers).children())
    named = cast("list[str] | None", getattr(root.config.get_text_config(), "layer_types", None))
    kinds = named if named is not None and len(named) == len(layers) else ["full_attention"] * len(layers)
    cross = family.cross_attention
    return tuple(
        "cross_attention" if cross is not None and hasattr(layer, cross) else kind
        for layer, kind in zip(layers, kinds, strict=True)
    )


Framework = Literal["nnsight", "transformer_lens", "torch"]
