"""GGUF control vectors, read back by the gguf package's own reader and by ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import tiny_inputs, tiny_llava
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

import steer_plugin as sp
from steer_plugin.methods.gguf import read_gguf, write_gguf


def written(path: Path, tensors: dict[str, np.ndarray], arch: str = "controlvector", **options: object) -> Path:
    """Write a file with the gguf package alone, as repeng does."""
    writer = GGUFWriter(path, arch)
    for name, data in tensors.items():
        writer.add_tensor(name, data, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_round_trip_through_the_packages_own_reader(tmp_path):
    one, two = torch.randn(32), torch.randn(32)
    write_gguf(
        tmp_path / "v.gguf", [sp.MeanSteering(two, "resid_post.3", alpha=0.5), sp.MeanSteering(one, "resid_post.1")]
    )
    reader = GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert torch.equal(found["direction.1"], one)
    assert torch.equal(found["direction.3"], 0.5 * two)


def test_vectors_that_come_back_steer_as_before(tmp_path):
    steerings = [sp.MeanSteering(5 * torch.randn(32), f"resid_post.{n}", "everywhere", 0.7) for n in (1, 2)]
    write_gguf(tmp_path / "v.gguf", steerings)
    vlm, inputs = sp.attach(tiny_llava()), tiny_inputs(2)
    wanted = vlm.generate(steering=sum(steerings), **inputs, max_new_tokens=5, do_sample=False)
    loaded = sum(read_gguf(tmp_path / "v.gguf"))
    assert torch.equal(vlm.generate(steering=loaded, **inputs, max_new_tokens=5, do_sample=False), wanted)


@pytest.mark.parametrize(
    ("steerings", "message"),
    [
        ([], "at least one"),
        ([sp.MeanSteering(torch.ones(4), "resid_post.0")], r"resid_post\.0"),
        ([sp.MeanSteering(torch.ones(4), "attn_out.2")], r"attn_out\.2"),
        ([sp.MeanSteering(torch.ones(4), "resid_post.2")] * 2, "twice"),
        ([sp.MeanSteering(torch.ones(2, 4), "resid_post.2")], "row or step"),
        ([sp.MeanSteering(torch.ones(4), "resid_post.2", alpha=lambda step: 1.0)], "row or step"),
        ([sp.MeanSteering(torch.ones(4), "resid_post.2", alpha=float("inf"))], "finite"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, steerings, message):
    with pytest.raises(sp.InputError, match=message):
        write_gguf(tmp_path / "v.gguf", steerings)
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_packages_own_writer(tmp_path):
    one, ten = np.arange(8, dtype=np.float32), np.linspace(-1, 1, 8).astype(np.float16)
    found = read_gguf(written(tmp_path / "v.gguf", {"direction.10": ten, "direction.2": one}), "image", alpha=0.5)
    assert [str(one.site) for one in found] == ["resid_post.2", "resid_post.10"]
    assert [(str(one.positions), one.alpha) for one in found] == [("image", 0.5)] * 2
    assert torch.equal(found[0].vector, torch.from_numpy(one))
    assert torch.equal(found[1].vector, torch.from_numpy(ten.astype(np.float32)))


FLOATS = np.ones(8, dtype=np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction.0": FLOATS}, r"'direction\.0', expected direction\.1"),
        ({"direction.last": FLOATS}, r"'direction\.last'"),
        ({"direction.1": FLOATS.reshape(2, 4)}, r"F32 of shape \(4, 2\), expected a vector"),
        ({"direction.1": FLOATS.astype(np.int32)}, "is I32"),
        ({"direction.1": FLOATS * np.nan}, "8 NaN"),
        ({"direction.1": FLOATS, "direction.2": FLOATS[:4]}, r"widths \[4, 8\]"),
        ({"weights": FLOATS}, "expected a control vector"),
    ],
)
def test_control_vectors_that_are_none(tmp_path, tensors, message):
    with pytest.raises(sp.ArtefactError, match=message):
        read_gguf(written(tmp_path / "v.gguf", tensors))


def test_quantised_directions_are_refused(tmp_path):
    path = tmp_path / "v.gguf"
    written(path, {"direction.1": np.zeros(34, dtype=np.uint8)}, raw_dtype=GGMLQuantizationType.Q8_0)
    with pytest.raises(sp.ArtefactError, match="is Q8_0"):
        read_gguf(path)


def test_truncated_and_altered_files(tmp_path):
    """Cut anywhere, or with any byte of its header changed: one kind of error, or a file that still is one."""
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, [sp.MeanSteering(torch.ones(8), f"resid_post.{n}") for n in (1, 2)])
    data, path = whole.read_bytes(), tmp_path / "v.gguf"
    cut = [data[:length] for length in range(0, len(data), 9)]
    altered = [data[:i] + bytes([data[i] ^ 0xA0]) + data[i + 1 :] for i in range(0, 300, 3)]
    refused = 0
    for damaged in cut + altered:
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except sp.ArtefactError:
            refused += 1
    assert refused >= len(cut)


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(sp.JobError, match=r"cannot write the GGUF file .*missing.v\.gguf"):
        write_gguf(tmp_path / "missing" / "v.gguf", [sp.MeanSteering(torch.ones(4), "resid_post.2")])
    with pytest.raises(sp.ArtefactError, match=r"cannot read the GGUF file .*nothing"):
        read_gguf(tmp_path / "nothing.gguf")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.gguf").write_bytes(b"not gguf at all, but long enough to be looked at")
    with pytest.raises(sp.ArtefactError, match=r"text\.gguf"):
        read_gguf(tmp_path / "text.gguf")
    with pytest.raises(sp.ArtefactError, match="'llama'"):
        read_gguf(written(tmp_path / "model.gguf", {}, "llama"))
