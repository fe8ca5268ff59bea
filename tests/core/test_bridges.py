"""TransformerLens bridges of every family: the same as plain torch hooks on a second copy, to the last bit.

The model that becomes a bridge has never run before, as after `from_pretrained`: transformers has then put none of its
own hooks on the layers yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import _zoo
import pytest
import torch
from _tiny import draw, greedy
from torch import Tensor, nn

import steer_plugin as sp
from steer_plugin.adapters.transformer_lens import BridgeAttached, build_bridge
from steer_plugin.sites import DECODER_KINDS

FAMILIES = sorted(_zoo.FAMILIES)
OPAQUE = ("mistral3", "mllama")  # vision towers that the bridge wraps as a whole
LAYER = 2

Act = Callable[[sp.Site, Tensor], Tensor]


def fresh(name: str) -> Any:
    """The tiny model as a checkpoint gives it."""
    known = _zoo.tiny(name)
    model = type(known)(known.config).eval()
    model.load_state_dict(known.state_dict())
    model.generation_config = known.generation_config
    return model


@cache
def bridged(name: str) -> BridgeAttached:
    return sp.attach(build_bridge(fresh(name), _zoo.processor_of(name)))


@cache
def second(name: str) -> Any:
    return _zoo.tiny(name)


def places(name: str, *layers: int) -> list[sp.Site]:
    """All sites that this family has in these layers, in order of execution."""
    vlm, found = bridged(name), [sp.projector()]
    for layer in layers:
        found += [sp.Site(kind, layer) for kind in DECODER_KINDS if layer < vlm.n_layers]
        found += [sp.Site(f"vision_{kind}", layer) for kind in DECODER_KINDS if layer < vlm.parts.n_vision_layers]
    return sorted((site for site in found if exists(vlm, site)), key=lambda site: site.order)


def exists(vlm: BridgeAttached, site: sp.Site) -> bool:
    try:
        vlm.parts.point(site)
    except sp.SiteError:  # gated or scaled behind the module
        return False
    return True


@contextmanager
def plain(ends: Callable[[sp.Site], tuple[nn.Module, str]], sites: Sequence[sp.Site], act: Act) -> Iterator[None]:
    """Hook sites with torch alone."""
    with ExitStack() as stack:
        for site in reversed(sites):  # each in front of the one before
            module, end = ends(site)

            def pre(module: nn.Module, args: Any, kwargs: Any, site: sp.Site = site) -> Any:
                if args:
                    return (act(site, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": act(site, kwargs["hidden_states"])}

            def post(module: nn.Module, args: Any, out: Any, site: sp.Site = site) -> Any:
                return (act(site, out[0]), *out[1:]) if isinstance(out, tuple) else act(site, out)

            entering = end == "input"
            stack.callback(
                (
                    module.register_forward_pre_hook(pre, with_kwargs=True)
                    if entering
                    else module.register_forward_hook(post, prepend=True)
                ).remove
            )
        yield


def by_hand(name: str, sites: Sequence[sp.Site], act: Act) -> Any:
    """Hook sites of the second copy, at the modules that its record names (checked in test_families)."""
    model, parts = second(name), sp.attach(second(name)).parts

    def ends(site: sp.Site) -> tuple[nn.Module, str]:
        path, end = parts.point(site)
        return model.get_submodule(path), end

    return plain(ends, sites, act)


def writes(name: str, sites: tuple[sp.Site, ...]) -> dict[sp.Site, Tensor]:
    """A vector of its own for each site."""
    parts = bridged(name).parts
    widths = [parts.d_vision if site.kind.startswith("vision") else parts.d_model for site in sites]
    return {site: draw(width, seed=i, scale=2) for i, (site, width) in enumerate(zip(sites, widths, strict=True))}


def steering(name: str, sites: tuple[sp.Site, ...]) -> list[sp.Intervention]:
    return [sp.add(site, vector, "everywhere") for site, vector in writes(name, sites).items()]


@cache
def written_by_hand(name: str, sites: tuple[sp.Site, ...]) -> tuple[Tensor, Tensor]:
    """Logits of the prompt and five greedy tokens of the second copy."""
    inputs, added = _zoo.inputs_of(name), writes(name, sites)
    real = inputs["attention_mask"].bool()[..., None]

    def act(site: sp.Site, hidden: Tensor) -> Tensor:
        more = hidden + added[site]
        return more if site.in_vision or hidden.shape[1] == 1 else torch.where(real, more, hidden)

    with by_hand(name, sites, act), torch.no_grad():
        return second(name)(**inputs).logits, greedy(second(name), inputs)


def one_layer_of_each(name: str, *, hookable: bool = False) -> tuple[sp.Site, ...]:
    """All sites of a decoder layer and of a vision layer, and the projector; `hookable`: those with a HookPoint."""
    sites = [site for site in places(name, 0, LAYER) if site.layer != (LAYER if site.in_vision else 0)]
    return tuple(site for site in sites if not (hookable and name in OPAQUE and site.kind.startswith("vision")))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bridge_is_the_model(name: str):
    vlm, model, inputs = bridged(name), second(name), _zoo.inputs_of(name)
    with torch.no_grad():
        ours, theirs = (m(**inputs, output_hidden_states=True) for m in (vlm.root, model))
        assert torch.equal(ours.logits, theirs.logits)
        assert len(ours.hidden_states) == len(theirs.hidden_states)
        assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
        # TransformerLens counts positions from the mask by itself, where the model does not.
        if vlm.parts.family.positions != "own":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        ids, rest = inputs["input_ids"], {key: value for key, value in inputs.items() if key != "input_ids"}
        assert torch.equal(vlm.bridge(ids, **rest), model(**inputs).logits)
    assert torch.equal(greedy(vlm.root, _zoo.inputs_of(name)), greedy(model, _zoo.inputs_of(name)))


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_at_every_site_of_every_layer(name: str):
    vlm, inputs = bridged(name), _zoo.inputs_of(name)
    sites = places(name, *range(max(vlm.n_layers, vlm.parts.n_vision_layers)))
    ours: dict[sp.Site, Tensor] = {}
    theirs: dict[sp.Site, Tensor] = {}

    def keep(seen: dict[sp.Site, Tensor], site: sp.Site, hidden: Tensor) -> Tensor:
        assert site not in seen, f"{site} fires twice"
        seen[site] = hidden.clone()
        return hidden

    with by_hand(name, sites, partial(keep, theirs)), torch.no_grad():
        second(name)(**inputs)
    with plain(vlm.ends, sites, partial(keep, ours)), torch.no_grad():
        vlm.root(**inputs)
    assert len(sites) == len(ours) == len(theirs) > 4 * vlm.n_layers
    assert [str(site) for site in sites if not torch.equal(ours[site], theirs[site])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_writes_around_any_call(name: str):
    vlm, inputs, sites = bridged(name), _zoo.inputs_of(name), one_layer_of_each(name)
    logits, tokens = written_by_hand(name, sites)
    together = sum(steering(name, sites))
    with vlm.steering(together), torch.no_grad():
        assert torch.equal(vlm.root(**inputs).logits, logits)
    assert torch.equal(vlm.generate(**inputs, steering=together, max_new_tokens=5, do_sample=False), tokens)
    assert not torch.equal(tokens, greedy(second(name), inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_writes_in_the_users_own_hooks(name: str):
    vlm, inputs, sites = bridged(name), _zoo.inputs_of(name), one_layer_of_each(name, hookable=True)
    logits, tokens = written_by_hand(name, sites)
    with vlm.bridge.hooks(fwd_hooks=vlm.hooks(*steering(name, sites))), torch.no_grad():
        assert torch.equal(vlm.root(**inputs).logits, logits)
    with vlm.bridge.hooks(fwd_hooks=vlm.hooks(*steering(name, sites))):
        assert torch.equal(greedy(vlm.root, inputs), tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_vision_layer_whose_output_is_taken(name: str):
    """LLaVA, LLaVA-NeXT and OneVision take it from hidden_states, in front of the block's own hook_out."""
    vlm, inputs = bridged(name), _zoo.inputs_of(name)
    site = sp.vision_resid_post(vlm.parts.last_vision_layer)
    (write,), (logits, _) = steering(name, (site,)), written_by_hand(name, (site,))
    with vlm.steering(write), torch.no_grad():
        assert torch.equal(vlm.root(**inputs).logits, logits)
    if name.startswith("llava"):
        with pytest.raises(sp.SiteError, match=r"before hook_out of vision_resid_post.*vlm\.steering"):
            vlm.hooks(write)
    elif name not in OPAQUE:
        with vlm.bridge.hooks(fwd_hooks=vlm.hooks(write)), torch.no_grad():
            assert torch.equal(vlm.root(**inputs).logits, logits)


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_vision_towers_have_no_hook_points(name: str):
    vlm = bridged(name)
    with pytest.raises(sp.SiteError, match=rf"no hook point.*{name!r} as a whole.*vlm\.steering"):
        vlm.hooks(*steering(name, (sp.vision_mlp_raw(0),)))


def test_cross_attention_layers():
    vlm, inputs = bridged("mllama"), _zoo.inputs_of("mllama")
    assert [vlm.hook_name(sp.attn_raw(i)) for i in (0, 1)] == ["blocks.0.attn.hook_out", "blocks.1.cross_attn.hook_out"]
    sites = tuple(site for site in places("mllama", 1) if not site.in_vision)
    assert {site.kind for site in sites} == {"resid_pre", "attn_raw", "mlp_raw", "resid_post"}
    logits, tokens = written_by_hand("mllama", sites)
    with vlm.bridge.hooks(fwd_hooks=vlm.hooks(*steering("mllama", sites))), torch.no_grad():
        assert torch.equal(vlm.root(**inputs).logits, logits)
    together = sum(steering("mllama", sites))
    assert torch.equal(vlm.generate(**inputs, steering=together, max_new_tokens=5, do_sample=False), tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_hook_names_are_those_of_transformer_lens(name: str):
    vlm = bridged(name)
    behind = name in ("gemma3", "paligemma2")
    names = {
        "resid_pre": "hook_in", "attn_raw": "attn.hook_out", "attn_out": f"{'ln1_post' if behind else 'attn'}.hook_out",
        "mlp_raw": "mlp.hook_out", "mlp_out": f"{'ln2_post' if behind else 'mlp'}.hook_out", "resid_post": "hook_out",
    }  # fmt: skip
    for kind, hook in names.items():
        site = sp.Site(kind, LAYER)
        assert vlm.hook_name(site) == f"blocks.{LAYER}.{hook}"
        assert vlm.bridge.hook_dict[vlm.hook_name(site)] is vlm.hook_point(site)
    for alias in ("attn_out", "mlp_out"):
        assert vlm.bridge.hook_dict[f"blocks.{LAYER}.hook_{alias}"] is vlm.hook_point(sp.Site(alias, LAYER))
    assert vlm.hook_name(sp.projector()) == "vision_projector.hook_out"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl"])
def test_bridges_are_eager_throughout(name: str, attn: str):
    """TransformerLens leaves LLaVA-OneVision's kernels as they are, so that bfloat16 would differ by 0.1."""
    model, inputs = _zoo.tiny(name, attn).bfloat16(), _zoo.inputs_of(name)
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    vlm = sp.attach(build_bridge(model))
    with torch.no_grad():
        assert torch.equal(vlm.root(**inputs).logits, _zoo.tiny(name).bfloat16()(**inputs).logits)
