"""What steering adds, counted in tensor operations: no time is taken, so a busy machine changes nothing.

Counted by torch's dispatcher: operations, tensors that are newly allocated, and looks of the host at a value, each of
which would make a GPU wait. Per decoded token: what 6 new tokens take more than 2, over 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _steerings import drawn_network, steerings
from _tiny import D_MODEL, draw, tiny_inputs
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steer_plugin as sp

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
READING_OPS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")
INPUTS = tiny_inputs(3)
STEERINGS = steerings()
VECTOR = draw(D_MODEL)


class Ops(TorchDispatchMode):
    """Counts operations, tensors that they allocate (views are none), by name and by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.reads: Counter[str] = Counter()
        self.where: Callable[[], bool] = lambda: True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), str(func).split(".")[1]
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        held = {one.untyped_storage().data_ptr() for one in given}
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in held:
                self.made[name] += 1
                self.shapes[tuple(one.shape)] += 1
        by_mask = name == "index" and any(one.dtype == torch.bool for one in given[1:])
        if (name in READING_OPS or by_mask) and self.where():
            self.reads[name] += 1
        return out


class Reads(TorchFunctionMode):
    """Counts looks of the host that the dispatcher does not see on a CPU."""

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        self.ops = ops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and self.ops.where():
            self.ops.reads[name] += 1
        return func(*args, **(kwargs or {}))


def counted(call: Callable[[], object], where: Callable[[], bool] = lambda: True) -> Ops:
    ops = Ops()
    ops.where = where
    with torch.no_grad(), Reads(ops), ops:
        call()
    return ops


def per_token(generate: Callable[..., object]) -> Ops:
    two, six = (counted(lambda new=new: generate(**INPUTS, max_new_tokens=new, do_sample=False)) for new in (2, 6))
    for name in ("made", "reads"):
        more = getattr(six, name)
        more.subtract(getattr(two, name))
        setattr(six, name, Counter({key: count / 4 for key, count in more.items() if count}))
    return six


def added(vlm: Any, steering: Any, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Tensors allocated and looks of the host per decoded token, beyond those of the unsteered model."""
    vlm.root.generate(**INPUTS, max_new_tokens=6, do_sample=False, **options)  # what is made once in a process
    plain = per_token(lambda **inputs: vlm.root.generate(**inputs, **options))
    steered = per_token(lambda **inputs: vlm.generate(**inputs, **options, steering=steering))
    steered.made.subtract(plain.made)
    steered.reads.subtract(plain.reads)
    made, reads = ({k: n for k, n in one.items() if n} for one in (steered.made, steered.reads))
    return made, reads


@pytest.mark.parametrize("name", ["mean", "everywhere", "l2s", "late"])
def test_a_decoded_token_costs_one_sum_and_no_look(vlm, name: str):
    assert added(vlm, STEERINGS[name]) == ({"add": 1}, {})


def test_strengths_of_rows_cost_a_choice_more(torch_vlm):
    """One row has strength 0 and keeps its bits."""
    assert added(torch_vlm, STEERINGS["rows"]) == ({"add": 1, "where": 1}, {})
    rows = sp.MeanSteering(draw(3, D_MODEL), "attn_out.3", alpha=torch.tensor([1.0, 3.0, 2.0]))
    assert added(torch_vlm, rows) == ({"add": 1}, {})


def test_several_layers_cost_a_sum_each_and_what_is_not_written_nothing(torch_vlm):
    three = sum(sp.add(f"resid_post.{layer}", VECTOR) for layer in range(3))
    assert added(torch_vlm, three) == ({"add": 3}, {})
    assert added(torch_vlm, sp.add("resid_post.1", VECTOR, "last_prompt")) == ({}, {})


def test_a_static_cache_is_not_asked_for_its_length_at_every_token(torch_vlm):
    """It counts on its device."""
    assert added(torch_vlm, STEERINGS["l2s"], cache_implementation="static") == ({"add": 1}, {})


def test_no_token_is_looked_at_by_a_module_with_twins(torch_vlm):
    assert added(torch_vlm, STEERINGS["steervlm"])[1] == {}


def test_a_delta_that_changes_is_multiplied_anew(torch_vlm, inputs):
    """What is kept is known by its memory and its version: a delta may change its tensor in place."""

    def running(hidden: Tensor, context: sp.Context) -> Tensor:
        kept = context.once("kept", lambda: torch.zeros(D_MODEL))
        kept += 1
        return kept

    write = sp.Write(sp.resid_post(1), sp.Positions.parse("paper"), running, 2.0)
    seen: list[Tensor] = []
    handle = torch_vlm.root.model.language_model.layers[2].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    try:
        torch_vlm.generate(**inputs, max_new_tokens=4, do_sample=False)
        torch_vlm.generate(**inputs, max_new_tokens=4, do_sample=False, steering=sp.Intervention((write,)))
    finally:
        handle.remove()
    torch.testing.assert_close(seen[4][:, -1] - seen[0][:, -1], torch.full((3, D_MODEL), 2.0))
    by_hand = []
    layer = torch_vlm.root.model.language_model.layers[1]
    handle = layer.register_forward_hook(lambda m, a, out: by_hand.append(out[:, -1]) or None, prepend=False)
    try:
        with torch_vlm.steering(sp.Intervention((write,))):
            torch_vlm.root.generate(**inputs, max_new_tokens=4, do_sample=False)
    finally:
        handle.remove()
    assert len(by_hand) == 4
    assert [torch.equal(one, other[:, -1]) for one, other in zip(by_hand, seen[4:], strict=True)] == [True] * 4


@pytest.mark.parametrize("name", ["mean", "rows", "everywhere", "l2s", "late", "steervlm"])
def test_no_layer_of_the_prompt_waits_for_the_host(torch_vlm, name: str):
    """All looks lie before the first layer, where nothing is queued yet."""
    inside: list[int] = []
    layers = torch_vlm.root.model.language_model.layers
    handles = [one.register_forward_pre_hook(lambda m, a: inside.append(1)) for one in layers]
    handles += [one.register_forward_hook(lambda m, a, o: inside.clear()) for one in layers]
    torch_vlm.generate(**INPUTS, steering=STEERINGS[name], max_new_tokens=1)  # reads the texts of a pair
    try:
        ops = counted(
            lambda: torch_vlm.generate(**INPUTS, steering=STEERINGS[name], max_new_tokens=1), lambda: bool(inside)
        )
    finally:
        for handle in handles:
            handle.remove()
    assert ops.reads == {}


def test_the_host_looks_at_a_prompt_once_however_many_writes(torch_vlm):
    one = sp.add("resid_post.0", VECTOR, "image|last_prompt")
    many = sum(sp.add(f"{kind}.{n}", VECTOR, "image|last_prompt") for kind in ("attn_out", "mlp_out") for n in range(4))
    first, second = (
        counted(lambda steering=steering: torch_vlm.generate(**INPUTS, steering=steering, max_new_tokens=1)).reads
        for steering in (one, many)
    )
    assert first == second


@pytest.mark.parametrize(("where", "tensors"), [("last_prompt|generated", 1), ("everywhere", 2)])
def test_the_stream_of_a_prompt_is_not_copied_more_than_it_must(torch_vlm, where: str, tensors: int):
    """One new stream where whole columns are written, two where rows are padded differently."""
    stream = (*INPUTS["input_ids"].shape, D_MODEL)

    def made(*steering: Any) -> int:
        return counted(lambda: torch_vlm.generate(list(steering), **INPUTS, max_new_tokens=1)).shapes[stream]

    assert made(sp.add("resid_post.1", VECTOR, where)) - made() == tensors
    # The write before at the same site made the stream: it is ours, and changed in place.
    both = (sp.add("resid_post.1", VECTOR), sp.L2S(drawn_network(), "resid_post.1", "resid_post.0"))
    assert made(*both) - made() == 1
