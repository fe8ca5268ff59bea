"""What steering costs: against plain hooks on a second model, against generation itself, and by hand."""

from __future__ import annotations

import math
from typing import Any

import _zoo
import pytest
import torch
from _steerings import attached, steerings
from _tiny import (
    ADAPTERS,
    EOS,
    IMAGE,
    PAD,
    VOCAB,
    Recorder,
    draw,
    plain_hooks,
    single_row,
    tiny_inputs,
    tiny_llava,
    tiny_processor,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steer_plugin as sp
from steer_plugin.errors import InputError, PositionError
from steer_plugin.evaluation.costs import (
    ForcedCosts,
    answer_tokens,
    distinct_n,
    empty_rate,
    eos_tokens,
    forced,
    forced_costs,
    forced_logits,
    kl_per_row,
    nll_per_row,
    perplexity,
    text_costs,
    unfinished_rate,
)

INPUTS = tiny_inputs(3)
ANSWERS = [[11, 12, 13, 14], [21], [31, 32, EOS]]
VECTOR = draw(32, scale=2.0)


def torch_vlm() -> Any:
    return ADAPTERS["torch"](tiny_processor())


def by_hand(row: int, steered: bool) -> Tensor:
    """Log-probabilities (answer token, vocab) of one row of a second model, without padding, by plain hooks."""
    hf, one, answer = tiny_llava(), single_row(INPUTS, row), torch.tensor([ANSWERS[row]])
    ids = torch.cat([one["input_ids"], answer], 1)
    width = answer.shape[1]

    def add(hidden: Tensor) -> Tensor:
        out = hidden.clone()
        out[:, -width - 1 :] += VECTOR  # the last prompt token, and the answer
        return out

    sites = [("resid_post", 1, add)] if steered else []
    with torch.no_grad(), plain_hooks(hf, *sites):
        logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=one["pixel_values"]).logits
    return logits[0, -width - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("framework", list(ADAPTERS))
def test_costs_are_those_of_plain_hooks(framework: str) -> None:
    vlm = ADAPTERS[framework](tiny_processor())
    found = forced_costs(vlm, INPUTS, ANSWERS, sp.add("resid_post.1", VECTOR, alpha=1.0))
    for row, answer in enumerate(ANSWERS):
        own, other = by_hand(row, True), by_hand(row, False)
        kl = (own.exp() * (own - other)).sum(-1).mean()
        chosen = torch.tensor(answer)[:, None]
        assert found.kl[row] == pytest.approx(float(kl), rel=1e-3) and kl > 0.01
        assert found.nll_steered[row] == pytest.approx(-float(own.gather(1, chosen).mean()), rel=1e-4)
        assert found.nll_unsteered[row] == pytest.approx(-float(other.gather(1, chosen).mean()), rel=1e-4)
    assert found.tokens == (4, 1, 3)
    total = sum(n * t for n, t in zip(found.nll_unsteered, found.tokens, strict=True))
    assert found.perplexity == pytest.approx(math.exp(total / 8))
    assert found.mean_kl == pytest.approx(sum(found.kl) / 3)


def test_strength_zero_costs_exactly_nothing() -> None:
    vlm = torch_vlm()
    for made in (sp.add("resid_post.1", VECTOR) * 0.0, sp.add("attn_out.2", VECTOR, "everywhere", alpha=0.0)):
        found = forced_costs(vlm, INPUTS, ANSWERS, made)
        assert found.kl == (0.0, 0.0, 0.0) and found.nll_steered == found.nll_unsteered
    # Only rows with a strength move.
    some = forced_costs(vlm, INPUTS, ANSWERS, sp.add("resid_post.1", VECTOR, alpha=torch.tensor([0.0, 1.0, 0.0])))
    assert (some.kl[0], some.kl[2]) == (0.0, 0.0) and some.kl[1] > 0


@pytest.mark.parametrize("name", list(steerings()))
def test_forced_logits_are_those_of_generation(name: str) -> None:
    """Reading a generated answer in one forward gives the logits that decided it, for steering of every kind."""
    vlm, steering, recorder = attached("torch", tiny_llava()), steerings()[name], Recorder()
    ids = vlm.generate(**INPUTS, steering=steering, max_new_tokens=5, do_sample=False, logits_processor=[recorder])
    answers = answer_tokens(vlm, INPUTS, ids)
    found = forced_logits(vlm, INPUTS, answers, steering)
    assert found.targets.tolist() == answers and bool(found.mask.all())
    scores = torch.stack(recorder.scores, 1)
    heard = [token for token in range(VOCAB) if token not in (PAD, IMAGE)]  # the others are suppressed in generation
    torch.testing.assert_close(found.logits[..., heard], scores[..., heard], rtol=1e-3, atol=1e-3)
    plain = forced_logits(vlm, INPUTS, answers)
    assert (plain.logits - found.logits).abs().max() > 0.1


@pytest.mark.parametrize("family", ["gemma3", "mllama", "paligemma", "qwen2_vl"])
def test_answers_of_different_lengths_in_other_families(family: str) -> None:
    """Inputs that hold more than ids and pixels: token types, cross-attention masks, positions of their own."""
    vlm, inputs, recorder = sp.attach(_zoo.tiny(family), _zoo.processor_of(family)), _zoo.inputs_of(family), Recorder()
    steering = sp.add("resid_post.1", draw(vlm.d_model))
    ids = vlm.generate(**inputs, steering=steering, max_new_tokens=4, do_sample=False, logits_processor=[recorder])
    answers = [row[:n] for row, n in zip(answer_tokens(vlm, inputs, ids), (4, 2, 3), strict=True)]
    found = forced_logits(vlm, inputs, answers, steering)
    scores = torch.stack(recorder.scores, 1)
    for row, answer in enumerate(answers):
        expected = scores[row, : len(answer)]
        heard = expected.isfinite()
        torch.testing.assert_close(found.logits[row, found.mask[row]][heard], expected[heard], rtol=1e-4, atol=1e-4)
        assert found.targets[row, found.mask[row]].tolist() == answer
    assert forced_costs(vlm, inputs, answers, steering * 0.0).kl == (0.0, 0.0, 0.0)


def test_reads_see_the_prompt_alone() -> None:
    network = steerings()["l2s"].network
    everywhere = sp.L2S(network, "resid_post.3", "resid_post.1", context="everywhere")
    vlm, recorder = attached("torch", tiny_llava()), Recorder()
    ids = vlm.generate(**INPUTS, steering=everywhere, max_new_tokens=4, do_sample=False, logits_processor=[recorder])
    found = forced_logits(vlm, INPUTS, answer_tokens(vlm, INPUTS, ids), everywhere)
    torch.testing.assert_close(found.logits[..., 8:], torch.stack(recorder.scores, 1)[..., 8:], rtol=1e-3, atol=1e-3)


def test_what_generation_feeds_back_is_the_completion() -> None:
    assert [str(w.positions) for w in forced(sp.add("resid_post.1", VECTOR)).writes] == [
        "last_prompt|generated|completion"
    ]


def test_an_outer_block_counts_for_both_sides() -> None:
    vlm, inner = torch_vlm(), sp.add("resid_post.2", VECTOR)
    with vlm.steering(sp.add("resid_post.1", VECTOR, "everywhere")) as steered:
        found = forced_costs(vlm, INPUTS, ANSWERS, inner)
        assert forced_costs(vlm, INPUTS, ANSWERS, inner * 0.0).kl == (0.0, 0.0, 0.0)
        steered(**INPUTS)
    both = forced_costs(vlm, INPUTS, ANSWERS, inner + sp.add("resid_post.1", VECTOR, "everywhere"))
    assert found.nll_steered == pytest.approx(both.nll_steered, rel=1e-4)
    assert found.nll_unsteered != pytest.approx(both.nll_unsteered, rel=1e-4)


def test_batches_join() -> None:
    vlm, steering = torch_vlm(), sp.add("resid_post.1", VECTOR)
    whole = forced_costs(vlm, INPUTS, ANSWERS, steering)
    parts = [forced_costs(vlm, single_row(INPUTS, k), [ANSWERS[k]], steering) for k in range(3)]
    joined = parts[0] + parts[1] + parts[2]
    assert joined.kl == pytest.approx(whole.kl, rel=1e-3) and joined.tokens == whole.tokens
    assert joined.perplexity == pytest.approx(whole.perplexity, rel=1e-4)
    assert isinstance(joined, ForcedCosts)


def test_answers_end_with_their_first_eos() -> None:
    vlm = torch_vlm()
    new = torch.tensor([[9, EOS, PAD, PAD], [EOS, 9, 9, 9], [9, 9, 9, 9]])
    ids = torch.cat([INPUTS["input_ids"], new], 1)
    assert (eos_tokens(vlm), answer_tokens(vlm, INPUTS, ids)) == ((), new.tolist())
    vlm.root.generation_config.eos_token_id = EOS
    assert eos_tokens(vlm) == (EOS,)
    assert answer_tokens(vlm, INPUTS, ids) == [[9, EOS], [EOS], [9, 9, 9, 9]]
    vlm.root.generation_config.eos_token_id = [EOS, 50]
    assert eos_tokens(vlm) == (EOS, 50)


# -- on logits -------------------------------------------------------------------------------------------------------


def logits_of(*rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows).log()


def test_kl_by_hand() -> None:
    first, second = logits_of([[0.5, 0.5], [0.9, 0.1]]), logits_of([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    both, one = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    assert float(kl_per_row(first, second, both)) == pytest.approx(expected / 2)
    assert float(kl_per_row(first, second, one)) == pytest.approx(expected)
    # What steering forbids adds nothing; what it alone allows costs without bound.
    certain = logits_of([[1.0, 0.0]])
    half = logits_of([[0.5, 0.5]])
    assert float(kl_per_row(certain, half, one[:, :1])) == pytest.approx(math.log(2))
    assert float(kl_per_row(half, certain, one[:, :1])) == math.inf
    # Padding may hold anything.
    broken = torch.stack([first[0, 0], torch.tensor([torch.nan, torch.inf])])[None]
    assert float(kl_per_row(broken, second, one)) == pytest.approx(expected)


@given(st.integers(0, 2**31), st.floats(0.01, 30))
def test_laws_of_kl(seed: int, scale: float) -> None:
    one, two = draw(2, 3, 7, seed=seed, scale=scale), draw(2, 3, 7, seed=seed + 1, scale=scale)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    found = kl_per_row(one, two, mask)
    assert bool((found >= 0).all()) and kl_per_row(one, one, mask).tolist() == [0.0, 0.0]
    reference = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=logits.double()) for logits in (one, two))
    )
    expected = torch.stack([reference[0, :2].mean(), reference[1, 1:].mean()])
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    # A constant added to all logits changes nothing.
    torch.testing.assert_close(kl_per_row(one + 3, two - 2, mask), found, rtol=1e-3, atol=1e-4)


def test_perplexity_by_hand() -> None:
    logits = torch.stack([logits_of([[0.5, 0.5], [0.25, 0.75]])[0], logits_of([[0.1, 0.9], [0.2, 0.8]])[0]])
    targets, mask = torch.tensor([[0, 0], [0, 1]]), torch.tensor([[True, True], [False, True]])
    assert nll_per_row(logits, targets, mask).tolist() == pytest.approx([math.log(8) / 2, -math.log(0.8)])
    assert perplexity(logits, targets, mask) == pytest.approx((8 / 0.8) ** (1 / 3))
    uniform = torch.zeros(1, 4, 10)
    assert perplexity(uniform, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)) == (
        pytest.approx(10)
    )


# -- on texts --------------------------------------------------------------------------------------------------------


def test_distinct() -> None:
    said = [["a", "b", "a", "b"], ["a", "b"]]
    assert distinct_n(said, 1) == 2 / 6
    assert distinct_n(said, 2) == 2 / 4  # ab ba ab, ab
    assert distinct_n(said, 5) == 0.0
    assert distinct_n([[7, 8, 9]], 1) == 1.0


def test_texts() -> None:
    texts = ["yes it is", " \n", "no"]
    answers = [[11, 12, 13, EOS], [EOS], [14, 15]]
    found = text_costs(texts, answers, (EOS,))
    assert (found.tokens, found.words, found.n) == (5 / 3, 4 / 3, 3)
    assert (found.empty, found.unfinished) == (1 / 3, 1 / 3)
    assert (found.distinct_1, found.distinct_2) == (1.0, 1.0)
    assert text_costs(texts, answers).unfinished is None
    assert empty_rate(["", "x"]) == 0.5
    assert unfinished_rate([[1, 2], [3, 9]], [9, 2, 5]) == 0.0


def test_bad_input() -> None:
    vlm, steering = torch_vlm(), sp.add("resid_post.1", VECTOR)
    empty = torch.zeros(1, 2, dtype=torch.bool)
    stepwise = sp.add("resid_post.1", VECTOR, alpha=lambda step: 1.0)
    never = sp.add("resid_post.1", VECTOR, "generated & ~completion")  # a forced answer is all completion
    for call, error, message in (
        (lambda: forced_costs(vlm, INPUTS, ANSWERS[:2], steering), InputError, "2 answers for 3 prompts"),
        (lambda: forced_costs(vlm, INPUTS, [[1], [], [2]], steering), InputError, "Answer 1 has no token"),
        (lambda: forced_costs(vlm, INPUTS, ANSWERS, stepwise), InputError, "changes from step to step"),
        (lambda: forced_costs(vlm, INPUTS, ANSWERS, never), PositionError, "nothing was steered"),
        (lambda: kl_per_row(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), empty), InputError, "Row 0 of the mask"),
        (lambda: text_costs([], []), InputError, "0 texts"),
        (lambda: text_costs(["a"], []), InputError, "1 texts and 0 token lists"),
        (lambda: distinct_n([], 0), InputError, "n is 0"),
        (lambda: empty_rate([]), InputError, "no answers"),
        (lambda: unfinished_rate([[1]], []), InputError, "never finishes"),
    ):
        with pytest.raises(error, match=message):
            call()
