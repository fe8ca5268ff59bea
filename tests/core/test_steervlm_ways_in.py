"""SteerVLM in blocks that the user wrote, under gradients, checkpointing and lower precision, and on other families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _tiny import D_MODEL, LAYERS, tiny_inputs, tiny_llava, tiny_processor, with_position_ids
from torch import Tensor

import steer_plugin as sp

PAIRS = [("w20 w21 w22", "w30 w31"), ("w40", "w41 w42 w43 w44"), ("w50 w51", "w50 w51")]


def steervlm(d_model: int = D_MODEL, layers: int = LAYERS, seed: int = 3, **options: Any) -> sp.SteerVLM:
    made = sp.SteerVLM.new(sp.SteerVLMConfig(d_model, layers, reduction=2, heads=4, **options), seed)
    with torch.no_grad():
        made.module.steerer.up.weight.mul_(25)
    return made.pair(*zip(*PAIRS, strict=True))


STEER = steervlm()


def test_transformer_lens_hooks(bridge_vlm, inputs):
    expected = bridge_vlm.generate(**inputs, steering=STEER, max_new_tokens=5, do_sample=False)
    with bridge_vlm.bridge.hooks(fwd_hooks=STEER.hooks(bridge_vlm)):
        got = bridge_vlm.bridge.original_model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, expected)


def test_nnsight_trace_and_the_users_own_reads(nnsight_vlm, torch_vlm, inputs):
    """In a trace the twin runs apart, so the user's reads have the batch's own rows and tokens."""
    placed, model = with_position_ids(inputs), nnsight_vlm.model
    steering = STEER.with_positions("everywhere")
    expected = torch_vlm.cache(inputs, "resid_post.2", "last_prompt", steering=steering)[sp.resid_post(2)][:, 0]
    with torch_vlm.steering(steering):
        logits = torch_vlm.root(**placed).logits
    with model.trace() as tracer:
        with tracer.invoke(**placed):
            got = model.lm_head.output.save()
        with tracer.invoke():
            steering.apply(nnsight_vlm)
        with tracer.invoke():
            hidden = model.model.language_model.layers[2].output.save()
    assert hidden.shape == (3, inputs["input_ids"].shape[1], D_MODEL)
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden[:, -1], expected, rtol=1e-4, atol=1e-4)


def test_nnsight_generate_block(nnsight_vlm, inputs):
    expected = nnsight_vlm.generate(**inputs, steering=STEER, max_new_tokens=5, do_sample=False)
    model = nnsight_vlm.model
    with model.trace(fn=nnsight_vlm.root.generate) as tracer:
        with tracer.invoke(**inputs, max_new_tokens=5, do_sample=False):
            read = model.model.language_model.layers[0].output.save()
        with tracer.invoke():
            STEER.apply(nnsight_vlm, tracer)
        with tracer.invoke():
            ids = tracer.result.save()
    assert torch.equal(ids, expected)
    # The prompt ran once without a twin; what the block sees is the last token, steered rows in front.
    assert read.shape[:2] == (6, 1)


def test_pairs_are_read_in_the_middle_of_a_trace(nnsight_vlm, inputs):
    """Texts that are not known yet are read while the user's block is open, without spending a step of it."""
    expected = nnsight_vlm.cache(inputs, "resid_post.3", "last_prompt", steering=STEER)[sp.resid_post(3)][:, 0]
    nnsight_vlm.asides.clear()
    model = nnsight_vlm.model
    with model.trace(**with_position_ids(inputs)):
        STEER.apply(nnsight_vlm)
        hidden = model.model.language_model.layers[3].output.save()
    torch.testing.assert_close(hidden[:, -1], expected, rtol=1e-4, atol=1e-4)


def test_gradients_equal_those_of_plain_hooks(vlm, inputs):
    """Of the module's weights, through the frozen model; the twin gets none."""
    placed = with_position_ids(inputs)
    steering = steervlm()
    steering.module.requires_grad_(True)
    with vlm.steering(steering) as steered:
        call = vlm.root if vlm.framework == "transformer_lens" else steered
        loss = call(**placed).logits[:, -1].float().logsumexp(-1).sum()
        loss.backward()
    grads = {name: p.grad for name, p in steering.module.named_parameters()}
    assert all(grad is not None for grad in grads.values())

    other = steervlm()
    other.module.requires_grad_(True)
    plain = sp.attach(tiny_llava(), tiny_processor())
    u: dict[int, Tensor] = {}
    memory = []
    layers = plain.root.model.language_model.layers

    def text(words: str) -> list[Tensor]:
        ids = torch.tensor([plain.processor.tokenizer(f"USER: {words} ASSISTANT:")["input_ids"]])
        kept: list[Tensor] = []
        handles = [
            n.self_attn.register_forward_hook(lambda m, a, o: kept.append(o[0][0, 2:-1].detach())) for n in layers
        ]
        plain.root(input_ids=ids)
        for handle in handles:
            handle.remove()
        return kept

    for pair in PAIRS:
        sides = [text(words) for words in pair]
        memory.append(
            [
                other.module.remember(*(x for s in sides for x in (s[n][None], torch.ones(1, len(s[n])).bool())))
                for n in range(LAYERS)
            ]
        )
    handles = [
        layer.self_attn.register_forward_hook(lambda m, a, o, n=n: u.update({n: o[0].detach()}))
        for n, layer in enumerate(layers)
    ]
    plain.root(**placed)
    for handle in handles:
        handle.remove()

    def steer(o: Any, n: int) -> Any:
        last = torch.cat([other.module(o[0][r : r + 1, -1:], u[n][r : r + 1, -1:], memory[r][n])[2] for r in range(3)])
        return (torch.cat([o[0][:, :-1], o[0][:, -1:] + last], 1), *o[1:])

    for n, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda m, a, o, n=n: steer(o, n))
    loss = plain.root(**placed).logits[:, -1].float().logsumexp(-1).sum()
    loss.backward()
    for name, parameter in other.module.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=2e-3, atol=1e-4)


def test_gradient_checkpointing(torch_vlm):
    """The frozen model recomputes its layers in backward; the module's gradients are the same."""
    found = []
    for checkpointing in (False, True):
        vlm = sp.attach(tiny_llava(), tiny_processor())
        vlm.root.requires_grad_(False)
        if checkpointing:
            vlm.root.gradient_checkpointing_enable({"use_reentrant": False})
            vlm.root.train()
        steering = steervlm()
        steering.module.requires_grad_(True)
        with vlm.steering(steering):
            vlm.root(**with_position_ids(tiny_inputs(3))).logits[:, -1].float().logsumexp(-1).sum().backward()
        found.append({name: p.grad for name, p in steering.module.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


def test_a_cached_forward_with_gradients_goes_on_decoding(torch_vlm, inputs):
    """The prefix runs without gradients, the twin apart; feeding the cache back is decoding, with the same scores."""
    from transformers import DynamicCache

    placed = with_position_ids(inputs)
    frozen = [p for p in torch_vlm.root.parameters() if p.requires_grad]
    torch_vlm.root.requires_grad_(False)
    try:
        with torch_vlm.steering(STEER):
            whole = torch_vlm.root(**placed, use_cache=False).logits[:, -1]
            cache = DynamicCache()
            out = torch_vlm.root(**placed, past_key_values=cache)
            torch.testing.assert_close(out.logits[:, -1], whole, rtol=1e-4, atol=1e-4)
            token = whole.argmax(-1, keepdim=True)
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
            more = torch_vlm.root(
                input_ids=token, attention_mask=mask, position_ids=placed["position_ids"][:, -1:] + 1,
                past_key_values=cache,
            ).logits[:, -1]  # fmt: skip
            torch_vlm.root(**placed, use_cache=False)  # an uncached call, which the next one repeats with a token more
            longer = {"input_ids": torch.cat([placed["input_ids"], token], 1), "attention_mask": mask}
            again = torch_vlm.root(
                **with_position_ids(longer), pixel_values=inputs["pixel_values"], use_cache=False
            ).logits[:, -1]
        torch.testing.assert_close(more, again, rtol=1e-4, atol=1e-4)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_lower_precision(dtype: torch.dtype, inputs):
    vlm = sp.attach(tiny_llava().to(dtype), tiny_processor())
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    out = vlm.generate(**batch, steering=STEER, max_new_tokens=4, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    found = vlm.cache(batch, "attn_out.1", "last_prompt", steering=STEER)[sp.attn_out(1)]
    assert found.dtype == dtype
    assert STEER.module.steerer.down.weight.dtype == torch.float32


def test_pairs_behind_the_pictures(vlm, plain, inputs):
    """picture="input": p+ is read as tokens that follow the prompt's picture."""
    steering = steervlm(picture="input")
    got: list[Tensor] = []
    real = steering.module.remember

    def spy(plus: Tensor, *others: Tensor) -> Any:
        got.append(plus.clone())
        return real(plus, *others)

    steering.module.remember = spy  # type: ignore[method-assign]
    vlm.generate(**inputs, steering=steering, max_new_tokens=3, do_sample=False)
    row = 1
    start = int(inputs["attention_mask"][row].argmax())
    ids = [*inputs["input_ids"][row, start : start + 6].tolist(), 40]  # <s> USER: 4 x <image>, then "w40"
    kept: list[Tensor] = []
    handle = plain.model.language_model.layers[0].self_attn.register_forward_hook(
        lambda m, a, o: kept.append(o[0][0, -1].clone())
    )
    with torch.no_grad():
        plain(input_ids=torch.tensor([ids]), pixel_values=inputs["pixel_values"][row : row + 1])
    handle.remove()
    torch.testing.assert_close(got[0][row, -1], kept[0], rtol=1e-4, atol=1e-5)


def test_bad_pairs_before_any_work(torch_vlm, inputs):
    long = " ".join(["w20"] * 300)
    with pytest.raises(sp.InputError, match="the model's context holds 256"):
        torch_vlm.generate(**inputs, steering=steervlm().pair(long, "w7"), max_new_tokens=2)
    with pytest.raises(sp.InputError, match="2 prompt pairs do not fit a batch of 3 rows"):
        torch_vlm.generate(**inputs, steering=steervlm().pair(["w7", "w8"], ["w9", "w10"]), max_new_tokens=2)
    with pytest.raises(sp.InputError, match="2 prompt pairs do not fit a batch of 3 rows"):
        torch_vlm.generate(**inputs, steering=steervlm().pair(["w7", "w7"], ["w9", "w9"]), max_new_tokens=2)
    with pytest.raises(sp.ArtefactError, match="d_model 64"):
        torch_vlm.generate(**inputs, steering=steervlm(64), max_new_tokens=2)
    with pytest.raises(sp.ArtefactError, match="n_layers 3"):
        torch_vlm.generate(**inputs, steering=steervlm(layers=3), max_new_tokens=2)
    bare = sp.attach(tiny_llava())
    with pytest.raises(sp.InputError, match="with its processor"):
        bare.generate(**inputs, steering=steervlm(), max_new_tokens=2)


def test_the_vector_algebra_holds(torch_vlm, inputs):
    double = torch_vlm.cache(inputs, "attn_out.0", "last_prompt", steering=STEER * 2.0)[sp.attn_out(0)]
    once = torch_vlm.cache(inputs, "attn_out.0", "last_prompt", steering=STEER)[sp.attn_out(0)]
    none = torch_vlm.cache(inputs, "attn_out.0", "last_prompt")[sp.attn_out(0)]
    torch.testing.assert_close(double - none, 2 * (once - none), rtol=1e-4, atol=1e-4)
    nothing = torch_vlm.cache(inputs, "attn_out.0", "last_prompt", steering=STEER - STEER)[sp.attn_out(0)]
    torch.testing.assert_close(nothing, none, rtol=1e-4, atol=1e-4)


def test_several_data_invokes_are_refused():
    """nnsight tells invokes apart by the size of the batch, which riding twins double."""
    from nnsight import TransformersModel
    from PIL import Image

    model = TransformersModel(tiny_llava(), task="image-text-to-text", processor=tiny_processor())
    vlm = sp.attach(model)
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": Image.new("RGB", (16, 16))}, {"type": "text", "text": t}],
            }
        ]
        for t in ("w10 w11", "w12 w13")
    ]
    one = steervlm().pair("w20", "w21")
    with (
        pytest.raises(sp.FrameworkError, match="one invoke with inputs"),
        vlm.steering(one) as steered,
        steered.generate(max_new_tokens=3, do_sample=False) as tracer,
    ):
        with tracer.invoke(chats[0]):
            steered.model.language_model.layers[0].output.save()
        with tracer.invoke(chats[1]):
            steered.model.language_model.layers[0].output.save()


def test_hidden_states_asked_for_are_whole(torch_vlm, inputs):
    """A late read replays one token, SteerVLM shares its prefix, unless the caller wants every token's states."""
    kept: list[Tensor] = []

    def delta(hidden: Tensor, context: sp.Context) -> Tensor:
        kept.append(context.reads[0])
        return context.reads[0][:, None]

    reads = (sp.Read.at("resid_post.3", "last_prompt"),)
    late = sp.Intervention((sp.Write(sp.resid_post(1), sp.Positions.parse("paper"), delta, reads=reads),))
    for steering in (late, STEER):
        with torch_vlm.steering(steering) as steered:
            out = steered.generate(
                **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
            )
        assert {tuple(state.shape[:2]) for state in out.hidden_states[0]} == {(3, inputs["input_ids"].shape[1])}
