"""Which tokens each name selects, family by family: tiles, grids, row and column tokens, several pictures or none."""

from __future__ import annotations

from itertools import groupby

import _zoo
import pytest
import torch
from test_families import FAMILIES, vector

import steer_plugin as sp

IMAGE = {
    **dict.fromkeys(FAMILIES, "<image>"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|image_pad|>"),
    "gemma3": "<image_soft_token>", "internvl": "<IMG_CONTEXT>", "mllama": "<|image|>", "mistral3": "[IMG]",
}  # fmt: skip
# The last token of the user's turn, and the assistant's header behind it.
ENDS: dict[str, tuple[str, list[str]]] = {
    "llava": ("w2", ["ASSISTANT:"]),
    "llava_next": ("[/INST]", []),
    "mistral3": ("[/INST]", []),
    "paligemma": ("\n", []),
    "paligemma2": ("\n", []),
    "gemma3": ("\n", ["<start_of_turn>", "model", "\n"]),
    "idefics3": ("\n", ["Assistant:"]),
    "smolvlm": ("\n", ["Assistant:"]),
    "mllama": ("<|eot_id|>", ["<|start_header_id|>", "assistant", "<|end_header_id|>", "\n", "\n"]),
    **dict.fromkeys(
        ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"),
        ("\n", ["<|im_start|>", "assistant", "\n"]),
    ),
}
# Runs of image tokens of a picture of 32 x 16 pixels: sizes from the papers' rules, counted by hand for these models.
RUNS: dict[str, list[int]] = {
    "llava": [4],  # 2 x 2 patches of the cropped centre
    "llava_next": [4 + 2 * (4 + 1)],  # the base view, then 2 rows of 4 patches with a newline each
    "llava_onevision": [4 + 2 * (4 + 1)],
    "qwen2_vl": [2 * 4],  # 16/4/2 rows, 32/4/2 columns
    "qwen2_5_vl": [2 * 4],
    "qwen3_vl": [2 * 4],
    "gemma3": [4],
    "paligemma": [4],
    "paligemma2": [4],
    "idefics3": [4, 4, 4],  # two tiles, each behind its row and column token, then the global view
    "smolvlm": [4, 4, 4],
    "internvl": [3 * 4],  # two tiles and the thumbnail
    "mllama": [1],
    "mistral3": [4, 4],  # two rows, a break token between them
}


def attached(name: str) -> sp.AttachedModel:
    return sp.attach(_zoo.tiny(name), _zoo.processor_of(name))


def words(vlm: sp.AttachedModel, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    return vlm.processor.tokenizer.convert_ids_to_tokens(ids[mask])


@pytest.mark.parametrize("name", FAMILIES)
def test_names_select_the_tokens_that_they_say(name: str):
    vlm = attached(name)
    inputs = vlm.inputs(["w1 w2", "w3 w4 w2"], [[_zoo.picture(32, 16)], [_zoo.picture(20, 40)]])
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    mask = {
        key: vlm.show_positions(inputs, key, show=False).mask
        for key in ("image", "text", "last_prompt", "user_end", "prompt")
    }
    assert set(words(vlm, ids[0], mask["image"][0])) == {IMAGE[name]}
    assert torch.equal(mask["image"] | mask["text"], real)
    assert not (mask["image"] & mask["text"]).any()
    assert IMAGE[name] not in words(vlm, ids[0], mask["text"][0])
    runs = [len(list(run)) for inside, run in groupby(mask["image"][0].tolist()) if inside]
    assert runs == RUNS[name]
    user_end, header = ENDS[name]
    for row in range(2):
        tokens = words(vlm, ids[row], real[row])
        assert words(vlm, ids[row], mask["last_prompt"][row]) == tokens[-1:]
        assert words(vlm, ids[row], mask["user_end"][row]) == [user_end]
        assert tokens[-len([user_end, *header]) :] == [user_end, *header]
        assert mask["user_end"][row].nonzero().item() == mask["last_prompt"][row].nonzero().item() - len(header)


@pytest.mark.parametrize("name", FAMILIES)
def test_several_pictures_and_none(name: str):
    """Two pictures have twice the tokens of one; a prompt without a picture has none, and is steered all the same."""
    vlm, one = attached(name), _zoo.picture(32, 16)
    several = vlm.inputs(["w1 w2", "w3"], [[one, one], [one]])
    counts = vlm.show_positions(several, "image", show=False).counts
    per_picture = sum(RUNS[name])
    # OneVision sees several pictures without tiles: 2 x 2 tokens and a newline.
    per_first = 5 if name == "llava_onevision" else per_picture
    assert counts == [2 * per_first, per_picture]
    if name.startswith("paligemma"):
        with pytest.raises(sp.InputError, match="PaliGemmaProcessor refuses these prompts"):
            vlm.inputs(["w1 w2"])
        batches = [several]
    else:
        bare = vlm.inputs(["w1 w2", "w3 w4 w5"])
        assert vlm.show_positions(bare, "image", show=False).counts == [0, 0]
        batches = [several, bare]
    steering = sp.MeanSteering(vector(_zoo.D), site=sp.resid_post(2), alpha=3.0)
    for inputs in batches:
        unsteered = vlm.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert not torch.equal(vlm.generate(**inputs, steering=steering, max_new_tokens=3, do_sample=False), unsteered)
        assert vlm.counts == [[3, 3]]


@pytest.mark.parametrize("name", FAMILIES)
def test_steering_the_picture_alone_changes_those_tokens_alone(name: str):
    vlm, inputs = attached(name), _zoo.inputs_of(name)
    site = sp.resid_post(2)
    steering = sp.MeanSteering(vector(_zoo.D), site=site, positions="image")
    before, after = (vlm.cache(inputs, site, steering=one)[site] for one in (None, steering))
    shown = vlm.cache(inputs, site, "image")
    changed = (before != after).any(-1).sum(-1).tolist()
    assert changed == shown.mask.sum(-1).tolist() == vlm.show_positions(inputs, "image", show=False).counts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_too_few_is_refused_before_any_work(name: str):
    """Image tokens for two pictures, pixels for one."""
    vlm, one = attached(name), _zoo.picture(32, 16)
    inputs = dict(vlm.inputs(["w1"], [[one, one]]))
    fewer = vlm.inputs(["w1"], [[one]])
    ran: list[int] = []
    handle = vlm.root.register_forward_pre_hook(lambda m, a: ran.append(1))
    broken = {**fewer, **{key: inputs[key] for key in inputs if inputs[key].shape[:2] == inputs["input_ids"].shape}}
    if name == "mllama":  # as many places as pictures in the cross-attention mask
        broken["cross_attention_mask"] = broken["cross_attention_mask"][:, :, :1]
    with pytest.raises(sp.InputError, match=r"image tokens.*placeholder"):
        vlm.generate(**broken, max_new_tokens=1)
    with pytest.raises(sp.InputError, match="no image was given"):
        vlm.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=1)
    handle.remove()
    assert not ran


def test_showing_positions_prints_them(capsys: pytest.CaptureFixture[str]):
    vlm = attached("qwen2_vl")
    shown = vlm.show_positions(vlm.inputs(["w1"], [_zoo.picture(32, 16)]), "image|last_prompt")
    printed = capsys.readouterr().out
    assert printed == f"{shown}\n"
    assert "row 0: 9 prompt tokens" in printed
