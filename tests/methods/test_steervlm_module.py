"""SteerVLM's networks: size, structure of attention, ablations, precision, saving; against a dense masked reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import steer_plugin as sp
from steer_plugin.methods.steervlm import SteerVLMModule

D, LAYERS = 32, 3


def made(seed: int = 0, **options: Any) -> SteerVLMModule:
    config = sp.SteerVLMConfig(D, LAYERS, **{"reduction": 4, "heads": 2, **options})
    module = sp.SteerVLM.new(config, seed).module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0)
    return module


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int = 2, pos: int = 5, plus: int = 3, minus: int = 4) -> tuple[Tensor, ...]:
    return draw(rows, pos, D), draw(rows, pos, D, seed=1), draw(rows, plus, D, seed=2), draw(rows, minus, D, seed=3)


def run(module: SteerVLMModule, x: Tensor, u: Tensor | None, plus: Tensor, minus: Tensor) -> tuple[Tensor, Any, Tensor]:
    real = [torch.ones(side.shape[:2], dtype=torch.bool) for side in (plus, minus)]
    return module(x, u, module.remember(plus, real[0], minus, real[1]))


def dense(module: SteerVLMModule, x: Tensor, u: Tensor, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence [x_1..x_T, u_1..u_T, p+, p-] under torch's own attention and an N x N mask."""
    steerer, gate, heads = module.steerer, module.gate, module.config.heads
    pos, n_plus, n_minus = x.shape[1], plus.shape[1], minus.shape[1]
    allowed = torch.zeros(pos, 2 * pos + n_plus + n_minus, dtype=torch.bool)
    for t in range(pos):
        allowed[t, t] = allowed[t, pos + t] = True
        allowed[t, 2 * pos :] = True
    kinds = torch.cat([torch.full((n,), k) for k, n in enumerate((pos, pos, n_plus, n_minus))])
    h = steerer.down(x)
    others = steerer.down(torch.cat([u, plus, minus], 1))
    for layer in steerer.attention:
        tokens = layer.norm(torch.cat([h, others], 1)) + steerer.kinds()[kinds]
        attention = nn.MultiheadAttention(h.shape[-1], heads, batch_first=True)
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
            attention.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]))
            attention.out_proj.weight.copy_(layer.out.weight)
            attention.out_proj.bias.copy_(layer.out.bias)
            h = h + attention(tokens[:, :pos], tokens, tokens, attn_mask=~allowed, need_weights=False)[0]
    s = steerer.up(h)
    means = [gate.norm(steerer.down(side).mean(1, keepdim=True)).expand(-1, pos, -1) for side in (plus, minus)]
    g = torch.sigmoid(gate.mlp(torch.cat([gate.norm(steerer.down(s)), *means], -1)))
    return s, g, g * s


def test_equals_a_dense_masked_reference():
    module = made()
    for got, expected in zip(run(module, *inputs()), dense(module, *inputs()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 1e-3


@settings(max_examples=25)
@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 50))
def test_a_token_looks_at_no_other_token(token: int, plus: int, minus: int, seed: int):
    module, (x, u, p, m) = made(), inputs(2, 7, plus, minus)
    others = [t for t in range(7) if t != token]
    changed_x, changed_u = x.clone(), u.clone()
    changed_x[:, others], changed_u[:, others] = draw(2, 6, D, seed=seed), draw(2, 6, D, seed=seed + 1)
    before, after = run(module, x, u, p, m)[2], run(module, changed_x, changed_u, p, m)[2]
    torch.testing.assert_close(before[:, token], after[:, token], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[:, others], after[:, others])


@pytest.mark.parametrize("which", ["x", "u", "plus", "minus"])
def test_every_input_counts(which: str):
    module, given_ = made(), dict(zip(("x", "u", "plus", "minus"), inputs(), strict=True))
    before = run(module, *given_.values())[2]
    given_[which] = given_[which] + 1.0
    assert (run(module, *given_.values())[2] - before).abs().max() > 1e-3


def test_padded_pair_tokens_count_for_nothing():
    module, (x, u, plus, minus) = made(), inputs()
    whole = run(module, x, u, plus, minus)[2]
    for front in (False, True):
        junk = draw(2, 3, D, seed=9) * 100
        padded = torch.cat([junk, plus] if front else [plus, junk], 1)
        real = torch.zeros(2, 6, dtype=torch.bool)
        real[:, slice(3, 6) if front else slice(0, 3)] = True
        memory = module.remember(padded, real, minus, torch.ones(2, 4, dtype=torch.bool))
        torch.testing.assert_close(module(x, u, memory)[2], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", ["mean", "last"])
def test_pooled_pairs(pair: str):
    tokens, pooled, (x, u, plus, minus) = made(), made(pair=pair), inputs()
    short = (side.mean(1, keepdim=True) if pair == "mean" else side[:, -1:] for side in (plus, minus))
    torch.testing.assert_close(run(pooled, x, u, plus, minus)[0], run(tokens, x, u, *short)[0], rtol=1e-5, atol=1e-5)


def test_ablations():
    x, u, plus, minus = inputs()
    s, g, change = run(made(gate=False), x, u, plus, minus)
    assert g is None
    assert torch.equal(s, change)
    without = made(unsteered=False)
    assert torch.equal(run(without, x, u, plus, minus)[2], run(without, x, None, plus, minus)[2])


@pytest.mark.parametrize(
    "options", [{}, {"gate_down": "own", "gate_width": "bottleneck"}, {"types": False, "norm": "none"}, {"bias": False}]
)
def test_size_at_d_model_4096(options: dict[str, Any]):
    """0.14 % of LLaVA-1.5-7B: 9.1 to 10.2 M of its 7,062,902,784 parameters, by rounding and by what is counted."""
    module = SteerVLMModule(sp.SteerVLMConfig(4096, 32, **options))
    assert 9.1e6 <= sum(p.numel() for p in module.parameters()) <= 10.2e6


def test_the_steerer_alone_has_the_published_parts():
    module = SteerVLMModule(sp.SteerVLMConfig(4096, 32, types=False, norm="none"))
    assert sum(p.numel() for p in module.steerer.parameters()) == 6_300_160


@pytest.mark.parametrize("d_model,heads,reduction", [(24, 3, 8), (64, 1, 8), (96, 4, 2), (30, 5, 3)])
@pytest.mark.parametrize("width", ["model", "bottleneck"])
def test_any_width(d_model: int, heads: int, reduction: int, width: str):
    module = SteerVLMModule(sp.SteerVLMConfig(d_model, 2, reduction=reduction, heads=heads, gate_width=width))
    x, plus = draw(1, 4, d_model), draw(1, 2, d_model)
    s, g, change = run(module, x, x, plus, plus)
    assert s.shape == change.shape == x.shape
    assert ((g > 0) & (g < 1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_streams_of_other_precision(dtype: torch.dtype):
    """A float32 module computes in float32 whatever the model's precision: only the inputs' rounding differs."""
    module = made()
    x, u, plus, minus = (t.to(dtype) for t in inputs())
    got = run(module, x, u, plus, minus)[2]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, run(module, *(t.float() for t in (x, u, plus, minus)))[2])


def test_a_module_of_lower_precision():
    whole, half = made(), made().to(torch.bfloat16)
    expected = run(whole, *inputs())[2]
    assert (run(half, *inputs())[2].float() - expected).norm() < 0.05 * expected.norm()


def test_long_sequences_take_memory_by_their_length():
    """T = 4,096 at d_model 1024 and 64 pair tokens: an N x N mask alone would take 67 MB a head, in float32."""
    code = """
import resource, torch, steer_plugin as sp
module = sp.SteerVLM.new(sp.SteerVLMConfig(1024, 24)).module
x, plus, real = torch.randn(1, 4096, 1024), torch.randn(1, 32, 1024), torch.ones(1, 32, dtype=torch.bool)
memory = module.remember(plus, real, plus, real)
with torch.no_grad():
    module(x[:, :64], x[:, :64], memory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module(x, x, memory)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # Three results of 16 MB, the gate's and the attention's parts, and what the allocator keeps.
    assert float(out) < 250


@pytest.mark.parametrize(
    "options,message",
    [
        ({"d_model": 30}, "multiple of reduction"),
        ({"heads": 3}, "fewer heads"),
        ({"heads": 0}, "at least 1"),
        ({"norm": "post"}, "norm must be one of 'pre', 'none', got 'post'"),
        ({"pair": "first"}, "'tokens', 'mean', 'last'"),
        ({"picture": "some"}, "'none', 'input'"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str):
    with pytest.raises(sp.InputError, match=message):
        sp.SteerVLMConfig(**{"d_model": 32, "n_layers": 2, "heads": 2, "reduction": 4, **options})


def test_saving_and_loading(tmp_path: Path):
    first = sp.SteerVLM(
        made(), positions="everywhere", alpha=1.5, model={"family": "llava", "d_model": D, "n_layers": 3}
    )
    first = first.pair(["w7", "w8"], ["w9", "w10"])
    first.save(tmp_path / "a")
    again = sp.SteerVLM.load(tmp_path / "a")
    assert again.pairs == (("w7", "w9"), ("w8", "w10"))
    assert (str(again.positions), again.alpha, again.model) == ("everywhere", 1.5, dict(first.model))
    assert torch.equal(run(again.module, *inputs())[2], run(first.module, *inputs())[2])
    assert not any(p.requires_grad for p in again.module.parameters())


def test_a_checkpoint_of_another_config(tmp_path: Path):
    sp.SteerVLM(made()).save(tmp_path / "a")
    meta = next(path for path in (tmp_path / "a").glob("*.json") if "config" in path.read_text())
    stored = json.loads(meta.read_text())

    def edit(node: Any) -> None:
        if isinstance(node, dict):
            if "reduction" in node:
                node["reduction"] = 8
            for value in node.values():
                edit(value)

    edit(stored)
    meta.write_text(json.dumps(stored))
    with pytest.raises(sp.ArtefactError):
        sp.SteerVLM.load(tmp_path / "a")


@pytest.mark.parametrize(
    "plus,minus", [("", "w7"), ("w7", " "), ([], []), (["w7", "w8"], ["w9"]), (["w7", ""], ["w8", "w9"])]
)
def test_bad_pairs(plus: Any, minus: Any):
    with pytest.raises(sp.InputError, match=r"not empty|as many of each"):
        sp.SteerVLM(made()).pair(plus, minus)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_bad_lambda(alpha: float):
    with pytest.raises(sp.InputError, match="finite"):
        sp.SteerVLM(made()).with_alpha(alpha)
