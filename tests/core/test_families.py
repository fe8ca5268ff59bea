"""Every family on every framework that hosts it: the same as plain torch hooks on a second copy, to the last bit.

Prefill, cached greedy decoding and reads, on a left-padded batch of three prompts with pictures of three sizes. A
family counts as supported when this passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import _zoo
import pytest
import torch
from _tiny import Recorder, hook_plainly
from torch import Tensor, nn

import steer_plugin as sp

FAMILIES = sorted(_zoo.FAMILIES)
KINDS = ("resid_pre", "attn_raw", "attn_out", "mlp_raw", "mlp_out", "resid_post")
# Where things are, written down from the models' own source.
DECODER = {name: "model.text_model" if name in ("idefics3", "smolvlm") else "model.language_model" for name in FAMILIES}
POST_NORM = ("gemma3", "paligemma2")
VISION = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "gemma3", "paligemma", "paligemma2"), "encoder.layers"),
    "mistral3": "transformer.layers", "internvl": "encoder.layer",
}  # fmt: skip
WHOLE_VISION = {
    **{name: f"model.vision_tower.{path}" for name, path in VISION.items()},
    **{name: "model.visual.blocks" for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    **{name: "model.vision_model.encoder.layers" for name in ("idefics3", "smolvlm")},
    "mllama": "model.vision_model.transformer.layers",
}
PROJECTOR = {
    **{name: "model.multi_modal_projector" for name in (*VISION, "mllama")},
    **{name: "model.visual.merger" for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    **{name: "model.connector" for name in ("idefics3", "smolvlm")},
}
LAYER = 2  # a self-attention layer in all of them; layer 1 of Mllama attends to the picture

Act = Callable[[Tensor], Tensor | None]


def module_of(name: str, kind: str, layer: int = LAYER) -> tuple[str, bool]:
    """Module of a site in the plain model, and whether the site is its input."""
    if kind == "projector":
        return PROJECTOR[name], False
    bare = kind.removeprefix("vision_")
    path = f"{WHOLE_VISION[name] if kind != bare else DECODER[name] + '.layers'}.{layer}"
    if bare.startswith("resid"):
        return path, bare == "resid_pre"
    if kind != bare:
        attention, mlp = {
            "mistral3": ("attention", "feed_forward"), "internvl": ("attention", "mlp"), "qwen2_vl": ("attn", "mlp"),
            "qwen2_5_vl": ("attn", "mlp"), "qwen3_vl": ("attn", "mlp"),
        }.get(name, ("self_attn", "mlp"))  # fmt: skip
    elif name in POST_NORM and bare.endswith("out"):
        attention, mlp = "post_attention_layernorm", "post_feedforward_layernorm"
    else:
        attention, mlp = "cross_attn" if name == "mllama" and layer == 1 else "self_attn", "mlp"
    return f"{path}.{attention if bare.startswith('attn') else mlp}", False


@contextmanager
def plain(model: nn.Module, name: str, kind: str, act: Act, layer: int = LAYER) -> Iterator[None]:
    """Hook one site with torch alone."""
    path, entering = module_of(name, kind, layer)
    handle = hook_plainly(model.get_submodule(path), entering, act)
    try:
        yield
    finally:
        handle.remove()


def vector(width: int, seed: int = 0) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def steered_by_hand(name: str, kind: str, where: str, new: int, layer: int = LAYER) -> tuple[Tensor, list[Tensor]]:
    """Greedy tokens and the scores of each step with a vector added by a plain hook."""
    model, inputs, added = _zoo.tiny(name), _zoo.inputs_of(name), vector(_zoo.D) * 3
    mask = inputs["attention_mask"].bool()
    if where == "last_prompt|generated":
        mask = torch.zeros_like(mask)
        mask[:, -1] = True

    def act(hidden: Tensor) -> Tensor:
        if hidden.shape[1] == 1:
            return hidden + added
        return torch.where(mask[..., None], hidden + added, hidden)

    kept = Recorder()
    with plain(model, name, kind, act, layer), torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False, logits_processor=[kept])
    return ids, kept.scores


def attached(name: str, framework: str) -> sp.AttachedModel:
    """A fresh copy; TransformerLens takes a second to wrap one, so its bridge serves all tests of a process."""
    return bridged(name) if framework == "transformer_lens" else fresh(name, framework)


@cache
def bridged(name: str) -> sp.AttachedModel:
    return fresh(name, "transformer_lens")


def fresh(name: str, framework: str) -> sp.AttachedModel:
    model, processor = _zoo.tiny(name), _zoo.processor_of(name)
    if framework == "nnsight":
        from nnsight import NNsight

        return sp.attach(NNsight(model), processor)
    return sp.attach(model, processor, framework=framework)


FRAMEWORKS = ("torch", "nnsight", "transformer_lens")
HOSTED = [(name, framework) for framework in FRAMEWORKS for name in FAMILIES]


@pytest.mark.parametrize(("name", "framework"), HOSTED)
@pytest.mark.parametrize("kind", ["resid_post", "attn_out", "mlp_out"])
def test_generation_equals_plain_hooks(name: str, framework: str, kind: str):
    """Prefill and four cached steps, on the paper's positions."""
    vlm, inputs = attached(name, framework), _zoo.inputs_of(name)
    steering = sp.MeanSteering(vector(_zoo.D), site=sp.Site(kind, LAYER), alpha=3.0)
    expected, scores = steered_by_hand(name, kind, "last_prompt|generated", 5)
    kept = Recorder()
    got = vlm.generate(**inputs, steering=steering, max_new_tokens=5, do_sample=False, logits_processor=[kept])
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(kept.scores, scores, strict=True))
    assert vlm.counts == [[1 + 4] * 3]
    unsteered = vlm.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert not torch.equal(unsteered, expected)
    with torch.no_grad():
        assert torch.equal(unsteered, _zoo.tiny(name).generate(**inputs, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize(("name", "framework"), HOSTED)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_and_writes_are_those_of_the_module(name: str, framework: str, kind: str):
    """A read shows the very tensor; a write everywhere changes the scores as a hook does."""
    vlm, inputs = attached(name, framework), _zoo.inputs_of(name)
    seen: list[Tensor] = []
    other = _zoo.tiny(name)
    with plain(other, name, kind, lambda h: seen.append(h.clone())), torch.no_grad():
        other.generate(**inputs, max_new_tokens=1, do_sample=False)
    got = vlm.cache(inputs, sp.Site(kind, LAYER))
    real = inputs["attention_mask"].bool()
    assert torch.equal(got[sp.Site(kind, LAYER)][got.mask], seen[0][real])
    expected, scores = steered_by_hand(name, kind, "everywhere", 3)
    kept = Recorder()
    steering = sp.MeanSteering(vector(_zoo.D), site=sp.Site(kind, LAYER), alpha=3.0, positions="everywhere")
    tokens = vlm.generate(**inputs, steering=steering, max_new_tokens=3, do_sample=False, logits_processor=[kept])
    assert torch.equal(tokens, expected)
    for ours, theirs in zip(kept.scores, scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_added_is_attn_out_and_mlp_out(name: str):
    """resid_post = resid_pre + attn_out + mlp_out at every layer; Mllama's cross-attention layers say why not."""
    vlm, inputs = attached(name, "torch"), _zoo.inputs_of(name)
    for layer in range(_zoo.LAYERS):
        sites = [sp.Site(kind, layer) for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        if name == "mllama" and layer == 1:
            with pytest.raises(sp.SiteError, match=r"cross-attention layer.*attn_raw\.1"):
                vlm.cache(inputs, sites)
            continue
        got = vlm.cache(inputs, sites)
        before, attention, mlp, after = (got[site][got.mask] for site in sites)
        torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_are_those_of_single_prompts(name: str):
    """Padding and the other rows change nothing, at resid_post of the last layer and in the answer."""
    vlm = attached(name, "torch")
    prompts, pictures = _zoo.texts_and_pictures()
    batch = vlm.inputs(prompts, pictures)
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        key: tuple(value.shape) for key, value in _zoo.inputs_of(name).items()
    }
    site = sp.resid_post(-1)
    steering = sp.MeanSteering(vector(_zoo.D), site=sp.attn_out(LAYER), alpha=3.0)
    whole = vlm.cache(batch, site, "last_prompt", steering=steering)
    said = vlm.generate(**batch, steering=steering, max_new_tokens=4, do_sample=False)[:, -4:]
    for row, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        one = vlm.inputs([prompt], [picture])
        alone = vlm.cache(one, site, "last_prompt", steering=steering)
        torch.testing.assert_close(alone[site][0], whole[site][row], rtol=1e-4, atol=1e-4)
        assert torch.equal(vlm.generate(**one, steering=steering, max_new_tokens=4, do_sample=False)[0, -4:], said[row])


@pytest.mark.parametrize("name", FAMILIES)
def test_with_cache_equals_without(name: str):
    vlm, inputs = attached(name, "torch"), _zoo.inputs_of(name)
    steering = sp.MeanSteering(vector(_zoo.D), site=sp.resid_post(LAYER), alpha=3.0)
    cached, plainly = (
        vlm.generate(**inputs, steering=steering, max_new_tokens=4, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plainly)


VISION_KINDS = tuple(f"vision_{kind}" for kind in KINDS)


@pytest.mark.parametrize(("name", "framework"), HOSTED)
def test_vision_sites_and_the_projector(name: str, framework: str):
    """Every kind is the module's own tensor, and a write there changes the answer as a plain hook does."""
    vlm, inputs = attached(name, framework), _zoo.inputs_of(name)
    other = _zoo.tiny(name)
    for kind in (*VISION_KINDS, "projector"):
        site = sp.projector() if kind == "projector" else sp.Site(kind, 1)
        if name == "internvl" and kind in ("vision_attn_out", "vision_mlp_out"):
            with pytest.raises(sp.SiteError, match=f"learned scale.*{kind.replace('out', 'raw')}"):
                vlm.cache(inputs, site)
            continue
        seen: list[Tensor] = []
        with plain(other, name, kind, lambda h, seen=seen: seen.append(h.clone()), 1), torch.no_grad():
            other.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert torch.equal(vlm.cache(inputs, site)[site].flatten(), seen[0].flatten())
        added = vector(seen[0].shape[-1]) * 5
        with plain(other, name, kind, lambda h, added=added: h + added, 1), torch.no_grad():
            kept = Recorder()
            expected = other.generate(**inputs, max_new_tokens=3, do_sample=False, logits_processor=[kept])
        ours = Recorder()
        steering = sp.MeanSteering(added, site=site, positions="everywhere")
        got = vlm.generate(**inputs, steering=steering, max_new_tokens=3, do_sample=False, logits_processor=[ours])
        assert torch.equal(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(ours.scores, kept.scores, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_vision_layer_reaches_the_answer_or_is_refused(name: str):
    """The layers behind the one whose features are taken (LLaVA-NeXT takes the last but one) are refused."""
    vlm, inputs = attached(name, "torch"), _zoo.inputs_of(name)
    with torch.no_grad():
        before = vlm.root(**inputs).logits
    for layer in range(vlm.parts.n_vision_layers):
        steering = sp.MeanSteering(vector(16) * 5, site=sp.vision_resid_post(layer), positions="everywhere")
        if name == "llava_next" and layer == 2:
            with pytest.raises(sp.SiteError, match="would change nothing"), vlm.steering(steering):
                pass
            continue
        with torch.no_grad(), vlm.steering(steering):
            assert not torch.equal(vlm.root(**inputs).logits, before)
