"""torch.compile and static KV caches: steered as without them, and nothing of it stays behind.

Backends only count what they are given: what matters is which code is compiled and when it runs, not how fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _steerings import drawn_network, steerings
from _tiny import D_MODEL, draw, greedy, tiny_inputs, tiny_llava, tiny_processor, with_position_ids
from torch import Tensor, nn
from transformers import CompileConfig

import steer_plugin as sp

INPUTS = with_position_ids(tiny_inputs(2))
STEERING = sp.MeanSteering(draw(D_MODEL, scale=3), "resid_post.1", positions="everywhere")
STEERINGS = steerings()


class Counting:
    """A backend that runs what it is given as it is, and counts how often."""

    def __init__(self) -> None:
        self.made = self.run = 0

    def __call__(self, graph: Any, examples: Any) -> Callable[..., Any]:
        self.made += 1

        def called(*args: Any) -> Any:
            self.run += 1
            return graph(*args)

        return called


@pytest.fixture
def backend() -> Iterator[Counting]:
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def logits(call: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        return call(**INPUTS).logits


def steered(vlm: Any, call: Callable[..., Any], steering: Any = STEERING) -> Tensor:
    with vlm.steering(steering):
        return logits(call)


@pytest.fixture(scope="module")
def wanted() -> tuple[Tensor, Tensor]:
    """Logits without and with steering, of a copy that nobody compiled."""
    vlm = sp.attach(tiny_llava())
    return logits(vlm.root), steered(vlm, vlm.root)


def in_place(hf: Any, backend: Counting) -> nn.Module:
    hf.compile(backend=backend)
    return hf


def wrapped(hf: Any, backend: Counting) -> Any:
    return torch.compile(hf, backend=backend)


def forward_only(hf: Any, backend: Counting) -> nn.Module:
    hf.forward = torch.compile(hf.forward, backend=backend)
    return hf


@pytest.mark.parametrize("compiled", [in_place, wrapped, forward_only])
def test_a_compiled_model_runs_eagerly_while_it_is_steered(compiled: Any, backend, wanted):
    model = compiled(tiny_llava(), backend)
    vlm = sp.attach(model)
    assert torch.equal(steered(vlm, model), wanted[1])
    late = sp.L2S(drawn_network(), "resid_post.1", "resid_post.3")
    plain = sp.attach(tiny_llava())
    assert torch.equal(steered(vlm, model, late), steered(plain, plain.root, late))
    assert backend.made == backend.run == 0
    assert torch.compiler.is_compiling() is False
    with pytest.raises(sp.InputError), vlm.steering(STEERING):
        raise sp.InputError("inside")
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_graph_made_before_is_used_again_afterwards(backend, wanted):
    """It was made without the hooks: while they are in force it must not run, afterwards it must be the same."""
    hf = tiny_llava()
    layer = hf.model.language_model.layers[1]
    layer.compile(backend=backend)
    vlm = sp.attach(hf)
    assert torch.equal(logits(hf), wanted[0])
    made, run = backend.made, backend.run
    assert made and run
    inside = sp.add("attn_out.1", draw(D_MODEL, scale=3))
    plain = sp.attach(tiny_llava())
    assert torch.equal(steered(vlm, hf, inside), steered(plain, plain.root, inside))
    assert torch.equal(steered(vlm, hf), wanted[1])
    assert (backend.made, backend.run) == (made, run)
    assert torch.equal(logits(hf), wanted[0])
    assert backend.made == made and backend.run > run


def test_what_is_compiled_elsewhere_stays_compiled(backend, wanted):
    """Another layer's MLP, and one whose own output is written: its hooks lie around the compiled forward."""
    hf = tiny_llava()
    for number in (1, 3):
        mlp = hf.model.language_model.layers[number].mlp
        mlp.forward = torch.compile(mlp.forward, backend=backend)
    vlm = sp.attach(hf)
    assert torch.equal(steered(vlm, hf), wanted[1])
    assert backend.run == 2
    own = sp.add("mlp_out.1", draw(D_MODEL, scale=3))
    plain = sp.attach(tiny_llava())
    assert torch.equal(steered(vlm, hf, own), steered(plain, plain.root, own))
    assert backend.run == 4
    assert torch.equal(logits(hf), wanted[0])


def test_a_function_of_ones_own_that_hides_the_model_is_spoken_of(backend):
    """Hooks inside its graph never fire, and from outside nothing shows that it ran."""
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    vlm = sp.attach(tiny_llava())
    with pytest.warns(UserWarning, match=r"No forward.*torch\.compile is in use"), vlm.steering(STEERING):
        pass
    text = {key: INPUTS[key][:1, -3:] for key in ("input_ids", "attention_mask")}
    picture = sp.add("projector", draw(D_MODEL), "everywhere")
    unfired = pytest.raises(sp.SiteError, match=r"projector did not run.*torch\.compile is in use")
    with unfired, torch.no_grad(), vlm.steering(picture):
        vlm.root(**text)


def test_blocks_of_the_users_own_refuse_compiled_models(bridge_vlm, nnsight_vlm, backend):
    for vlm in (bridge_vlm, nnsight_vlm):
        vlm.root.compile(backend=backend)
        try:
            with pytest.raises(sp.FrameworkError, match=r"torch\.compile.*vlm\.steering"):
                if vlm is bridge_vlm:
                    vlm.hooks(STEERING)
                else:
                    with vlm.model.trace(**INPUTS):
                        vlm.apply(STEERING)
        finally:
            vlm.root._compiled_call_impl = None


# -- static caches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "rows", "everywhere", "l2s"])
def test_static_caches(vlm, inputs, name: str):
    """Padded rows: the mask comes as (row, 1, query, key) then."""
    how = {"steering": STEERINGS[name], "max_new_tokens": 5, "do_sample": False}
    expected, counts = vlm.generate(**inputs, **how), vlm.counts
    assert torch.equal(vlm.generate(**inputs, **how, cache_implementation="static"), expected)
    assert vlm.counts == counts
    assert not torch.equal(expected, greedy(vlm.root, inputs))


def test_static_caches_with_the_sdpa_kernel_and_without_padding(plain):
    vlm, one = sp.attach(tiny_llava(attn="sdpa")), tiny_inputs(1)
    for inputs in (one, tiny_inputs(3)):
        how = {"steering": STEERINGS["everywhere"], "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(vlm.generate(**inputs, **how, cache_implementation="static"), vlm.generate(**inputs, **how))


def test_decoding_that_generate_compiles_runs_eagerly(torch_vlm, inputs, backend):
    """On a GPU a static cache brings compiled decoding of its own; here it is asked for."""
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    how = {"max_new_tokens": 4, "do_sample": False, "steering": STEERINGS["l2s"]}
    got = torch_vlm.generate(**inputs, **how, cache_implementation="static", compile_config=config)
    vars(torch_vlm.root).pop("_compiled_call", None)
    assert torch.equal(got, torch_vlm.generate(**inputs, **how))
    assert backend.made == 0


@pytest.mark.parametrize(("name", "what"), [("late", "a read behind its write"), ("steervlm", "an unsteered twin")])
def test_static_caches_are_refused_where_a_second_pass_is_needed(vlm, inputs, name: str, what: str):
    with pytest.raises(Exception, match=rf"{what}.*static KV cache.*cache_implementation") as caught:
        vlm.generate(**inputs, steering=STEERINGS[name], max_new_tokens=2, cache_implementation="static")
    assert isinstance(caught.value, sp.FrameworkError)


def test_a_static_cache_is_refused_in_hooks_without_an_end(bridge_vlm, inputs):
    refused = pytest.raises(sp.FrameworkError, match="static KV cache")
    with refused, bridge_vlm.bridge.hooks(fwd_hooks=STEERING.hooks(bridge_vlm)):
        bridge_vlm.root.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_processor_models_too():
    """A static cache over a chat prompt of the processor's."""
    vlm = sp.attach(tiny_llava(), tiny_processor())
    inputs = vlm.inputs(["w10 w11"])
    how = {"steering": sp.add("resid_post.1", draw(D_MODEL, scale=3), "user_end|generated"), "max_new_tokens": 3}
    assert torch.equal(vlm.generate(**inputs, **how, cache_implementation="static"), vlm.generate(**inputs, **how))
