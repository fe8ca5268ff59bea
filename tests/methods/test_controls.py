"""Controls: as long as the original token by token, in a direction of the row's own, and nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from _shifts import law_shifts
from _steerings import INPUTS, attached, drawn_network, said, steerings
from _tiny import D_MODEL, draw, hand_masks, plain_hooks, single_row, tiny_inputs, tiny_llava
from torch import Tensor

import steer_plugin as sp
from steer_plugin.context import Context
from steer_plugin.errors import InputError
from steer_plugin.intervention import Intervention, Write, patch
from steer_plugin.methods.controls import random_like, swapped, swapped_pair

IDS = ["a", "b", "c"]
KINDS = list(steerings())


def half(hidden: Tensor, context: Context) -> Tensor:
    """A delta of the user's own: another one at every token."""
    return 0.5 * hidden


def own(positions: str = "everywhere") -> Intervention:
    return Intervention((Write(sp.resid_post(1), sp.Positions.parse(positions), half),))


def plain_reads(layer: int) -> Tensor:
    """The residual stream behind a layer of a second model, by plain hooks."""
    hf, got = tiny_llava(), list[Tensor]()
    with torch.no_grad(), plain_hooks(hf, ("resid_post", layer, lambda hidden: got.append(hidden.clone()))):
        hf(**INPUTS, position_ids=(INPUTS["attention_mask"].cumsum(-1) - 1).clamp(min=0))
    return got[0]


def norms_by_hand(name: str) -> Tensor:
    """Norm of what a steering adds at every token of the prompt, (row, pos), from the second model alone."""
    stream, none = plain_reads(1), torch.zeros(INPUTS["input_ids"].shape)
    vector, rows = draw(D_MODEL, scale=3), draw(3, D_MODEL, scale=3)
    last = hand_masks(INPUTS)["last_prompt"][0]
    real = INPUTS["attention_mask"].bool()
    found: dict[str, Callable[[], Tensor]] = {
        "own": lambda: torch.where(real, 0.5 * stream.norm(dim=-1), none),
        "mean": lambda: torch.where(last, vector.norm(), none),
        "rows": lambda: torch.where(last, rows.norm(dim=-1)[:, None], none),
        "l2s": lambda: torch.where(last, drawn_network()(stream[:, -1]).norm(dim=-1)[:, None], none),
    }
    return found[name]()


MADE: dict[str, Callable[[], sp.Steerable]] = {
    "own": own,
    "mean": lambda: sp.MeanSteering(draw(D_MODEL, scale=3), "resid_post.1"),
    "rows": lambda: sp.MeanSteering(draw(3, D_MODEL, scale=3), "resid_post.1"),
    "l2s": lambda: sp.L2S(drawn_network(), "resid_post.1"),
}


def added(steering: sp.Steerable) -> Tensor:
    """What a steering really adds behind layer 1, (row, pos, d_model)."""
    vlm, site = attached("torch", tiny_llava()), sp.resid_post(1)
    before, after = (vlm.cache(INPUTS, [site], "everywhere", steering=one) for one in (None, steering))
    out = torch.zeros(*INPUTS["input_ids"].shape, D_MODEL)
    out[INPUTS["attention_mask"].bool()] = (after[site] - before[site])[after.mask]
    return out


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("name", list(MADE))
def test_every_token_is_pushed_as_far_as_by_the_original(name: str, ids: list[str] | None) -> None:
    original, control = MADE[name](), random_like(MADE[name](), ids, seed=3)
    for alpha in (1.0, -2.0):
        found, real = added(control * alpha), INPUTS["attention_mask"].bool()
        expected = abs(alpha) * norms_by_hand(name)
        torch.testing.assert_close(found.norm(dim=-1)[real], expected[real], rtol=1e-3, atol=1e-3)
    pushed = expected > 0
    cosines = torch.nn.functional.cosine_similarity(added(original)[pushed], found[pushed], dim=-1)
    assert cosines.abs().max() < 0.75
    # One direction for all tokens of a row, and for all rows where nobody names them.
    units = torch.nn.functional.normalize(found, dim=-1)
    firsts = torch.stack([units[row][pushed[row]][-1] for row in range(3)])
    for row in range(3):
        there = units[row][pushed[row]]
        torch.testing.assert_close(there, firsts[row].expand_as(there), rtol=1e-3, atol=1e-3)
    assert bool((firsts - firsts[:1]).abs().max() < 1e-3) == (ids is None)


class _Spy:
    """A delta that keeps what another one returned."""

    def __init__(self, delta: Any, kept: list[Tensor]) -> None:
        self.delta, self.kept = delta, kept

    def __call__(self, hidden: Tensor, context: Context) -> Tensor:
        out = self.delta(hidden, context)
        self.kept.append(out.expand_as(hidden).clone())
        return out


def spied(steering: sp.Steerable, kept: list[Tensor]) -> Intervention:
    return Intervention(tuple(replace(w, delta=_Spy(w.delta, kept)) for w in steering.intervention.writes))


@pytest.mark.parametrize("name", ["late", "steervlm"])
def test_norms_while_decoding_and_beside_twins(name: str) -> None:
    """Twins ride and late reads are replayed as for the original, and each layer draws a direction of its own."""
    vlm, inner, outer = attached("torch", tiny_llava()), list[Tensor](), list[Tensor]()
    control = spied(random_like(spied(steerings()[name], inner), IDS), outer)
    said(vlm, control)
    assert len(inner) == len(outer) >= 4
    for original, drawn in zip(inner, outer, strict=True):
        torch.testing.assert_close(drawn.norm(dim=-1), original.norm(dim=-1), rtol=1e-4, atol=1e-5)
    if name == "steervlm":
        first, second = (torch.nn.functional.normalize(outer[layer][0, -1], dim=-1) for layer in (0, 1))
        assert abs(float(first @ second)) < 0.75


@pytest.mark.parametrize("name", KINDS)
def test_strength_zero_is_nothing(name: str) -> None:
    vlm = attached("torch", tiny_llava())
    assert torch.equal(said(vlm, random_like(steerings()[name], IDS) * 0.0), said(vlm))
    assert torch.equal(said(vlm, random_like(steerings()[name] * 0.0)), said(vlm))


@pytest.mark.parametrize("framework", ["torch", "nnsight"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "rows"])
def test_a_batch_is_its_rows_one_by_one(name: str, framework: str) -> None:
    vlm, made = attached(framework, tiny_llava()), steerings()[name]
    batch = said(vlm, random_like(made, IDS, seed=1))
    for row, one in enumerate(IDS):
        alone = said(vlm, random_like(made, [one], seed=1), **single_row(INPUTS, row))
        assert alone[0, -4:].tolist() == batch[row, -4:].tolist()
    assert not torch.equal(batch, said(vlm))


def test_rows_with_strengths_of_their_own() -> None:
    """Vectors and strengths per row stay with their rows; a row of strength 0 is left alone."""
    vlm, made = attached("torch", tiny_llava()), steerings()["rows"]
    control, plain = said(vlm, random_like(made, IDS)), said(vlm)
    assert torch.equal(control[1], plain[1]) and not torch.equal(control, plain)


@pytest.mark.parametrize("name", ["l2s", "steervlm", "rows"])
def test_beams(name: str) -> None:
    vlm, made = attached("torch", tiny_llava()), steerings()[name]
    control = random_like(made, IDS)
    many = vlm.generate(**INPUTS, steering=control, max_new_tokens=4, do_sample=False, num_beams=3)
    if name == "rows":
        assert torch.equal(many[1], vlm.generate(**INPUTS, max_new_tokens=4, do_sample=False, num_beams=3)[1])
        return
    for row, one in enumerate(IDS):
        alone = vlm.generate(
            **single_row(INPUTS, row), steering=random_like(made, [one]), max_new_tokens=4, do_sample=False, num_beams=3
        )
        assert alone[0, -4:].tolist() == many[row, -4:].tolist()


def test_the_draw_depends_on_seed_write_and_id_only() -> None:
    made = steerings()["mean"]
    both = made + made

    def vectors(steering: sp.Steerable, ids: list[str] | None = None, seed: int = 0) -> list[Tensor]:
        return [write.delta.vector for write in random_like(steering, ids, seed).intervention.writes]  # type: ignore[union-attr]

    one, other = vectors(both)
    assert torch.equal(one, vectors(made)[0]) and not torch.allclose(one, other)
    assert not torch.allclose(one, vectors(made, seed=1)[0])
    rows = vectors(made, ["x", "y"])[0]
    assert rows.shape == (2, D_MODEL) and not torch.allclose(rows[0], rows[1])
    assert torch.equal(rows[1], vectors(made, ["q", "y", "x"])[0][1])
    assert random_like(random_like(own(), IDS, 5), IDS, 6) == random_like(own(), IDS, 6)


def test_all_but_the_delta_stays() -> None:
    for made in steerings().values():
        for before, after in zip(made.intervention.writes, random_like(made, IDS).writes, strict=True):
            assert replace(after, delta=before.delta) == before
            assert set(before.per_row) <= set(after.per_row)


def test_norm_rnd_is_this_control_of_the_oracle() -> None:
    """As long as the P2S vector of each row, like Norm-Rnd; the draws differ, their law does not."""
    shifts = law_shifts()
    oracle = sp.P2S.rows(shifts, ["s1", "s2"])
    ours = random_like(oracle, ["s1", "s2"]).writes[0].delta.vector  # type: ignore[attr-defined]
    torch.testing.assert_close(ours.norm(dim=-1), sp.NormRandom.rows(shifts, ["s1", "s2"]).vector.norm(dim=-1))


def test_directions_point_anywhere() -> None:
    """Over many ids the mean direction vanishes, and every coordinate has the share 1/d of the squared length."""
    made = sp.MeanSteering(draw(D_MODEL), "resid_post.1")
    drawn = random_like(made, [f"id {n}" for n in range(4000)]).writes[0].delta.vector  # type: ignore[attr-defined]
    units = drawn / drawn.norm(dim=-1, keepdim=True)
    assert float(units.mean(0).norm()) < 3 / 4000**0.5
    assert float((units.square().mean(0) * D_MODEL - 1).abs().max()) < 0.12


def test_swapped_is_the_opposite() -> None:
    made = steerings()["l2s"]
    torch.testing.assert_close(added(swapped(own())), -added(own()), rtol=1e-4, atol=1e-4)
    vlm = attached("torch", tiny_llava())
    assert torch.equal(said(vlm, swapped(made)), said(vlm, made * -1.0))
    with pytest.raises(InputError, match="cannot be scaled or negated"):
        swapped(patch("resid_post.1", torch.ones(D_MODEL), "last_prompt"))


def test_a_swapped_pair_is_not_the_sign_turned() -> None:
    made = steerings()["steervlm"] * 1.0
    bound = steerings()["steervlm"]
    back = swapped_pair(bound)
    assert back.pairs == (("w30 w31 w32", "w20 w21"),) and back.module is bound.module
    assert swapped_pair(back).pairs == bound.pairs
    vlm, inputs = attached("torch", tiny_llava()), tiny_inputs(3)
    site = sp.attn_out(0)
    plain, one, pair, sign = (
        vlm.cache(inputs, [site], "last_prompt", steering=given)[site] for given in (None, made, back, swapped(made))
    )
    torch.testing.assert_close(sign - plain, plain - one, rtol=1e-4, atol=1e-4)
    assert (pair - sign).abs().max() > 1e-2 and (pair - one).abs().max() > 1e-2


def test_bad_input() -> None:
    vlm = attached("torch", tiny_llava())
    unbound = sp.SteerVLM(steerings()["steervlm"].module)
    rows = sp.MeanSteering(draw(3, D_MODEL), "resid_post.1")
    for call, message in (
        (lambda: random_like(patch("resid_post.1", torch.ones(D_MODEL), "image")), "no push with a norm"),
        (lambda: random_like(own(), []), r"at least one.*got \[\]"),
        (lambda: random_like(own(), "abc"), "got 'abc'"),
        (lambda: random_like(rows, ["a", "b"]), "2 ids and 3 steering vectors at resid_post.1"),
        (lambda: said(vlm, random_like(own(), ["a", "b"])), "2 ids do not fit a batch of 3 rows"),
        (lambda: said(vlm, random_like(steerings()["mean"], ["a", "b"])), "2 steering vectors"),
        (lambda: swapped_pair(unbound), "without its prompt pair"),
    ):
        with pytest.raises(InputError, match=message):
            call()
