"""What takes more than one look, on every family: late reads (L2S) and twins (SteerVLM), against naive passes.

Tiles (LLaVA-NeXT), mRoPE (Qwen), deepstack (Qwen3-VL), masks made beforehand and caches that forget (Gemma 3), a prompt
that attends both ways (PaliGemma), cross-attention (Mllama).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import _zoo
import pytest
import torch
from _naive import naive_tokens
from test_families import DECODER, FAMILIES, POST_NORM, plain, vector
from torch import Tensor

import steer_plugin as sp
from steer_plugin import families

PAIRS = [("w20 w21 w22", "w30 w31"), ("w32", "w33 w34 w35 w36")]
MATRIX = torch.randn(_zoo.D, _zoo.D, generator=torch.Generator().manual_seed(11)) * 0.4


def net(context: Tensor) -> Tensor:
    return 4 * torch.tanh(context @ MATRIX)


def l2s(where: str) -> sp.Intervention:
    """A read behind its write: layer 3 decides what is added at layer 1."""

    def delta(hidden: Tensor, context: sp.Context) -> Tensor:
        return context.once("v", lambda: net(context.reads[0]))[:, None]

    read = sp.Read.at("resid_post.3", "last_prompt")
    return sp.Intervention((sp.Write(sp.resid_post(1), sp.Positions.parse(where), delta, 1.0, reads=(read,)),))


def l2s_by_hand(name: str, inputs: dict[str, Tensor], where: str) -> Tensor:
    """A whole unsteered prefill first, then generation with the vector added by a plain hook."""
    model, seen = _zoo.tiny(name), []
    with plain(model, name, "resid_post", lambda h: seen.append(h[:, -1].clone()), 3), torch.no_grad():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    added = net(seen[0])[:, None]
    real = inputs["attention_mask"].bool()
    last = torch.zeros_like(real)
    last[:, -1] = True
    mask = real if where == "everywhere" else last

    def act(hidden: Tensor) -> Tensor:
        return hidden + added if hidden.shape[1] == 1 else torch.where(mask[..., None], hidden + added, hidden)

    with plain(model, name, "resid_post", act, 1), torch.no_grad():
        return model.generate(**inputs, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("where", ["last_prompt|generated", "everywhere"])
@pytest.mark.parametrize("name", FAMILIES)
def test_late_reads_equal_a_pass_of_their_own(name: str, where: str):
    vlm, inputs = sp.attach(_zoo.tiny(name), _zoo.processor_of(name)), _zoo.inputs_of(name)
    expected = l2s_by_hand(name, inputs, where)
    assert torch.equal(vlm.generate(**inputs, steering=l2s(where), max_new_tokens=4, do_sample=False), expected)
    assert not torch.equal(vlm.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_replayed_token_costs_no_second_prefill(name: str):
    """Where the record says so, only one column runs again; elsewhere the whole prompt does."""
    vlm, inputs = sp.attach(_zoo.tiny(name), _zoo.processor_of(name)), _zoo.inputs_of(name)
    widths: list[int] = []
    site = vlm.root.get_submodule(f"{DECODER[name]}.layers.0")
    handle = site.register_forward_hook(lambda m, a, out: widths.append(out.shape[1]))
    vlm.generate(**inputs, steering=l2s("paper"), max_new_tokens=2, do_sample=False)
    handle.remove()
    whole = inputs["input_ids"].shape[1]
    exact = name not in ("gemma3", "paligemma", "paligemma2", "mllama")
    assert widths == [whole, 1 if exact else whole, 1]


def steervlm() -> sp.SteerVLM:
    made = sp.SteerVLM.new(sp.SteerVLMConfig(_zoo.D, _zoo.LAYERS, reduction=2, heads=4), 3)
    with torch.no_grad():
        made.module.steerer.up.weight.mul_(40)
    return made


def spelled(name: str, text: str) -> tuple[list[int], slice]:
    """Token ids of a text in the family's chat, and which of them are its own."""
    processor = _zoo.processor_of(name)
    tokenizer, whole = processor.tokenizer, _zoo.chat(processor, text, 0)
    more = {"add_special_tokens": False} if whole.startswith(tokenizer.bos_token) else {}
    ids = tokenizer(whole, **more)["input_ids"]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = next(i for i in range(len(ids)) if ids[i : i + len(own)] == own)
    return ids, slice(begin, begin + len(own))


@pytest.mark.parametrize("where", ["last_prompt|generated", "everywhere"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mllama"])
def test_twins_equal_the_naive_two_passes(name: str, where: str):
    model, processor, made = _zoo.tiny(name), _zoo.processor_of(name), steervlm()
    vlm = sp.attach(model, processor)
    prompts, pictures = _zoo.texts_and_pictures(2)
    inputs = vlm.inputs(prompts, pictures)
    steering = made.pair(*zip(*PAIRS, strict=True)).with_positions(where)
    got = vlm.generate(**inputs, steering=steering, max_new_tokens=4, do_sample=False)
    never = range(processor.tokenizer.convert_tokens_to_ids("w0"))
    part = "post_attention_layernorm" if name in POST_NORM else "self_attn"
    for row, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        one = vlm.inputs([prompt], [picture])
        said = naive_tokens(
            _zoo.tiny(name), DECODER[name], f"{DECODER[name]}.layers", made.module,
            [spelled(name, text) for text in PAIRS[row]], one, where, 4, list(never), part,
        )  # fmt: skip
        assert got[row, -4:].tolist() == said
    assert not torch.equal(got, vlm.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_steervlm_says_which_layers_of_mllama_it_cannot_steer():
    vlm = sp.attach(_zoo.tiny("mllama"), _zoo.processor_of("mllama"))
    with pytest.raises(
        sp.SiteError, match=r"layer 1 of this 'mllama' model is a cross-attention layer.*resid_post\(1\)"
    ):
        vlm.generate(**_zoo.inputs_of("mllama"), steering=steervlm().pair("w20", "w21"), max_new_tokens=2)


def test_pairs_behind_the_picture_are_refused_where_positions_are_the_models_own():
    config = sp.SteerVLMConfig(_zoo.D, _zoo.LAYERS, reduction=2, heads=4, picture="input")
    vlm = sp.attach(_zoo.tiny("qwen2_vl"), _zoo.processor_of("qwen2_vl"))
    with pytest.raises(sp.InputError, match=r"picture='input' cannot be read in family 'qwen2_vl'.*picture='none'"):
        vlm.generate(
            **_zoo.inputs_of("qwen2_vl"), steering=sp.SteerVLM.new(config).pair("w20", "w21"), max_new_tokens=2
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_and_sampling_follow_plain_hooks(name: str):
    vlm, inputs = sp.attach(_zoo.tiny(name), _zoo.processor_of(name)), _zoo.inputs_of(name)
    steering = sp.MeanSteering(vector(_zoo.D), site=sp.resid_post(2), alpha=3.0, positions="generated")

    def act(hidden: Tensor) -> Tensor | None:
        return hidden + 3.0 * vector(_zoo.D) if hidden.shape[1] == 1 else None

    other = _zoo.tiny(name)
    for options in ({"num_beams": 3}, {"do_sample": True}):
        torch.manual_seed(5)
        with plain(other, name, "resid_post", act), torch.no_grad():
            expected = other.generate(**inputs, max_new_tokens=4, **options)
        torch.manual_seed(5)
        assert torch.equal(vlm.generate(**inputs, steering=steering, max_new_tokens=4, **options), expected)


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(families._registry.by_type)
    yield
    families._registry.by_type = before


def test_a_family_of_the_users_own(registered: None):
    """A record with the least that it needs steers as the package's own does; wrong names are told before any work."""
    model, inputs = _zoo.tiny("qwen2_5_vl"), _zoo.inputs_of("qwen2_5_vl")
    own = sp.Family("mine", ("qwen2_5_vl",), "model.language_model", "model.language_model.layers", positions="own")
    steering = sp.MeanSteering(vector(_zoo.D), site=sp.attn_out(2), alpha=3.0)
    expected = sp.attach(_zoo.tiny("qwen2_5_vl")).generate(**inputs, steering=steering, max_new_tokens=3)
    sp.register_family(own)
    vlm = sp.attach(model)
    assert torch.equal(vlm.generate(**inputs, steering=steering, max_new_tokens=3), expected)
    with pytest.raises(sp.SiteError, match="names no vision layers"):
        vlm.cache(inputs, sp.vision_resid_post(0))
    sp.register_family(dataclasses.replace(own, attention="attn"))
    with pytest.raises(sp.SiteError, match=r"has no 'attn_out\.2' in this model.*layers\.2\.attn'"):
        sp.attach(_zoo.tiny("qwen2_5_vl")).generate(**inputs, steering=steering, max_new_tokens=3)
