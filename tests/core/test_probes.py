"""Probes find what was put into the stream, not what a lot says; steering along their direction moves them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _tiny import D_MODEL, IMAGE, draw, plain_hooks, tiny_inputs
from PIL import Image
from torch import Tensor

import steer_plugin as sp
from steer_plugin.analysis import image_deltas, probe, read_parts

PLACE = (sp.resid_post(1), "last_prompt")


def planted(count: int = 60, seed: int = 0) -> tuple[dict, list[bool]]:
    """Noise with a label along one direction, at one place; noise alone at another."""
    noise = draw(count, D_MODEL, seed=seed)
    labels = [k % 2 == 0 for k in range(count)]
    signal = torch.tensor([[3.0 if label else -3.0] for label in labels]) * torch.eye(D_MODEL)[:1]
    return {PLACE: noise + signal, (sp.resid_post(0), "last_prompt"): noise}, labels


def test_it_reads_what_is_there():
    values, labels = planted()
    found = probe(values, labels)
    table = found.to_frame().set_index("layer")
    assert table.loc[1, "accuracy"] > 0.9
    assert table.loc[0, "accuracy"] < 0.75
    assert table.loc[1, "selectivity"] > 0.25
    assert found.majority == 0.5
    direction = found.direction(PLACE)
    assert int(direction.abs().argmax()) == 0
    assert found.classes == ("False", "True")
    assert direction[0] > 0
    assert "best" in repr(found)


def test_the_control_task_learns_types():
    """With the same type in all folds a probe can learn its lot: selectivity falls."""
    kinds = [f"type {k % 4}" for k in range(80)]
    marks = torch.eye(D_MODEL)[[k % 4 for k in range(80)]] * 6 + draw(80, D_MODEL)
    labels = [k % 4 < 2 for k in range(80)]
    found = probe({PLACE: marks}, labels, types=kinds, seed=1)
    assert found.accuracy.mean() > 0.9
    assert found.control.mean() > 0.9
    assert probe({PLACE: marks}, labels, seed=1).control.mean() < 0.8


def test_groups_stay_together():
    """Prompts about one picture share its noise: parted between folds they leak."""
    pictures = [f"picture {k // 4}" for k in range(80)]
    own = draw(20, D_MODEL, scale=5.0).repeat_interleave(4, 0) + draw(80, D_MODEL, seed=1) * 0.1
    labels = [bool(k) for k in torch.randint(2, (20,), generator=torch.Generator().manual_seed(3)).repeat_interleave(4)]
    assert probe({PLACE: own}, labels).accuracy.mean() > 0.95
    assert probe({PLACE: own}, labels, groups=pictures).accuracy.mean() < 0.8


def test_steering_along_it_moves_it():
    values, labels = planted()
    found = probe({PLACE: values[PLACE]}, labels)
    fresh, _ = planted(seed=9)
    after = {PLACE: fresh[PLACE] + 8 * found.direction(PLACE) / found.direction(PLACE).norm()}
    shift = found.moved({PLACE: fresh[PLACE]}, after)
    line = shift.to_frame().iloc[0]
    assert line["low"] > 0
    assert line["flipped"] == pytest.approx(0.5, abs=0.1)
    drawn = shift.plot().axes[0].containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, (shift.after - shift.before).mean(1))


def test_means_of_parts(vlm, plain, placed):
    found = read_parts(vlm, [placed, placed], ["resid_post.1"], ["image", "last_prompt"])
    seen: list[Tensor] = []
    with torch.no_grad(), plain_hooks(plain, ("resid_post", 1, lambda h: seen.append(h.clone()))):
        plain(**placed)
    image = placed["input_ids"] == IMAGE
    by_hand = torch.stack([h[m].mean(0) for h, m in zip(seen[0], image, strict=True)])
    torch.testing.assert_close(found[sp.resid_post(1), "image"], by_hand.repeat(2, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[PLACE], seen[0][:, -1].repeat(2, 1), rtol=0, atol=1e-5)


def test_what_the_picture_changes(torch_vlm, plain):
    prompts, pictures = ["w9 w10", "w11"], [Image.new("RGB", (16, 16), c) for c in ("red", "white")]
    found = image_deltas(torch_vlm, prompts, pictures, ["resid_post.2"])
    last = []
    for given in (torch_vlm.inputs(prompts, pictures), torch_vlm.inputs(prompts)):
        with torch.no_grad(), plain_hooks(plain, ("resid_post", 2, lambda h: last.append(h[:, -1].clone()))):
            plain(**given)
    torch.testing.assert_close(found[sp.resid_post(2), "last_prompt"], last[0] - last[1], rtol=0, atol=1e-4)


def test_figure():
    values, labels = planted()
    axes = probe(values, labels).plot().axes[0]
    drawn = axes.containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, probe(values, labels).accuracy.mean(1))
    assert "control task" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_what_a_probe_refuses(torch_vlm):
    values, labels = planted(20)
    three = probe(values, [k % 3 for k in range(20)], folds=2)
    for call, message in [
        (lambda: probe(values, labels[:5]), "got 5 labels for 20 prompts"),
        (lambda: probe(values, labels, types=["a"]), "got 1 types"),
        (lambda: probe(values, [True] * 20), "two classes"),
        (lambda: probe(values, labels, groups=["a", "b"] * 10), "2 groups cannot be parted into 5 folds"),
        (lambda: probe(values, labels, folds=11), "two classes of at least 11 samples"),
        (lambda: three.direction(PLACE), "probes of two classes; these have 3"),
        (lambda: probe(values, labels).direction((sp.resid_post(3), "image")), "no probe at"),
        (lambda: probe(values, labels).moved({}, {}), "was not read before and after"),
        (lambda: read_parts(torch_vlm, [], ["resid_post.1"]), "got 0 batches"),
        (lambda: read_parts(torch_vlm, tiny_inputs(2), ["resid_post.1"], ["generated"]), "has no token"),
        (lambda: image_deltas(torch_vlm, ["w9"], [], ["resid_post.1"]), "got 1 prompts and 0 pictures"),
    ]:
        with pytest.raises(sp.InputError, match=message):
            call()
