"""What is recorded is what the module computes, token by token; reductions, summaries and files agree with it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import D_MODEL, IMAGE, LAYERS, Recorder, draw, hand_masks, plain_hooks, single_row, tiny_inputs
from test_steervlm_streams import PAIRS, Naive, bound, steervlm
from torch import Tensor
from transformers import GenerationConfig

import steer_plugin as sp
from steer_plugin.record import CLASSES

NAMES = ("gate", "s", "change")
FIRST = {"max_new_tokens": 4, "do_sample": False}


def by_hand(naive: Naive, row: int, ids: Tensor, inputs: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """(layer, token, dim) of one row: an unsteered pass over the whole text, then a steered one."""
    whole = {**single_row(inputs, row), "input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    u: dict[int, Tensor] = {}
    got: dict[str, list[Tensor]] = {name: [] for name in NAMES}

    def steer(h: Tensor, layer: int) -> Tensor:
        s, gate, change = naive.made.module(h, u[layer], naive.memory[row][layer])
        for name, value in zip(NAMES, (gate, s, change), strict=True):
            got[name].append(value[0])
        return torch.where(mask[None, :, None], h + change, h)

    with torch.no_grad():
        with plain_hooks(
            naive.plain, *(("attn_out", at, lambda h, at=at: u.update({at: h.clone()})) for at in range(LAYERS))
        ):
            naive.plain(**whole)
        with plain_hooks(naive.plain, *(("attn_out", at, lambda h, at=at: steer(h, at)) for at in range(LAYERS))):
            naive.plain(**whole)
    return {name: torch.stack(values) for name, values in got.items()}


@pytest.mark.parametrize("where", ["last_prompt|generated", "everywhere", "image"])
@pytest.mark.parametrize("cached", [True, False])
def test_equals_the_module_by_hand(vlm, plain, inputs, where: str, cached: bool):
    record = vlm.record(bound(where), inputs, reduce="none", use_cache=cached, **FIRST)
    naive = Naive(plain, vlm, bound(), PAIRS)
    prompt, decoding = hand_masks(inputs)[where]
    columns = record.data["token"].values
    for row in range(3):
        real = torch.cat([inputs["attention_mask"][row].bool(), torch.ones(3).bool()])
        mask = torch.cat([prompt[row], torch.full((3,), decoding)])
        expected = by_hand(naive, row, record.ids[row, :-1][real], inputs, mask[real])
        chosen = record.data["valid"].values[:, row]
        assert (chosen == chosen[0]).all()
        assert columns[chosen[0]].tolist() == mask.nonzero()[:, 0].tolist()
        for name in NAMES:
            values = torch.from_numpy(record.data[name].values[:, row])
            torch.testing.assert_close(values[:, chosen[0]], expected[name][:, mask[real]], rtol=1e-4, atol=1e-5)
            assert values[:, ~chosen[0]].isnan().all()


@pytest.mark.parametrize("where", ["last_prompt|generated", "everywhere", "generated", "text"])
def test_counts_and_labels(vlm, inputs, where: str):
    record = vlm.record(bound(where), inputs, reduce=("mean", "dim_mean"), **FIRST)
    data = record.data
    assert data["valid"].sum("token").values.tolist() == vlm.counts
    assert data["tokens"].sum("class").values.tolist() == vlm.counts
    assert data["layer"].values.tolist() == list(range(LAYERS))
    assert data["site"].values.tolist() == [f"attn_out.{layer}" for layer in range(LAYERS)]
    width = inputs["input_ids"].shape[1]
    assert data["step"].values.tolist() == [max(0, c - width + 1) for c in data["token"].values]
    classes = data["token_class"].values
    ids = record.ids.numpy()[:, data["token"].values]
    assert ((classes == "image") == (ids == IMAGE)).all()
    assert ((classes == "generated") == (data["token"].values >= width)).all()
    assert ((classes == "last_prompt") == (data["token"].values == width - 1)).all()
    padding = data["token"].values < (width - inputs["attention_mask"].sum(-1).numpy())[:, None]
    assert ((classes == "padding") == padding).all()
    assert record.generated.shape == (3, 4)
    assert torch.equal(record.ids[:, :width], inputs["input_ids"])


def test_prompt_alone_and_ragged_rows(vlm):
    """Padded at the end, rows have their last token in other columns."""
    inputs = tiny_inputs(3, side="right")
    record = vlm.record(bound("last_prompt"), inputs, reduce=("none", "norm"))
    ends = (inputs["attention_mask"].sum(-1) - 1).tolist()
    assert record.data["token"].values.tolist() == sorted(ends)
    assert record.data["valid"].values.sum((0, 2)).tolist() == [LAYERS] * 3
    assert record.generated.shape == (3, 0)
    for row, end in enumerate(ends):
        alone = vlm.record(
            bound_row(row).with_positions("last_prompt"),
            {**single_row(inputs, row), "input_ids": inputs["input_ids"][row : row + 1, : end + 1]}, reduce="none",
        )  # fmt: skip
        one = record.data["gate"].sel(token=end).values[:, row]
        np.testing.assert_allclose(one, alone.data["gate"].values[:, 0, 0], rtol=1e-4, atol=1e-5)


def bound_row(row: int) -> sp.SteerVLM:
    return bound().pair(*PAIRS[row])


@pytest.fixture(scope="module")
def everything(attached_models: dict[str, Any]) -> sp.Record:
    vlm = attached_models["torch"]
    return vlm.record(bound("everywhere"), tiny_inputs(3), reduce=("none", "mean", "norm", "dim_mean"), **FIRST)


def test_reductions_agree_with_the_whole(everything):
    data, valid = everything.data, everything.data["valid"].values
    for name in NAMES:
        values = data[name].values
        np.testing.assert_allclose(data[f"{name}_mean"].values, values.mean(-1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(data[f"{name}_norm"].values, np.linalg.norm(values, axis=-1), rtol=1e-5)
        assert (np.isnan(values).all(-1) == ~valid).all()
        for number, one in enumerate(CLASSES):
            chosen = valid & (data["token_class"].values == one)
            assert (data["tokens"].values[..., number] == chosen.sum(-1)).all()
            if chosen.any():
                mean = np.where(chosen[..., None], values, 0).sum(2) / chosen.sum(2)[..., None]
                np.testing.assert_allclose(data[f"{name}_dim_mean"].values[:, :, number], mean, rtol=1e-4, atol=1e-6)
            else:
                assert np.isnan(data[f"{name}_dim_mean"].values[:, :, number]).all()


def test_reductions_agree_between_runs(vlm, inputs):
    steering = bound("everywhere")
    whole = vlm.record(steering, inputs, reduce="none", **FIRST)
    for reduction in ("mean", "norm", "dim_mean"):
        one = vlm.record(steering, inputs, reduce=reduction, keep="gate", **FIRST)
        assert torch.equal(one.ids, whole.ids)
        lines = whole.summary(("layer", "class"), "gate")
        assert one.summary(("layer", "class")).equals(lines)
    mean = one.summary(("layer", "dim"))["mean"]
    np.testing.assert_allclose(mean, whole.summary(("layer", "dim"), "gate")["mean"], rtol=1e-5)
    assert "token" not in one.data.dims  # nothing in it grows with the tokens
    assert one.top_dimensions("gate", 3)["dim"].tolist() == whole.top_dimensions("gate", 3)["dim"].tolist()


def test_summary_is_over_the_chosen_values(everything):
    values, valid = everything.data["gate"].values.astype(np.float64), everything.data["valid"].values
    classes = np.broadcast_to(everything.data["token_class"].values, valid.shape)
    frames = (
        everything.summary(("class", "layer")),
        everything.summary("row"),
        everything.summary("dim"),
        everything.summary(()),
    )
    of_gate = [frame[frame["name"] == "gate"] for frame in frames]
    assert list(of_gate[0]["class"].unique()) == ["image", "text", "last_prompt", "generated"]
    cases = [
        (line, values[line["layer"]][valid[line["layer"]] & (classes[0] == line["class"])])
        for _, line in of_gate[0].iterrows()
    ]
    cases += [(line, values[:, line["row"]][valid[:, line["row"]]]) for _, line in of_gate[1].iterrows()]
    cases += [(line, values[valid][:, line["dim"], None]) for _, line in of_gate[2].iterrows()]
    cases += [(line, values[valid]) for _, line in of_gate[3].iterrows()]
    assert len(cases) == 4 * LAYERS + 3 + D_MODEL + 1
    for line, x in cases:
        assert line["tokens"] == len(x)
        found = [line[key] for key in ("mean", "std", "min", "max", "open")]
        np.testing.assert_allclose(found, [x.mean(), x.std(), x.min(), x.max(), (x > 0.5).mean()], rtol=1e-5, atol=1e-7)
        if x.shape[1] > 1:
            root = np.sqrt(D_MODEL)
            hoyer = (root - np.abs(x).sum(1) / np.linalg.norm(x, axis=1)) / (root - 1)
            np.testing.assert_allclose(line["sparsity"], hoyer.mean(), rtol=1e-4, atol=1e-5)


def test_tables(everything):
    valid = everything.data["valid"].values
    frame = everything.to_frame()
    assert len(frame) == valid.sum()
    assert list(frame.columns[:6]) == ["layer", "row", "token", "step", "id", "class"]
    assert set(frame.columns[6:]) == {f"{name}_{kind}" for name in NAMES for kind in ("mean", "norm")}
    line = frame.iloc[-1]
    one = everything.data.sel(layer=line["layer"], token=line["token"]).isel(row=line["row"])
    assert line["gate_mean"] == float(one["gate_mean"])
    assert line["id"] == int(everything.ids[line["row"], line["token"]])
    whole = everything.to_frame("s")
    assert len(whole) == valid.sum() * D_MODEL
    assert np.array_equal(whole["s"].to_numpy().reshape(-1, D_MODEL), everything.data["s"].values[valid])
    assert len(everything.to_frame("s_dim_mean")) == (everything.data["tokens"].values > 0).sum() * D_MODEL
    top = everything.top_dimensions("gate", 3)
    assert top["rank"].tolist() == [0, 1, 2] * LAYERS
    means = everything.data["gate"].values[0][valid[0]].mean(0)
    assert top["dim"].tolist()[:3] == np.argsort(-means)[:3].tolist()


def test_saved_and_loaded(everything, tmp_path):
    everything.save(tmp_path / "record")
    loaded = sp.Record.load(tmp_path / "record")
    assert loaded.data.identical(everything.data)
    assert loaded.names == NAMES
    assert repr(loaded) == repr(everything)
    assert {path.suffix for path in (tmp_path / "record").iterdir()} == {".json", ".safetensors"}
    bound().save(tmp_path / "other")
    with pytest.raises(sp.ArtefactError, match="'steervlm', expected 'record'"):
        sp.Record.load(tmp_path / "other")


@pytest.mark.parametrize("where", ["last_prompt|generated", "everywhere"])
def test_recording_changes_nothing(vlm, inputs, where: str):
    kept: list[tuple[Tensor, list[Tensor]]] = []
    for recording in (False, True, False):
        scores = Recorder()
        options = {**FIRST, "logits_processor": [scores]}
        if recording:
            ids = vlm.record(bound(where), inputs, reduce=("none", "mean", "norm", "dim_mean"), **options).ids
        else:
            ids = vlm.generate(**inputs, steering=bound(where), **options)
        kept.append((ids, scores.scores))
    for ids, scores in kept[1:]:
        assert torch.equal(ids, kept[0][0])
        assert len(scores) == 4
        assert all(torch.equal(one, other) for one, other in zip(scores, kept[0][1], strict=True))


def test_nothing_is_recorded_unless_asked(vlm, inputs):
    noted: list[object] = []

    def delta(hidden: Tensor, context: sp.Context) -> Tensor:
        noted.append(context.note)
        return hidden * 0.1

    steering = sp.Intervention((sp.Write(sp.attn_out(1), sp.Positions.parse("paper"), delta),))
    vlm.record(bound() + steering, inputs, keep="gate")
    assert len(noted) == 1
    assert noted.pop() is not None
    vlm.generate(**inputs, steering=steering, **FIRST)
    assert noted == [None] * 4


def test_the_stack_is_in_force(vlm, inputs):
    added = sp.add("resid_post.0", draw(D_MODEL), "everywhere")
    alone = vlm.record(bound(), inputs, reduce="none")
    summed = vlm.record(bound() + added, inputs, reduce="none")
    with vlm.steering(added):
        nested = vlm.record(bound(), inputs, reduce="none")
    assert np.array_equal(nested.data["gate"], summed.data["gate"])
    assert np.array_equal(nested.data["gate"][0], alone.data["gate"][0])
    assert not np.array_equal(nested.data["gate"][1], alone.data["gate"][1])
    with vlm.steering(bound()):
        assert vlm.record(None, inputs, reduce="none").data.identical(alone.data)


def test_ended_rows_are_not_recorded(vlm, inputs):
    """A row that ends early is fed padding while the others go on: none of it counts, as if the row were alone."""
    free = vlm.generate(**inputs, steering=bound(), max_new_tokens=6, do_sample=False)[:, -6:]
    firsts = {token: row.index(token) for row in free.tolist() for token in row}
    end = next(token for token, first in firsts.items() if 1 < first < 5)
    record = vlm.record(
        bound(), inputs, max_new_tokens=6, do_sample=False, eos_token_id=end, reduce=("mean", "dim_mean")
    )
    counts = record.data["tokens"].sum("class").values
    for row in range(3):
        said = free[row].tolist()
        # Alone: the last prompt token, and each new token but the last, be it the ending or the sixth.
        expected = said.index(end) + 1 if end in said else 6
        assert (counts[:, row] == expected).all()
        one = bound_row(row)
        alone = vlm.record(one, single_row(inputs, row), max_new_tokens=6, do_sample=False, eos_token_id=end)
        assert (alone.data["tokens"].sum("class").values == expected).all()
        mine = record.summary(("row", "layer"), "gate")
        np.testing.assert_allclose(mine[mine["row"] == row]["mean"], alone.summary(name="gate")["mean"], rtol=1e-4)
    assert 1 < counts.min() < counts.max()
    assert record.data["valid"].sum("token").values.tolist() == counts.tolist()


def test_returned_sequences_are_rows(vlm, inputs):
    torch.manual_seed(3)
    record = vlm.record(bound(), inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert record.data.sizes["row"] == len(record.ids) == 6
    assert (record.data["tokens"].sum("class") == 3).all()


def test_ablations(torch_vlm, inputs):
    small = steervlm(gate_width="bottleneck").pair("w20", "w30")
    record = torch_vlm.record(small, inputs, reduce=("none", "dim_mean"))
    assert record.data["gate"].dims[-1] == "dim_gate"
    assert record.data["gate"].shape[-1] == D_MODEL // 2
    assert record.data["s"].shape[-1] == D_MODEL
    assert len(record.summary("dim")) == D_MODEL // 2 + 2 * D_MODEL
    without = torch_vlm.record(steervlm(gate=False).pair("w20", "w30"), inputs)
    assert (without.summary(name="gate")[["mean", "min", "max", "open"]] == 1).all().all()
    np.testing.assert_array_equal(without.data["s_mean"], without.data["change_mean"])


def test_embeddings_without_ids(torch_vlm):
    embeds = draw(2, 5, D_MODEL)
    record = torch_vlm.record(bound("everywhere", rows=2), {"inputs_embeds": embeds}, max_new_tokens=3, do_sample=False)
    assert (record.ids[:, :5] == -1).all()
    assert (record.generated >= 0).all()
    assert record.generated.shape == (2, 3)
    assert record.data["tokens"].sum(["layer", "row"]).values.tolist() == [
        0,
        4 * 2 * LAYERS,
        2 * LAYERS,
        0,
        2 * 2 * LAYERS,
    ]


def noting(*notes: tuple[str, Any], layer: int = 1, where: str = "everywhere") -> sp.Intervention:
    """A write that notes what it is told to."""

    def delta(hidden: Tensor, context: sp.Context) -> Tensor:
        if context.note is not None:
            for name, make in notes:
                context.note(name, make(hidden))
        return hidden * 0.1

    return sp.Intervention((sp.Write(sp.mlp_out(layer), sp.Positions.parse(where), delta),))


def test_any_delta_may_note(vlm, inputs):
    record = vlm.record(noting(("twice", lambda h: 2 * h)), inputs, keep="twice", reduce="none")
    stream = vlm.cache(inputs, "mlp_out.1")[sp.mlp_out(1)]
    values = torch.from_numpy(record.data["twice"].values[0])
    real = inputs["attention_mask"].bool()
    for row in range(3):
        torch.testing.assert_close(values[row][real[row]], 2 * stream[row, : int(real[row].sum())])


def test_refusals(vlm, inputs):
    def refused(match: str, steering: Any = None, error: type[Exception] = sp.InputError, **options: Any) -> None:
        with pytest.raises(error, match=match) as caught:
            vlm.record(bound() if steering is None else steering, inputs, **options)
        assert isinstance(caught.value, sp.SteeringError)

    refused("nothing was noted.*SteerVLM does", sp.add("resid_post.1", draw(D_MODEL)))
    refused("strength 0 is not run", bound() * 0.0)
    refused("nothing notes 'gaet'.*'gate'.*notes: s, gate, change", keep=("gaet",))
    refused("unknown reduction 'nrom'.*'norm'.*none, mean, norm, dim_mean", reduce=("nrom",))
    refused("names to keep", keep=())
    refused("names to keep", reduce=())
    refused("2 beams", max_new_tokens=2, num_beams=2)
    refused("3 beams", max_new_tokens=2, generation_config=GenerationConfig(num_beams=3))
    refused("return_dict_in_generate", max_new_tokens=2, return_dict_in_generate=True)
    refused("do_sample belong to generation", do_sample=False)
    refused("got -1", max_new_tokens=-1)
    refused("no token was steered", bound("generated"), sp.PositionError)
    refused("matched no token", bound("generated"), sp.PositionError, max_new_tokens=1)
    refused("two writes note 's' at layer 0", bound() + bound())
    refused("two writes note 's' at layer 1", bound() + noting(("s", torch.clone)))
    refused(r"noted 'x' as \(3, 32\)", noting(("x", lambda h: h[:, 0])), keep="x")
    refused(
        "'x' was not noted on the same tokens of layer 0.*keep='x'",
        bound() + noting(("x", torch.clone)),
        keep=("x", "gate"),
    )
    other = noting(("a", torch.clone)) + noting(("b", torch.clone), where="paper")
    refused("'b' was not noted on the same tokens of layer 1.*keep='b'", other, keep=("a", "b"))
    wide = noting(("x", torch.clone)) + noting(("x", lambda h: h[..., :3]), layer=2)
    refused("'x' has 3 dimensions", wide, keep="x")
    refused("stored as 'tokens', which is taken", noting(("tokens", torch.clone)), keep="tokens", reduce="none")


def test_bad_questions(everything, torch_vlm, inputs):
    with pytest.raises(sp.InputError, match=r"summary by 'layers'.*'layer'"):
        everything.summary("layers")
    with pytest.raises(sp.InputError, match=r"'gat' was not recorded.*'gate'"):
        everything.summary(name="gat")
    with pytest.raises(sp.InputError, match="at least 1, got 0"):
        everything.top_dimensions("gate", 0)
    with pytest.raises(sp.InputError, match="different dimensions"):
        everything.to_frame("gate", "gate_mean")
    with pytest.raises(sp.InputError, match=r"no variable 'gate_men'.*'gate_mean'"):
        everything.to_frame("gate_men")
    means = torch_vlm.record(bound(), inputs)
    with pytest.raises(sp.InputError, match="dimensions of 'gate' were not kept, only mean"):
        means.top_dimensions("gate")


def test_without_xarray(torch_vlm, inputs, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(sp.FrameworkError, match=r"pip install 'steer-plugin\[analysis\]'"):
        torch_vlm.record(bound(), inputs)
