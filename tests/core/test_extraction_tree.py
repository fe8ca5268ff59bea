"""Extraction as a tree of prefixes: what is shared and cut off, and that it gives what whole forwards give."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import _zoo
import pytest
import torch
from _tiny import LAYERS, PATCHES, tiny_llava, tiny_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_family_extraction import ANSWERS, by_hand

import steer_plugin as sp
from steer_plugin.adapters import _branches
from steer_plugin.adapters._batches import ROOM, SLACK, Size, batches
from steer_plugin.adapters._nodes import Node, flat, packed
from steer_plugin.contrast import ContrastivePair

SUFFIX = "w50 w51 w52 w53"


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def pairs_on(pictures: list[Any], suffix: str = "") -> list[ContrastivePair]:
    prompts = ("w10 w11", "w10 w11 w12 w13", "w10", "w17 w18 w19")
    return [
        ContrastivePair(f"p{i}", (one,), prompts[i % 4], *ANSWERS[i % 3], suffix if i != 1 else "")
        for i, one in enumerate(pictures)
    ]


# Full attention, mRoPE, sliding windows, and prompts that attend both ways over sliding windows.
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma2"])
@pytest.mark.parametrize("reads", ["last_prompt", "user_end", "text"])
def test_questions_about_one_picture_with_suffixes_equal_whole_forwards(name: str, reads: str):
    if name == "paligemma2" and reads == "user_end":
        reads = "last_prompt"  # it has no header, so that both are the same token
    vlm = sp.attach(_zoo.tiny(name), _zoo.processor_of(name))
    one, other = _zoo.picture(32, 16), _zoo.picture(20, 40)
    pairs = pairs_on([one, one, other, one], SUFFIX)
    shifts = vlm.extract(pairs, "resid_post.1", "resid_post.2", context=reads, progress=False, batch_size=4)
    for row, pair in enumerate(pairs):
        plus, minus = (
            by_hand(name, pair.user_text, pair.images[0], text)[0] for text in (pair.positive, pair.negative)
        )
        torch.testing.assert_close(shifts.vectors[row], plus - minus, rtol=1e-4, atol=1e-4)
        bare = vlm.inputs([pair.prompt], [list(pair.images)])
        context = vlm.cache(bare, "resid_post.2", reads)["resid_post.2"][0].mean(0)
        torch.testing.assert_close(shifts.contexts[row], context, rtol=1e-4, atol=1e-4)


@pytest.fixture
def vlm() -> sp.AttachedModel:
    return sp.attach(tiny_llava(), tiny_processor())


def ran(vlm: sp.AttachedModel, pairs: list[ContrastivePair], **how: Any) -> tuple[dict[str, list[int]], sp.Shifts]:
    """Shapes of what every decoder layer and the vision tower ran."""
    seen: dict[str, list[int]] = {}
    layers = vlm.root.model.language_model.layers
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, n=n: seen.setdefault(str(n), []).append(args[0].shape[0] * args[0].shape[1])
        )
        for n, layer in enumerate(layers)
    ]
    hooks.append(
        vlm.root.model.vision_tower.register_forward_pre_hook(
            lambda _, args, kwargs: seen.setdefault("vision", []).append((args or [*kwargs.values()])[0].shape[0]),
            with_kwargs=True,
        )
    )
    try:
        shifts = vlm.extract(pairs, progress=False, **how)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, shifts


def test_a_picture_runs_once_for_all_questions_about_it_and_no_layer_behind_the_last_read(vlm):
    one = picture(0)
    pairs = pairs_on([one] * 4)
    seen, _ = ran(vlm, pairs, write="resid_post.1", batch_size=4)
    assert seen["vision"] == [1]
    assert seen.keys() == {"vision", "0", "1"}, f"{LAYERS} layers, two of them needed"
    prompts = [f"USER: <image>\n{pair.prompt} ASSISTANT:".split() for pair in pairs]
    shared = 2 + PATCHES  # <s> USER: and the picture; one question begins with another word
    behind = sum(len(words) - 2 for words in prompts) + sum(len(f"{p.positive} {p.negative}".split()) for p in pairs)
    assert seen["0"] == seen["1"] == [shared, behind]


def test_a_late_context_runs_further_than_the_completions(vlm):
    seen, _ = ran(vlm, pairs_on([picture(0), picture(1)]), write="resid_post.0", read="resid_post.2", batch_size=2)
    assert [len(seen[str(layer)]) for layer in range(3)] == [2, 1, 1]


def test_flat_rows_and_packed_rows_give_the_same(vlm, monkeypatch: pytest.MonkeyPatch):
    pairs = pairs_on([picture(0), picture(0), picture(1), picture(0)], SUFFIX)
    fast = vlm.extract(pairs, "resid_post.1", "resid_post.2", batch_size=4, progress=False)
    monkeypatch.setattr(_branches, "_MASKED", ())  # as with flash attention
    plain = vlm.extract(pairs, "resid_post.1", "resid_post.2", batch_size=4, progress=False)
    torch.testing.assert_close(fast.vectors, plain.vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.contexts, plain.contexts, rtol=1e-4, atol=1e-5)


def test_openings_of_the_same_tokens_differ_by_nothing_at_all(vlm):
    pairs = [ContrastivePair("p", (picture(0),), "w10", "one", "two"), *pairs_on([picture(1)])]
    shifts = vlm.extract(pairs, "resid_post.2", batch_size=2, progress=False)
    assert not shifts.vectors[0].any(), "neither word is known: both are <unk>"
    assert shifts.vectors[1].any()


def test_batches_back_off_when_memory_runs_out(vlm, monkeypatch: pytest.MonkeyPatch):
    from steer_plugin.adapters._extract import Extraction

    pairs = pairs_on([picture(i) for i in range(5)])
    whole = vlm.extract(pairs, "resid_post.1", batch_size=2, progress=False)
    original, tried = Extraction.shifts, []

    def small(self, batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(self, batch)

    monkeypatch.setattr(Extraction, "shifts", small)
    found = vlm.extract(pairs, "resid_post.1", batch_size="auto", progress=False)
    assert tried[:2] == [5, 5]
    assert max(tried[-3:]) <= 2
    assert found.ids == whole.ids
    torch.testing.assert_close(found.vectors, whole.vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"batch_size": "most"}, "\"auto\", got 'most'"),
        ({"batch_size": "auto", "target": "average_sampled"}, "a draw depends on who shares its batch"),
    ],
)
def test_bad_batch_sizes_are_refused(vlm, how, message):
    with pytest.raises(sp.InputError, match=message):
        vlm.extract(pairs_on([picture(0)]), "resid_post.1", progress=False, **how)


# -- how prompts are dealt out ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 900)), min_size=1, max_size=60), st.integers(1, 9))
@settings(max_examples=60)
def test_batches_hold_every_prompt_once_pictures_together_and_little_padding(prompts, most):
    sizes = [Size(picture, tokens) for picture, tokens in prompts]
    dealt = batches(sizes, most)
    assert sorted(number for batch in dealt for number in batch) == list(range(len(sizes)))
    assert all(len(batch) <= most for batch in dealt)
    in_turn = [sizes[number].pictures for batch in dealt for number in batch]
    changes = sum(one != other for one, other in pairwise(in_turn))
    assert changes == len(set(in_turn)) - 1
    for batch in dealt:
        lengths = [sizes[number].tokens for number in batch]
        one_picture = len({sizes[number].pictures for number in batch}) < len(batch)
        assert one_picture or max(lengths) <= SLACK * min(lengths) + ROOM


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[Node], int]:
    rows, nodes = draw(st.integers(1, 3)), list[Node]()
    for _ in range(draw(st.integers(1, 7))):
        row = draw(st.integers(0, rows - 1))
        above = [None, *(i for i, node in enumerate(nodes) if node.row == row)]
        words = draw(st.lists(st.integers(5, 60), min_size=1, max_size=4))
        nodes.append(Node(row, words, draw(st.sampled_from(above))))
    return nodes, rows


@given(trees())
@settings(max_examples=60)
def test_every_token_sees_its_own_path_in_both_layouts(tree):
    nodes, rows = tree

    def path(number: int) -> list[int]:
        parent = nodes[number].parent
        return [*(path(parent) if parent is not None else []), *nodes[number].tokens]

    together, apart = packed(nodes, rows), flat(nodes)
    assert sum(map(len, together.tokens)) == sum(len(node.tokens) for node in nodes), "nothing runs twice"
    assert together.sees is not None
    for number, node in enumerate(nodes):
        for i in range(len(node.tokens)):
            wanted = path(number)[: len(path(number)) - len(node.tokens) + i + 1]
            row, (column,) = together.columns(number, [i])
            seen = together.sees[row, column].nonzero()[:, 0].tolist()
            assert row == node.row
            by_place = sorted((together.ahead[row][c], together.tokens[row][c]) for c in seen)
            assert by_place == list(enumerate(wanted))
            row, (column,) = apart.columns(number, [i])
            assert apart.rows[row] == node.row
            assert apart.tokens[row][: column + 1] == wanted
            assert apart.ahead[row][: column + 1] == list(range(len(wanted)))
