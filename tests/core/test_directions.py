"""Directions, footprints and compositions against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from _tiny import D_MODEL, IMAGE, LAYERS, adding, draw, hand_masks, plain_hooks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steer_plugin as sp
from steer_plugin.analysis import (
    by_behaviour,
    compose,
    cosines,
    explained,
    footprint,
    log_probability,
    logit_difference,
    shift_map,
)

V, W = draw(D_MODEL, seed=2, scale=2.0), draw(D_MODEL, seed=3, scale=2.0)


def shifts(count: int = 24) -> sp.Shifts:
    """Two behaviours on either side of a common vector, and a context that tells which."""
    sign = torch.tensor([[1.0 if k % 2 else -1.0] for k in range(count)])
    vectors = V + sign * W + draw(count, D_MODEL, seed=5, scale=0.1)
    names = tuple("harm" if k % 2 else "advice" for k in range(count))
    job = {"write": "resid_post.1", "read": "resid_post.1", "context": "last_prompt", "model": None}
    return sp.Shifts(vectors, sign * torch.ones(1, D_MODEL), tuple(map(str, range(count))), names, job)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.integers(0, 1000))
def test_cosines_know_no_length(scales: list[float], seed: int):
    vectors = draw(len(scales), D_MODEL, seed=seed)
    plain = cosines({str(k): v for k, v in enumerate(vectors)})
    scaled = cosines({str(k): v * s for k, (v, s) in enumerate(zip(vectors, scales, strict=True))})
    torch.testing.assert_close(plain.cosine, scaled.cosine, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.cosine, torch.tensor(np.corrcoef(vectors.numpy())), rtol=0, atol=1)
    assert torch.equal(plain.cosine, plain.cosine.T)


def test_cosines_by_hand():
    found = cosines({"v": V, "w": W, "v+w": V + W})
    table = found.to_frame().set_index(["first", "second"])
    assert table.loc[("v", "w"), "cosine"] == pytest.approx(float(V @ W / V.norm() / W.norm()), abs=1e-6)
    assert table.loc[("v", "v+w"), "second_norm"] == pytest.approx(float((V + W).norm()), rel=1e-6)
    np.testing.assert_allclose(np.asarray(found.plot().axes[0].images[0].get_array()), found.cosine)


def test_principal_components():
    data = shifts()
    found = shift_map(data)
    by_hand = np.linalg.svd((data.vectors - data.vectors.mean(0)).double().numpy())
    np.testing.assert_allclose(found.share, by_hand[1][:2] ** 2 / (by_hand[1] ** 2).sum(), rtol=1e-6)
    apart = found.points[:, 0].reshape(-1, 2)
    assert (apart[:, 0] * apart[:, 1] < 0).all()  # the two behaviours lie on either side
    assert found.share[0] > 0.9
    assert [one.get_label() for one in found.plot().axes[0].collections] == ["advice (12)", "harm (12)"]


def test_what_a_mean_explains_and_what_a_network_adds():
    data = shifts()
    mean = sp.MeanSteering.fit(data)
    told = {
        "mean": mean,
        "told": lambda s: V + s.contexts[:, :1] * W,
        "by behaviour": lambda s: torch.stack([s.mean(b) for b in s.behaviours]),
    }
    found = explained(data, told)
    share = 1 - (data.vectors - mean.vector).square().sum(-1) / data.vectors.square().sum(-1)
    torch.testing.assert_close(found.share[0], share.double(), rtol=1e-4, atol=1e-5)
    table = found.summary().set_index("method")
    assert table.loc["told", "share_low"] > table.loc["mean", "share_high"]
    assert table.loc["told", "better_than_first"] == 1
    assert len(found.to_frame()) == 3 * len(data)
    drawn = found.plot().axes[0].containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, found.cosine.mean(-1))
    assert set(by_behaviour(data)) == {"harm", "advice"}


def test_l2s_is_asked_for_its_prediction():
    data = shifts()
    l2s = sp.L2S.fit(data, "fast")
    with torch.no_grad():
        given = l2s.network(data.contexts)
    found = explained(data, {"L2S": l2s})
    torch.testing.assert_close(found.cosine[0], torch.cosine_similarity(data.vectors.double(), given.double(), dim=-1))


def test_a_footprint_is_the_change_of_the_stream(vlm, plain, placed):
    found = footprint(vlm, placed, sp.add("resid_post.1", V, "image"), parts=["image", "last_prompt"], direction=V)
    streams: list[list[Tensor]] = []
    for acts in ([], [("resid_post", 1, adding(V, *hand_masks(placed)["image"]))]):
        seen: list[Tensor] = []
        reads = [("resid_post", layer, lambda h, seen=seen: seen.append(h.clone())) for layer in range(LAYERS)]
        with torch.no_grad(), plain_hooks(plain, *reads, *acts):
            plain(**placed)
        streams.append(seen)
    change = torch.stack(streams[1]) - torch.stack(streams[0])
    image = placed["input_ids"] == IMAGE
    by_hand = torch.stack([change[:, row][:, image[row]].norm(dim=-1).mean(-1) for row in range(3)], -1)
    torch.testing.assert_close(found.moved[:, 0], by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.moved[:, 1], change[:, :, -1].norm(dim=-1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.along[1, 0], torch.ones(3), rtol=0, atol=1e-4)
    assert not found.moved[0].any()
    table = found.to_frame().set_index(["layer", "part"])
    assert table.loc[(1, "image"), "change_norm"] == pytest.approx(float(V.norm()), rel=1e-4)
    drawn = found.plot().axes[0].containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, found.relative[:, 0].mean(-1), rtol=1e-6)


def test_two_that_do_not_meet_add_up(torch_vlm, plain, placed):
    """Behind the last layer nothing is left to bend: changes of the stream add up, log odds too."""
    first, second = sp.add("resid_post.3", V, "last_prompt"), sp.add("resid_post.3", W, "last_prompt")
    odds = {"7 against 9": logit_difference(torch_vlm, 7, 9), "9": log_probability(torch_vlm, [9, "w10"])}
    found = compose(torch_vlm, placed, {"v": first, "w": second}, odds)
    assert float(found.interference[-1].abs().max()) < 1e-4
    torch.testing.assert_close(found.cosine[-1], (V @ W / V.norm() / W.norm()).expand(3), rtol=0, atol=1e-4)
    last = (torch.zeros(3, placed["input_ids"].shape[1]).bool(), True)
    last[0][:, -1] = True
    with torch.no_grad(), plain_hooks(plain, ("resid_post", 3, adding(V + W, *last))):
        logits = plain(**placed).logits[:, -1]
    torch.testing.assert_close(found.values[0, 3], logits[:, 7] - logits[:, 9], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.values[1, 3], logits.log_softmax(-1)[:, [9, 10]].logsumexp(-1), rtol=0, atol=1e-4)


def test_interaction_is_what_the_sum_lacks(torch_vlm, placed):
    early = sp.add("resid_post.0", V, "image"), sp.add("resid_post.1", W, "last_prompt")
    found = compose(
        torch_vlm, placed, dict(zip(("v", "w"), early, strict=True)), {"odds": logit_difference(torch_vlm, 7, 9)}
    )
    runs = [torch_vlm.observe(placed, (), s).logits[:, -1] for s in (None, *early, list(early))]
    none, one, two, both = (run[:, 7] - run[:, 9] for run in runs)
    torch.testing.assert_close(found.interaction[0], both - one - two + none)
    line = found.to_frame().iloc[0]
    assert line["interaction"] == pytest.approx(float((both - one - two + none).mean()), rel=1e-4)
    assert line["v low"] <= line["v"] <= line["v high"]
    assert found.streams()["layer"].tolist() == list(range(LAYERS))
    panel = found.plot().axes[0]
    ring = next(line for line in panel.lines if line.get_label() == "sum of the two")
    assert ring.get_ydata()[0] == pytest.approx(float((one + two - 2 * none).mean()), rel=1e-4)


def test_what_is_refused(torch_vlm, placed):
    data, odds = shifts(), {"m": logit_difference(torch_vlm, 7, 9)}
    steering = sp.add("resid_post.1", V, "image")
    zero = replace(data, vectors=torch.cat([data.vectors[:-1], torch.zeros(1, D_MODEL)]))
    for call, message in [
        (lambda: cosines({}), "at least one direction"),
        (lambda: cosines({"v": V, "w": W[:4]}), "direction 'w' has shape"),
        (lambda: cosines({"v": torch.zeros(4)}), "'v' is all zero"),
        (lambda: shift_map(data.select([0, 1])), "at least 3 samples"),
        (lambda: explained(data, {}), "at least one method"),
        (lambda: explained(zero, {"mean": sp.MeanSteering.fit(data)}), "1 of the shifts are zero"),
        (lambda: explained(data, {"short": lambda s: V[:4]}), "'short' gives vectors of width 4"),
        (lambda: footprint(torch_vlm, placed, steering, direction=V[:4]), "direction has shape"),
        (lambda: footprint(torch_vlm, placed, steering, ["projector"]), "sites of the decoder"),
        (lambda: footprint(torch_vlm, placed, steering, parts=[]), "name at least one part"),
        (lambda: compose(torch_vlm, placed, {"v": steering}, odds), "two steerings"),
        (lambda: compose(torch_vlm, placed, {"v": steering, "w": steering}, odds, "generated"), "row 0 has no token"),
        (lambda: logit_difference(torch_vlm, 7, 7), "same token 7"),
        (lambda: log_probability(torch_vlm, []), "at least one answer"),
        (lambda: log_probability(torch_vlm, "elephant"), "no token for 'elephant'"),
        (lambda: log_probability(torch_vlm, 64), "token id 64 is out of range"),
    ]:
        with pytest.raises(sp.InputError, match=message):
            call()
