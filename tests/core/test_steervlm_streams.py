"""SteerVLM's streams: twins, replay and pairs equal the naive two passes, token by token, whatever the way in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _tiny import D_MODEL, IMAGE, LAYERS, Recorder, greedy, hand_masks, hook_count, plain_hooks, single_row
from torch import Tensor

import steer_plugin as sp

PAIRS = [("w20 w21 w22", "w30 w31"), ("w40", "w41 w42 w43 w44"), ("w50 w51", "w50 w51")]


def steervlm(seed: int = 3, **options: Any) -> sp.SteerVLM:
    """Build a module that is strong enough to change what is said."""
    made = sp.SteerVLM.new(sp.SteerVLMConfig(D_MODEL, LAYERS, reduction=2, heads=4, **options), seed)
    with torch.no_grad():
        made.module.steerer.up.weight.mul_(25)
    return made


STEER = steervlm()


class Naive:
    """The paper's way: for every token an unsteered pass over everything, then a steered one; no cache, no twins."""

    def __init__(
        self, plain: Any, vlm: Any, made: sp.SteerVLM, pairs: list[tuple[str, str]], extra: Any = None
    ) -> None:
        self.plain, self.made, self.extra = plain, made, extra
        sides = [[self.read(vlm, pair[side]) for pair in pairs] for side in (0, 1)]
        self.memory = [
            [
                made.module.remember(
                    *(
                        part
                        for side in sides
                        for part in (side[row][layer][None], torch.ones(1, len(side[row][0])).bool())
                    )
                )
                for layer in range(LAYERS)
            ]
            for row in range(len(pairs))
        ]

    def read(self, vlm: Any, text: str) -> list[Tensor]:
        """attn_out of the text's own tokens in the chat template "<s> USER: text ASSISTANT:"."""
        tokenizer = vlm.processor.tokenizer
        ids = torch.tensor([tokenizer(f"USER: {text} ASSISTANT:")["input_ids"]])
        kept: list[Tensor] = []
        sites = [("attn_out", layer, lambda h: kept.append(h[0, 2:-1].clone())) for layer in range(LAYERS)]
        with plain_hooks(self.plain, *sites), torch.no_grad():
            self.plain(input_ids=ids)
        return kept

    def logits(self, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
        """Logits of one row; `mask` says which tokens are steered."""
        u: dict[int, Tensor] = {}
        with torch.no_grad():
            record = [("attn_out", n, lambda h, n=n: u.update({n: h.clone()})) for n in range(LAYERS)]
            with plain_hooks(self.plain, *record):
                self.plain(**inputs)

            def steer(h: Tensor, layer: int) -> Tensor:
                change = self.made.module(h, u[layer], self.memory[self.row][layer])[2]
                return torch.where(mask[..., None], h + change, h)

            sites = [("attn_out", n, lambda h, n=n: steer(h, n)) for n in range(LAYERS)]
            if self.extra:
                (kind, layer), vector = self.extra[0].split("."), self.extra[1]
                image = inputs["input_ids"] == IMAGE
                sites.append((kind, int(layer), lambda h: torch.where((mask | image)[..., None], h + vector, h)))
            with plain_hooks(self.plain, *sites):
                return self.plain(**inputs).logits

    def generate(self, inputs: dict[str, Tensor], row: int, where: str, new: int) -> list[int]:
        self.row = row if len(self.memory) > 1 else 0
        one = single_row(inputs, row)
        prompt, decoding = hand_masks(one)[where]
        said: list[int] = []
        for _ in range(new):
            mask = torch.cat([prompt, torch.full((1, len(said)), decoding)], 1)
            scores = self.logits(one, mask)[0, -1]
            scores[[0, IMAGE]] = -torch.inf
            said.append(int(scores.argmax()))
            one["input_ids"] = torch.cat([one["input_ids"], torch.tensor([[said[-1]]])], 1)
            one["attention_mask"] = torch.ones_like(one["input_ids"])
        return said


@pytest.mark.parametrize("where", ["last_prompt|generated", "generated", "everywhere", "image", "text"])
@pytest.mark.parametrize("cached", [True, False])
def test_equals_the_naive_two_passes(vlm, plain, inputs, where: str, cached: bool):
    steering = STEER.pair(*zip(*PAIRS, strict=True)).with_positions(where)
    naive = Naive(plain, vlm, STEER, PAIRS)
    expected = [naive.generate(inputs, row, where, 6) for row in range(3)]
    got = vlm.generate(**inputs, steering=steering, max_new_tokens=6, do_sample=False, use_cache=cached)
    assert got[:, -6:].tolist() == expected
    assert got.tolist() != greedy(plain, inputs, 6).tolist()


def bound(where: str = "paper", alpha: Any = 1.0, rows: int = 3) -> sp.SteerVLM:
    return STEER.pair(*zip(*PAIRS[:rows], strict=True)).with_positions(where).with_alpha(alpha)


@pytest.mark.parametrize("where", ["last_prompt|generated", "everywhere"])
def test_lambda_by_row_and_rows_by_themselves(vlm, inputs, where: str):
    alpha = torch.tensor([0.5, 0.0, 1.5])
    got = vlm.generate(**inputs, steering=bound(where, alpha), max_new_tokens=6, do_sample=False)
    for row, (plus, minus) in enumerate(PAIRS):
        one = STEER.pair(plus, minus).with_positions(where).with_alpha(float(alpha[row]))
        alone = vlm.generate(**single_row(inputs, row), steering=one, max_new_tokens=6, do_sample=False)
        assert got[row, -6:].tolist() == alone[0, -6:].tolist()


@pytest.mark.parametrize("where,rows", [("paper", 6), ("generated", 6), ("last_prompt", 3), ("prompt", 3)])
def test_twins_ride_only_where_they_are_needed(torch_vlm, plain, inputs, where: str, rows: int):
    """Rows of the layers while decoding; the head never sees a twin."""
    seen: dict[str, list[int]] = {"layer": [], "head": []}
    root = torch_vlm.root
    handles = [
        module.register_forward_hook(
            lambda m, a, o, name=name: seen[name].append((o if torch.is_tensor(o) else o[0]).shape[0])
        )
        for name, module in (("layer", root.model.language_model.layers[3]), ("head", root.lm_head))
    ]
    try:
        got = torch_vlm.generate(**inputs, steering=bound(where), max_new_tokens=4, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    assert seen["layer"][-3:] == [rows] * 3
    assert set(seen["head"]) == {3}
    if where in ("last_prompt", "prompt"):
        naive = Naive(plain, torch_vlm, STEER, PAIRS)
        assert got[:, -4:].tolist() == [naive.generate(inputs, row, where, 4) for row in range(3)]


def test_row_of_lambda_0_is_untouched_to_the_bit(vlm, inputs):
    recorder, other = Recorder(), Recorder()
    vlm.generate(
        **inputs,
        steering=bound("everywhere", torch.tensor([0.0, 1.0, 1.0])),
        max_new_tokens=1,
        logits_processor=[recorder],
    )
    # The same rows with as many twins, none of them written.
    vlm.generate(
        **inputs,
        steering=bound("everywhere", torch.tensor([1e-30, 1.0, 1.0])),
        max_new_tokens=1,
        logits_processor=[other],
    )
    assert torch.equal(recorder.scores[0][0], other.scores[0][0])
    unsteered = Recorder()
    vlm.generate(**inputs, max_new_tokens=1, logits_processor=[unsteered])
    assert not torch.allclose(recorder.scores[0][1], unsteered.scores[0][1])


@pytest.mark.parametrize("where", ["last_prompt|generated", "generated", "everywhere"])
@pytest.mark.parametrize("beams", [2, 3])
def test_beams_equal_beams_without_a_cache(vlm, inputs, where: str, beams: int):
    options = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False, "num_return_sequences": 2}
    got = vlm.generate(**inputs, steering=bound(where), **options)
    assert torch.equal(got, vlm.generate(**inputs, steering=bound(where), use_cache=False, **options))
    assert not torch.equal(got, vlm.generate(**inputs, **options))


def test_sampling_repeats_from_its_seed(vlm, inputs):
    def sampled() -> Tensor:
        torch.manual_seed(7)
        return vlm.generate(**inputs, steering=bound(), max_new_tokens=6, do_sample=True, num_return_sequences=2)

    first = sampled()
    assert torch.equal(first, sampled())
    assert first.shape[0] == 6


def test_alpha_0_and_no_pair(vlm, plain, inputs):
    assert torch.equal(
        vlm.generate(**inputs, steering=bound() * 0.0, max_new_tokens=4, do_sample=False), greedy(plain, inputs, 4)
    )
    with pytest.raises(sp.InputError, match="needs its prompt pair"):
        vlm.generate(**inputs, steering=STEER, max_new_tokens=4)


def test_composes_with_other_steering(vlm, plain, inputs):
    """u stays unsteered, x has whatever was written before: the naive two passes with one more write in the second."""
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
    for site in ("resid_post.0", "resid_post.2"):
        added = sp.add(site, vector, "image|last_prompt|generated")
        both = vlm.generate(**inputs, steering=bound() + added, max_new_tokens=6, do_sample=False)
        naive = Naive(plain, vlm, STEER, PAIRS, extra=(site, vector))
        assert both[:, -6:].tolist() == [naive.generate(inputs, row, "last_prompt|generated", 6) for row in range(3)]
        with vlm.steering(added):
            nested = vlm.generate(**inputs, steering=bound(), max_new_tokens=6, do_sample=False)
        assert torch.equal(both, nested)


def test_composes_with_a_late_read(vlm, inputs):
    """A context pass omits its own write only, so what is read late has seen SteerVLM's write."""
    kept: list[Tensor] = []

    def delta(hidden: Tensor, context: sp.Context) -> Tensor:
        kept.append(context.reads[0].clone())
        return context.reads[0][:, None] * 0.5

    late = sp.Write(
        sp.Site.parse("resid_post.1"),
        sp.Positions.parse("paper"),
        delta,
        reads=(sp.Read.at("resid_post.3", "last_prompt"),),
    )
    vlm.generate(**inputs, steering=bound() + sp.Intervention((late,)), max_new_tokens=4, do_sample=False)
    seen = vlm.cache(inputs, "resid_post.3", "last_prompt", steering=bound())[sp.resid_post(3)][:, 0]
    torch.testing.assert_close(kept[0], seen, rtol=1e-4, atol=1e-5)


def test_what_is_cached_and_counted(vlm, plain, inputs):
    """`vlm.cache` sees the user's rows alone, and the number of steered tokens is the number asked for."""
    found = vlm.cache(inputs, "attn_out.1", steering=bound())[sp.attn_out(1)]
    assert found.shape[0] == 3
    vlm.generate(**inputs, steering=bound(), max_new_tokens=5, do_sample=False)
    assert vlm.counts == [[5, 5, 5]] * LAYERS


def test_pairs_are_read_once_and_dropped_with_the_weights(vlm, inputs):
    reads: list[int] = []
    embedding = vlm.root.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda m, a, out: reads.append(out.shape[1]))
    try:
        vlm.asides.clear()
        for _ in range(2):
            vlm.generate(**inputs, steering=bound(), max_new_tokens=1, do_sample=False)
        texts = {text for pair in PAIRS for text in pair}
        assert len(vlm.asides) == len(texts)
        assert len([width for width in reads if width < inputs["input_ids"].shape[1]]) == len(texts)
        with torch.no_grad():
            vlm.root.get_parameter("lm_head.weight").add_(0.0)
        vlm.generate(**inputs, steering=bound(rows=3), max_new_tokens=1, do_sample=False)
        assert len([width for width in reads if width < inputs["input_ids"].shape[1]]) == 2 * len(texts)
    finally:
        handle.remove()


def test_pairs_kept_are_bounded(vlm, inputs):
    vlm.asides.clear()
    limit, vlm.asides.kept_bytes = vlm.asides.kept_bytes, 4 * LAYERS * D_MODEL * 3 * 2
    try:
        for word in range(20, 30):
            vlm.generate(**inputs, steering=STEER.pair(f"w{word} w1 w2", "w3"), max_new_tokens=1)
            assert vlm.asides.nbytes <= vlm.asides.kept_bytes
    finally:
        vlm.asides.kept_bytes = limit


def test_nothing_is_left_behind(vlm, plain, inputs):
    """After an exception in a layer, and in the caches that a user keeps."""
    hooks = hook_count(vlm.root)

    class Stop(Exception):
        pass

    def fail(module: Any, args: Any, output: Any) -> None:
        raise Stop("stopped on purpose")

    layer = vlm.root.get_submodule("model.language_model.layers.2")
    handle = layer.register_forward_hook(fail)
    with pytest.raises(Exception, match="stopped on purpose"):
        vlm.generate(**inputs, steering=bound(), max_new_tokens=4)
    handle.remove()
    assert hook_count(vlm.root) == hooks
    assert torch.equal(vlm.generate(**inputs, max_new_tokens=4, do_sample=False), greedy(plain, inputs, 4))


def test_a_kept_cache_has_its_own_rows(torch_vlm, inputs):
    with torch_vlm.steering(bound()) as steered:
        out = steered.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    assert {layer.keys.shape[0] for layer in cache.layers} == {3}
    assert "reorder_cache" not in vars(cache)


def test_hidden_states_of_generate_have_the_users_rows(torch_vlm, inputs):
    with torch_vlm.steering(bound()) as steered:
        out = steered.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
        )
    assert {state.shape[0] for step in out.hidden_states for state in step} == {3}
