"""L2S: the network, its published weights, saving, and what it adds to the stream."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from _shifts import law_shifts
from _tiny import tiny_inputs, tiny_llava
from torch import nn

import steer_plugin as sp
from steer_plugin.methods import SteeringNetwork

PUBLISHED = {
    "llava_14_average_all_pope_train_-1.pt": (4096, "resid_post.14", "resid_post.14", 1.0),
    "llava_mmsb_steering_net_v3_multi_nobias_K100.pt": (4096, "resid_post.15", "resid_post.30", 2.2),
    "qwen_14_last_input_multi_mmsb_train_-1_v2.pt": (3584, "resid_post.14", "resid_post.14", 2.2),
}


class AuthorsNet(nn.Module):
    """The published architecture, from its description: Linear with bias, Tanh, Linear without."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(d_model, 100), nn.Linear(100, d_model, bias=False)

    def forward(self, h):
        return self.decoder(nn.Tanh()(self.encoder(h)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_predict_what_the_authors_class_predicts(shared, name):
    d_model, write, read, alpha = PUBLISHED[name]
    path = shared / "data" / "l2s_checkpoints" / name
    l2s = sp.L2S.from_published(path)
    state = torch.load(path, weights_only=True, map_location="cpu")
    authors = AuthorsNet(d_model)
    authors.load_state_dict({k: v.float() for k, v in state.get("steering_model", state).items() if "coder" in k})
    h = torch.randn(5, d_model)
    torch.testing.assert_close(l2s.predict(h), authors(h), atol=1e-5, rtol=1e-5)
    assert (str(l2s.write), str(l2s.read.site), l2s.alpha) == (write, read, alpha)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_say_their_model_and_what_they_were_trained_on(shared, name, tmp_path):
    l2s = sp.L2S.from_published(shared / "data" / "l2s_checkpoints" / name)
    d_model, context = PUBLISHED[name][0], "user_end" if "mmsb" in name else "last_prompt"
    family, called, n_layers = (
        ("llava", "llava-1.5-7b-hf", 32) if d_model == 4096 else ("qwen2_vl", "Qwen2-VL-7B-Instruct", 28)
    )
    assert l2s.model == {"family": family, "name": called, "d_model": d_model, "n_layers": n_layers}
    assert l2s.trained_on == ("MM-SafetyBench" if "mmsb" in name else "POPE")
    assert (str(l2s.read.positions), str(l2s.positions)) == (context, "last_prompt|generated")
    l2s.with_alpha(1.5).with_positions("authors_code").save(tmp_path / "l2s")
    loaded = sp.L2S.load(tmp_path / "l2s")
    assert (loaded.trained_on, loaded.model, loaded.alpha) == (l2s.trained_on, l2s.model, 1.5)
    assert (str(loaded.read), str(loaded.positions)) == (str(l2s.read), "everywhere")


def test_what_is_said_about_a_published_file_goes_before_its_record(shared):
    path = shared / "data" / "l2s_checkpoints" / "llava_mmsb_steering_net_v3_multi_nobias_K100.pt"
    l2s = sp.L2S.from_published(path, read="resid_post.15", context="last_prompt", alpha=0)
    assert (str(l2s.write), str(l2s.read.site), str(l2s.read.positions), l2s.alpha) == (
        "resid_post.15", "resid_post.15", "last_prompt", 0,
    )  # fmt: skip


def test_a_published_network_is_refused_by_a_model_of_another_width(shared):
    l2s = sp.L2S.from_published(shared / "data" / "l2s_checkpoints" / "llava_14_average_all_pope_train_-1.pt")
    with pytest.raises(sp.ArtefactError, match=r"d_model 4096.*32"):
        sp.attach(tiny_llava()).generate(steering=l2s, **tiny_inputs(1), max_new_tokens=1)


@pytest.mark.parametrize("nested", [False, True])
def test_another_pt_file_of_either_layout_needs_to_be_told_where_it_writes_and_reads(tmp_path, nested):
    path, state = tmp_path / "own.pt", SteeringNetwork(32, 10, 32).state_dict()
    torch.save({"steering_model": state, "epoch": 3} if nested else state, path)
    for told in ({}, {"write": "resid_post.2"}, {"read": "resid_post.1"}):
        with pytest.raises(sp.InputError, match=r"own\.pt.*write='resid_post\.14', read='resid_post\.14'"):
            sp.L2S.from_published(path, **told)
    own = sp.L2S.from_published(path, write="resid_post.2", read="resid_post.1", context="user_end", alpha=2.2)
    assert (str(own.write), str(own.read.site), str(own.read.positions)) == ("resid_post.2", "resid_post.1", "user_end")
    assert (own.alpha, own.model, own.trained_on) == (2.2, None, None)
    for name, tensor in state.items():
        assert torch.equal(own.network.state_dict()[name], tensor)


SITES = {"write": "resid_post.1", "read": "resid_post.1"}


def test_an_own_network_of_another_width_is_refused_before_work(tmp_path):
    torch.save(SteeringNetwork(64, 8, 64).state_dict(), tmp_path / "wide.pt")
    l2s = sp.L2S.from_published(tmp_path / "wide.pt", **SITES)
    with pytest.raises(sp.InputError, match=r"width 64.*32"):
        sp.attach(tiny_llava()).generate(steering=l2s, **tiny_inputs(1), max_new_tokens=1)


class Trap:
    """What a pickle can do when it is opened: run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"", pickle.dumps({"encoder.weight": print})])
def test_corrupt_and_code_carrying_pt_files_are_refused(tmp_path, content):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(sp.ArtefactError, match=r"bad\.pt"):
        sp.L2S.from_published(path, **SITES)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_file_is_refused_and_its_code_does_not_run(tmp_path, zipped):
    mark = tmp_path / "ran"
    state = {**SteeringNetwork(4, 3, 4).state_dict(), "extra": Trap(mark)}
    torch.save(state, tmp_path / "trap.pt", _use_new_zipfile_serialization=zipped)
    torch.save(SteeringNetwork(4, 3, 4), tmp_path / "module.pt", _use_new_zipfile_serialization=zipped)
    for name in ("trap", "module"):
        with pytest.raises(sp.ArtefactError, match=rf"{name}\.pt is not a plain state dict.*encoder\.weight"):
            sp.L2S.from_published(tmp_path / f"{name}.pt", **SITES)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("zipped", [True, False])
def test_damage_anywhere_in_a_file_is_an_artefact_error_or_does_no_harm(tmp_path, zipped):
    """Cut short, or with bytes changed: torch answers with a dozen kinds of errors, the package with one."""
    whole, path = io.BytesIO(), tmp_path / "damaged.pt"
    torch.save(SteeringNetwork(6, 3, 6).state_dict(), whole, _use_new_zipfile_serialization=zipped)
    rng, refused = random.Random(0), 0
    for attempt in range(300):
        data = bytearray(whole.getvalue())
        if attempt % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice((1, 3, 20))):
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data))
        try:
            sp.L2S.from_published(path, **SITES)
        except sp.ArtefactError as error:
            assert "damaged.pt" in str(error)
            refused += 1
    assert refused > 150


def test_missing_files_tensors_and_misfitting_shapes_are_named(tmp_path):
    with pytest.raises(sp.ArtefactError, match=r"cannot read .*absent\.pt"):
        sp.L2S.from_published(tmp_path / "absent.pt", **SITES)
    torch.save({"encoder.weight": torch.ones(3, 4)}, tmp_path / "part.pt")
    with pytest.raises(sp.ArtefactError, match=r"decoder\.weight"):
        sp.L2S.from_published(tmp_path / "part.pt", **SITES)
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    with pytest.raises(sp.ArtefactError, match=r"encoder\.weight"):
        sp.L2S.from_published(tmp_path / "list.pt", **SITES)
    for bias, out in ((5, 4), (3, 7)):
        torch.save(
            {
                "encoder.weight": torch.ones(3, 4),
                "encoder.bias": torch.ones(bias),
                "decoder.weight": torch.ones(out, 3),
            },
            tmp_path / "odd.pt",
        )
        with pytest.raises(sp.ArtefactError, match=r"\(3, 4\).*expected"):
            sp.L2S.from_published(tmp_path / "odd.pt", **SITES)


def test_a_network_that_would_poison_the_stream_is_refused(tmp_path):
    state = SteeringNetwork(4, 3, 4).state_dict()
    state["decoder.weight"][1, 2] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(sp.ArtefactError, match=r"nan\.pt.*decoder\.weight holds 1 NaN"):
        sp.L2S.from_published(tmp_path / "nan.pt", **SITES)


def fitted(read: int = 1, **changes) -> sp.L2S:
    network = SteeringNetwork(32, 8, 32).requires_grad_(False)
    return sp.L2S(network, "resid_post.1", f"resid_post.{read}", **changes)


@pytest.mark.parametrize("read", [0, 1, 3])
def test_what_is_added_is_alpha_times_the_network_of_the_unsteered_context(read):
    vlm, inputs = sp.attach(tiny_llava()), tiny_inputs(3)
    l2s = fitted(read, alpha=1.7, positions="last_prompt")
    plain = vlm.cache(inputs, [sp.resid_post(read)], "last_prompt")[sp.resid_post(read)][:, 0]
    before = vlm.cache(inputs, [sp.resid_post(1)], "last_prompt")[sp.resid_post(1)][:, 0]
    after = vlm.cache(inputs, [sp.resid_post(1)], "last_prompt", steering=l2s)[sp.resid_post(1)][:, 0]
    torch.testing.assert_close(after - before, 1.7 * l2s.predict(plain), atol=1e-4, rtol=1e-4)


def test_saved_network_steers_bit_for_bit_without_arguments(tmp_path):
    vlm, inputs = sp.attach(tiny_llava()), tiny_inputs(3)
    l2s = fitted(3, alpha=2.0)
    l2s.save(tmp_path / "l2s")
    loaded = sp.L2S.load(tmp_path / "l2s")
    wanted = vlm.generate(steering=l2s, **inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(vlm.generate(steering=loaded, **inputs, max_new_tokens=6, do_sample=False), wanted)
    assert not torch.equal(vlm.generate(**inputs, max_new_tokens=6, do_sample=False), wanted)


def test_a_truncated_artefact_is_named(tmp_path):
    fitted().save(tmp_path / "l2s")
    file = tmp_path / "l2s" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(sp.ArtefactError, match="l2s"):
        sp.L2S.load(tmp_path / "l2s")


def test_a_pickle_in_place_of_an_artefact_is_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(sp.ArtefactError, match="from_published"):
        sp.L2S.load(tmp_path / "x.pt")
    fitted().save(tmp_path / "l2s")
    shutil.copy(tmp_path / "x.pt", tmp_path / "l2s" / "tensors.safetensors")
    with pytest.raises(sp.ArtefactError):
        sp.L2S.load(tmp_path / "l2s")


def test_network_of_another_width_is_refused_before_work():
    l2s = sp.L2S(SteeringNetwork(64, 8, 64), "resid_post.1")
    with pytest.raises(sp.InputError, match=r"width 64.*32"):
        sp.attach(tiny_llava()).generate(steering=l2s, **tiny_inputs(1), max_new_tokens=1)
    with pytest.raises(sp.InputError, match=r"width 32.*64"):
        l2s.predict(torch.zeros(1, 32))


def test_fitted_l2s_reports_and_remembers_its_model(tmp_path):
    l2s = sp.L2S.fit(law_shifts(240), sp.FitConfig(hidden=16, epochs=60, learning_rate=1e-2), seed=1)
    assert l2s.report is not None
    assert l2s.report.validation_explained > 0.6 > l2s.report.mean_explained + 0.5
    l2s.save(tmp_path / "l2s")
    assert sp.L2S.load(tmp_path / "l2s").model == {"family": "llava", "name": "tiny", "d_model": 32, "n_layers": 4}
