"""Which dimensions gates open, compared between records whose values are known by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from _tiny import D_MODEL, LAYERS, tiny_inputs
from test_steervlm_streams import bound

import steer_plugin as sp
from steer_plugin.analysis import gate_overlap, gate_stability, mean_steps


@pytest.fixture(scope="module")
def records(attached_models: dict[str, Any]) -> dict[str, sp.Record]:
    vlm = attached_models["torch"]
    return {
        name: vlm.record(bound("everywhere"), tiny_inputs(3, seed), reduce=("dim_mean", "none"))
        for name, seed in (("a", 1), ("b", 2))
    }


def by_hand(record: sp.Record, name: str) -> np.ndarray:
    """Mean over the steered tokens of each row, (layer, row, dim), from every single value."""
    return np.nanmean(record.data[name].values.astype(float), 2)


def test_mean_steps(records):
    found = mean_steps(records["a"])
    assert list(found) == [f"layer {layer}" for layer in range(LAYERS)]
    np.testing.assert_allclose(found["layer 2"], by_hand(records["a"], "change")[2].mean(0), rtol=1e-4, atol=1e-7)


def test_overlap(records):
    found = gate_overlap(records, k=6)
    tops = [np.argsort(-np.abs(by_hand(one, "gate").mean(1)), axis=-1)[:, :6] for one in records.values()]
    share = [len(set(x) & set(y)) / 6 for x, y in zip(*(top.tolist() for top in tops), strict=True)]
    np.testing.assert_allclose(found.share[0], share)
    assert found.chance == 6 / D_MODEL
    assert gate_overlap({"a": records["a"], "again": records["a"]}).share.min() == 1
    assert found.to_frame()["share"].tolist() == share
    np.testing.assert_allclose(found.plot().axes[0].lines[0].get_ydata(), share)


def test_stability(records):
    found = gate_stability(records)
    means = by_hand(records["a"], "gate")
    centred = means - means.mean((1, 2), keepdims=True)
    other = (centred[1, 1] + centred[1, 2]) / 2
    cosine = centred[1, 0] @ other / np.linalg.norm(centred[1, 0]) / np.linalg.norm(other)
    assert found.cosine[0, 1, 0] == pytest.approx(cosine, abs=1e-5)
    assert found.to_frame().shape == (2 * LAYERS, 5)
    np.testing.assert_allclose(found.plot().axes[0].containers[0].lines[0].get_ydata(), found.cosine[0].mean(-1))


def test_what_is_refused(records, torch_vlm):
    single = sp.Record(records["a"].data.isel(row=[0]))
    blind = torch_vlm.record(bound("everywhere"), tiny_inputs(3), reduce="mean")
    for call, message in [
        (lambda: gate_overlap({"a": records["a"]}), "at least two records"),
        (lambda: gate_overlap(records, k=0), "k must lie between 1"),
        (lambda: gate_stability({}), "at least one record"),
        (lambda: gate_stability({"one": single}), "a single row"),
        (lambda: mean_steps(blind), "dimensions of 'change' were not kept"),
    ]:
        with pytest.raises(sp.InputError, match=message):
            call()
