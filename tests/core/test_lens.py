"""The logit lens is the model's own norm and head on its own streams, steered or not, on every framework."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _tiny import D_MODEL, IMAGE, LAYERS, WORDS, adding, draw, hand_masks, plain_hooks, tiny_inputs
from PIL import Image

import steer_plugin as sp
from steer_plugin.analysis import direction_lens, interactive, logit_lens, project

V = draw(D_MODEL, seed=2, scale=3.0)


@pytest.mark.parametrize("steer", [False, True])
def test_it_is_norm_and_head_of_the_stream(vlm, plain, placed, steer: bool):
    streams = []
    reads = [("resid_post", layer, lambda h: streams.append(h.clone())) for layer in range(LAYERS)]
    acts = [("resid_post", 1, adding(V, *hand_masks(placed)["image"]))] if steer else []
    with torch.no_grad(), plain_hooks(plain, *reads, *acts):
        logits = plain(**placed).logits
        by_hand = torch.stack([plain.lm_head(plain.model.language_model.norm(h)) for h in streams]).softmax(-1)
    found = logit_lens(vlm, placed, ["w9", 12], steering=sp.add("resid_post.1", V, "image") if steer else None, top=3)
    real = placed["attention_mask"].bool()
    assert found.targets == ("w9", "12")
    torch.testing.assert_close(found.of("w9")[:, real], by_hand[..., 9][:, real], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.top_probability[:, real], by_hand.topk(3).values[:, real], rtol=0, atol=1e-5)
    # The last layer's lens is what the model says.
    torch.testing.assert_close(found.of("12")[-1][real], logits.softmax(-1)[..., 12][real], rtol=0, atol=1e-5)


def test_its_table_and_figures(torch_vlm, inputs):
    found = logit_lens(torch_vlm, inputs, ["w9"])
    table = found.to_frame()
    assert len(table) == LAYERS * int(inputs["attention_mask"].sum())
    assert set(table["class"]) == {"image", "text", "user_end", "last_prompt"}
    line = table[(table.layer == 2) & (table.row == 1)].iloc[-1]
    assert line["w9"] == pytest.approx(float(found.of("w9")[2, 1, -1]))
    assert line["top"] == WORDS[int(found.top[2, 1, -1, 0])]
    real = inputs["attention_mask"][1].bool()
    drawn = np.asarray(found.plot("w9", row=1).axes[0].images[0].get_array())
    np.testing.assert_allclose(drawn, found.of("w9")[:, 1][:, real].numpy(), rtol=1e-6)
    named = {text.get_text() for text in found.plot(row=1).axes[0].texts}
    assert {found.words[i][:7] for i in found.top[:, 1][:, real, 0].flatten().tolist()} == named
    with pytest.raises(sp.InputError, match="no target 'w8'; it has w9"):
        found.plot("w8")


def test_it_lies_on_the_picture(torch_vlm, inputs):
    pictures = [[Image.new("RGB", (16, 16))]] * 3
    found = logit_lens(torch_vlm, inputs, ["w9"])
    figure = found.plot_image(pictures, "w9", "resid_post.2", row=1)
    cells = next(one for one in figure.axes[0].collections if one.get_label() == "values")
    there = inputs["input_ids"][1] == IMAGE
    np.testing.assert_allclose(cells.get_array(), found.of("w9")[2, 1][there].numpy(), rtol=1e-6)
    with pytest.raises(sp.InputError, match=r"did not read resid_pre\.1"):
        found.plot_image(pictures, "w9", "resid_pre.1")


def test_directions_are_unembedded(torch_vlm, plain):
    found = direction_lens(torch_vlm, {"v": V, "-v": -V})
    gain = plain.model.language_model.norm.weight
    by_hand = (plain.lm_head.weight @ (gain * V)).detach()
    torch.testing.assert_close(found.logits[0], by_hand, rtol=1e-4, atol=1e-4)
    assert found.raised("v", 3) == found.lowered("-v", 3) == [WORDS[i] for i in by_hand.topk(3).indices.tolist()]
    streams = draw(5, D_MODEL, seed=1)
    norm = plain.model.language_model.norm
    with torch.no_grad():
        moved = (plain.lm_head(norm(streams + V)) - plain.lm_head(norm(streams))).mean(0)
    torch.testing.assert_close(direction_lens(torch_vlm, {"v": V}, streams).logits[0], moved, rtol=1e-4, atol=1e-5)
    table = found.to_frame(2)
    assert table["word"].tolist()[:2] == found.raised("v", 2)
    bars = found.plot(4).axes[0].patches
    assert [bar.get_width() for bar in bars][-1] == pytest.approx(float(found.logits[0].max()))


def test_projections(vlm, plain, placed):
    streams = []
    reads = [("resid_post", layer, lambda h: streams.append(h.clone())) for layer in range(LAYERS)]
    with torch.no_grad(), plain_hooks(plain, *reads):
        plain(**placed)
    found = project(vlm, placed, V)
    real = placed["attention_mask"].bool()
    torch.testing.assert_close(found.values[:, real], (torch.stack(streams) @ V / V.norm())[:, real], rtol=0, atol=1e-4)
    drawn = np.asarray(found.plot(row=2).axes[0].images[0].get_array())
    np.testing.assert_allclose(drawn, found.values[:, 2][:, real[2]].numpy(), rtol=1e-6)
    assert len(found.to_frame()) == LAYERS * int(real.sum())


def test_interactive_maps_hold_the_same(torch_vlm, inputs):
    pytest.importorskip("plotly")
    found = logit_lens(torch_vlm, inputs, ["w9"])
    columns = inputs["attention_mask"][1].bool()
    data = interactive(found, row=1, target="w9").data[0]
    np.testing.assert_allclose(data.z, found.of("w9")[:, 1][:, columns].numpy(), rtol=1e-6)
    assert "resid_post.0" in data.customdata[0][0]
    assert data.customdata[0][0].endswith(repr(found.words[int(found.top[0, 1][columns][0, 0])]))
    shown = project(torch_vlm, inputs, V)
    np.testing.assert_allclose(interactive(shown, row=1).data[0].z, shown.values[:, 1][:, columns].numpy(), rtol=1e-6)
    with pytest.raises(sp.InputError, match="only a lens has targets"):
        interactive(project(torch_vlm, inputs, V), target="w9")


def test_what_a_lens_refuses(torch_vlm, inputs):
    for call, message in [
        (lambda: logit_lens(torch_vlm, inputs, top=0), "top must be at least 1"),
        (lambda: logit_lens(torch_vlm, inputs, [""]), "has no token"),
        (lambda: direction_lens(torch_vlm, {}), "at least one direction"),
        (lambda: direction_lens(torch_vlm, {"v": V[:3]}), r"shape \(3,\), expected \(32,\)"),
        (lambda: project(torch_vlm, inputs, torch.zeros(D_MODEL)), "all zero"),
        (lambda: project(torch_vlm, inputs, V, ["projector"]), "sites of the decoder"),
        (lambda: logit_lens(torch_vlm, tiny_inputs(1)).plot(row=1), "rows 0 to 0, got 1"),
    ]:
        with pytest.raises(sp.InputError, match=message):
            call()


def test_a_head_of_another_kind_is_refused(torch_vlm, inputs, monkeypatch: pytest.MonkeyPatch):
    head = torch_vlm.root.lm_head
    monkeypatch.setattr(torch_vlm.root, "forward", lambda **kw: _shifted(torch_vlm.root, head, **kw))
    with pytest.raises(sp.FamilyError, match="logits that differ"):
        logit_lens(torch_vlm, inputs)


def _shifted(root, head, **inputs):
    found = type(root).forward(root, **inputs)
    found.logits = found.logits.flip(-1)
    return found
