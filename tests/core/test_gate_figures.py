"""Figures of records: axes, labels and the data behind them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from _tiny import D_MODEL, LAYERS, tiny_inputs
from test_steervlm_streams import bound

import steer_plugin as sp
from steer_plugin.analysis import plot_gates, plot_profile


@pytest.fixture(scope="module")
def record(attached_models: dict[str, Any]) -> sp.Record:
    return attached_models["torch"].record(
        bound("everywhere"), tiny_inputs(3), max_new_tokens=4, do_sample=False, reduce=("mean", "norm", "dim_mean")
    )


def parts(figure: Any) -> tuple[Any, Any, np.ndarray]:
    axes, bar = figure.axes
    figure.canvas.draw()
    return axes, bar, np.asarray(axes.images[0].get_array().filled(np.nan))


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_by_token(record):
    axes, bar, values = parts(plot_gates(record))
    means = record.data["gate_mean"].mean("row", skipna=True).values
    np.testing.assert_allclose(values, means, rtol=1e-5)
    assert axes.get_ylabel() == "layer"
    assert ticks(axes.yaxis) == [str(layer) for layer in range(LAYERS)]
    assert axes.get_xlabel() == f"{record.data.sizes['token']} columns, mean of 3 rows, by token class"
    assert ticks(axes.xaxis) == ["text", "image", "text", "last prompt", "generated"]
    assert bar.get_ylabel() == "mean gate over dimensions"


def test_by_token_of_one_row(record):
    axes, bar, values = parts(plot_gates(record, "change_norm", row=0))
    valid = record.data["valid"].values[0, 0]
    np.testing.assert_allclose(values, record.data["change_norm"].values[:, 0][:, valid], rtol=1e-6)
    assert axes.get_xlabel() == f"{valid.sum()} tokens of row 0, by token class"
    assert ticks(axes.xaxis) == ["text", "image", "text", "last prompt", "generated"]
    assert [int(x) for x in axes.get_xticks()] == [0, 3, 7, 10, 12]
    assert bar.get_ylabel() == "change norm"


def test_of_whole_values(torch_vlm, inputs):
    whole = torch_vlm.record(bound(), inputs, reduce="none")
    _, _, values = parts(plot_gates(whole))
    np.testing.assert_allclose(values, whole.data["gate"].mean(["row", "dim"]).values, rtol=1e-5)


def test_by_dimension(record):
    axes, bar, values = parts(plot_gates(record, "s", x="dim"))
    frame = record.summary(("layer", "dim"), "s")
    np.testing.assert_allclose(values.reshape(-1), frame["mean"], rtol=1e-6)
    assert values.shape == (LAYERS, D_MODEL)
    assert axes.get_xlabel() == "hidden dimension"
    assert bar.get_ylabel() == f"mean s over {int(record.data['tokens'][0].sum())} tokens"
    low, high = axes.images[0].get_clim()
    assert low == -high == -np.abs(values).max()  # signed: no change is the middle of the colours


def test_by_class(record):
    axes, bar, values = parts(plot_gates(record, x="class"))
    frame = record.summary(("layer", "class"), "gate")
    np.testing.assert_allclose(values.reshape(-1), frame["mean"], rtol=1e-6)
    assert ticks(axes.xaxis) == ["image", "text", "last prompt", "generated"]
    assert axes.get_xlabel() == "token class"
    assert bar.get_ylabel() == "mean gate"


def test_profile(record, torch_vlm, inputs):
    other = torch_vlm.record(bound(), inputs)
    figure = plot_profile({"rain": record, "snow": other})
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rain", "snow"]
    assert axes.get_xlabel() == "layer"
    assert axes.get_ylabel() == "mean gate over tokens and dimensions"
    for line, one in zip(axes.get_lines(), (record, other), strict=True):
        assert line.get_xdata().tolist() == list(range(LAYERS))
        np.testing.assert_allclose(line.get_ydata(), one.summary(name="gate")["mean"])


def test_no_window(record):
    import matplotlib.pyplot as plt

    open_before = plt.get_fignums()
    plot_gates(record)
    assert plt.get_fignums() == open_before


def test_refusals(record, torch_vlm, inputs, monkeypatch):
    with pytest.raises(sp.InputError, match=r"by 'tokens'.*'token'"):
        plot_gates(record, x="tokens")
    with pytest.raises(sp.InputError, match="rows 0 to 2, got 3"):
        plot_gates(record, row=3)
    with pytest.raises(sp.InputError, match="by token only"):
        plot_gates(record, x="class", row=0)
    with pytest.raises(sp.InputError, match="no value of 'gat' per token; it has gate_mean"):
        plot_gates(record, "gat")
    with pytest.raises(sp.InputError, match="'gat' was not recorded"):
        plot_gates(record, "gat", x="class")
    with pytest.raises(sp.InputError, match="at least one record"):
        plot_profile({})
    means = torch_vlm.record(bound(), inputs, reduce="dim_mean")
    with pytest.raises(sp.InputError, match=r"none at all.*reduce='mean'"):
        plot_gates(means)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(sp.FrameworkError, match=r"pip install 'steer-plugin\[analysis\]'"):
        plot_gates(record)


def test_a_notebook_shows_it_without_pyplot(record):
    assert plot_gates(record)._repr_png_().startswith(b"\x89PNG")
