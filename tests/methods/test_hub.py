"""The Hub's mixin: folders and repositories hold the artefact, a card and nothing that can run."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _hub_server import Hub, hub
from _shifts import law_shifts
from _tiny import D_MODEL, LAYERS, draw

import steer_plugin as sp
from steer_plugin import artefact
from steer_plugin.methods import SteeringNetwork

FILES = ["README.md", "artefact.json", "config.json", "tensors.safetensors"]


def every_kind() -> dict[str, Any]:
    """One artefact of each class that is saved."""
    shifts = law_shifts(40)
    network = SteeringNetwork(D_MODEL, 8, D_MODEL).requires_grad_(False)
    module = sp.SteerVLM.new(sp.SteerVLMConfig(D_MODEL, LAYERS, reduction=2, heads=4))
    return {
        "mean": sp.MeanSteering.fit(shifts, positions="image | generated", alpha=1.5),
        "p2s": sp.P2S.rows(shifts, ["s1", "s2"], alpha=torch.tensor([1.0, 2.0])),
        "norm_random": sp.NormRandom.rows(shifts, ["s1"]),
        "l2s": sp.L2S(network, "resid_post.1", "resid_post.3", alpha=2.2, model=shifts.job["model"]),
        "steervlm": sp.SteerVLM(module.module, model=shifts.job["model"]).pair("w8 | w9", "w10"),
    }


@pytest.fixture(params=["mean", "p2s", "norm_random", "l2s", "steervlm"])
def steering(request: pytest.FixtureRequest) -> Any:
    return every_kind()[request.param]


def same(first: Path, second: Path) -> bool:
    one, two = artefact.read(first), artefact.read(second)
    return (
        (one.kind, one.meta) == (two.kind, two.meta)
        and one.tensors.keys() == two.tensors.keys()
        and all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    )


def test_a_folder_comes_back(tmp_path, steering):
    steering.save_pretrained(tmp_path / "pretrained")
    assert sorted(path.name for path in (tmp_path / "pretrained").iterdir()) == FILES
    found = type(steering).from_pretrained(tmp_path / "pretrained")
    assert type(found) is type(steering)
    found.save(tmp_path / "plain")
    assert same(tmp_path / "pretrained", tmp_path / "plain")
    again = type(steering).from_pretrained(str(tmp_path / "plain"))  # what `save` wrote will do
    again.save_pretrained(tmp_path / "again")
    assert same(tmp_path / "pretrained", tmp_path / "again")


def test_every_artefact_says_what_it_is(tmp_path, steering):
    steering.save(tmp_path)
    said = json.loads((tmp_path / "artefact.json").read_text())
    meta = said["meta"]
    assert said["kind"] == steering.kind
    assert meta["model"] == {"family": "llava", "name": "tiny", "d_model": D_MODEL, "n_layers": LAYERS}
    assert meta.keys() & {"site", "sites", "write"} and {"positions", "alpha"} <= meta.keys()
    assert {"python", "steer_plugin", "torch", "transformers"} == said["versions"].keys()
    assert said["tensors"]["sha256"] == artefact.sha256((tmp_path / "tensors.safetensors").read_bytes())


def test_the_card_says_what_it_is(tmp_path, steering):
    steering.save_pretrained(tmp_path, model_card_kwargs={"data": "drawn"})
    card = (tmp_path / "README.md").read_text()
    front, text = card.split("---\n")[1:3]
    assert "library_name: steer-plugin" in front and f"- {steering.kind}" in front
    meta = artefact.read(tmp_path).meta
    for name in ("site", "sites", "write", "read", "positions", "alpha"):
        if name in meta:
            shown = meta[name] if isinstance(meta[name], str) else json.dumps(meta[name])
            assert f"| {name} | `{shown.replace('|', '&#124;')}` |" in text
    for row in ("| method |", "| data | `drawn` |", "| version of torch |", "| version of steer_plugin |"):
        assert row in text
    if meta["model"]:
        assert "| family | `llava` |" in text and "| name | `tiny` |" in text
    assert f"sp.{type(steering).__name__}.from_pretrained" in text


def test_a_card_is_renewed_until_somebody_edits_it(tmp_path):
    v = torch.ones(4)
    sp.MeanSteering(v, "resid_post.1", alpha=1.0).save_pretrained(tmp_path)
    sp.MeanSteering(v, "resid_post.1", alpha=7.0).save_pretrained(tmp_path)
    assert "| alpha | `7.0` |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    sp.MeanSteering(v, "resid_post.1", alpha=8.0).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert sp.MeanSteering.from_pretrained(tmp_path).alpha == 8.0


def test_the_mixin_keeps_no_copy_of_the_arguments(steering):
    assert "_hub_mixin_config" not in vars(steering) and steering._hub_mixin_config is None
    for other in (copy.deepcopy(steering), pickle.loads(pickle.dumps(steering))):
        assert type(other) is type(steering) and other.meta() == steering.meta()


CODE = """
import json, sys
import torch
import steer_plugin as sp

folder, repository = sys.argv[1:]
steering = sp.L2S.load(folder)
url = steering.push_to_hub(repository, token="hf_made_up")
found = sp.L2S.from_pretrained(repository)
found.save(folder + "-back")
errors = []
for name, cls in ((repository, sp.MeanSteering), ("nobody/nothing", sp.L2S), ("somebody/other", sp.L2S)):
    try:
        cls.from_pretrained(name)
    except sp.ArtefactError as error:
        errors.append(str(error))
print(json.dumps({"url": url, "errors": errors}))
"""


def run_with_hub(server: Hub | None, tmp_path: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose Hub is ours; without a server it is offline and has the same cache."""
    online = {"HF_HUB_OFFLINE": "1"} if server is None else {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **online, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.update(TRANSFORMERS_OFFLINE="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_push_and_download(tmp_path):
    every_kind()["l2s"].save(tmp_path / "l2s")
    with hub() as server:
        server.repositories["somebody/other"] = {"config.json": b'{"alpha": 5}', "model.safetensors": b"no steering"}
        done = run_with_hub(server, tmp_path, CODE, str(tmp_path / "l2s"), "somebody/steering")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["url"].startswith(f"{server.endpoint}/somebody/steering/commit/")
    pushed = server.repositories["somebody/steering"]
    assert sorted(set(pushed) - {".gitattributes"}) == FILES
    assert pushed["tensors.safetensors"] == (tmp_path / "l2s" / "tensors.safetensors").read_bytes()
    assert set(server.asked) == {"artefact.json", "tensors.safetensors", "config.json"}
    assert same(tmp_path / "l2s", tmp_path / "l2s-back")
    wrong, missing, other = said["errors"]
    assert "kind 'l2s', expected 'mean'" in wrong
    assert "'nobody/nothing' is no folder here" in missing
    assert "'somebody/other' on the Hub has no artefact.json" in other

    code = "import sys, steer_plugin as sp; print(sp.L2S.from_pretrained(sys.argv[1]).write)"
    offline = run_with_hub(None, tmp_path, code, "somebody/steering")  # from the cache
    assert offline.stdout.strip() == "resid_post.1", offline.stderr


@pytest.mark.parametrize("where", ["nobody/nothing", "no/such/folder", "missing"])
def test_what_is_not_there(where):
    with pytest.raises(sp.ArtefactError, match=f"'{where}' is (no folder here|neither a folder here)"):
        sp.MeanSteering.from_pretrained(where)


def test_other_keywords_and_classes_are_refused(tmp_path):
    sp.MeanSteering(torch.ones(4), "resid_post.1").save_pretrained(tmp_path)
    with pytest.raises(sp.InputError, match=r"got alpha: .* steering \* 1\.5"):
        sp.MeanSteering.from_pretrained(tmp_path, alpha=2.0)
    with pytest.raises(sp.ArtefactError, match=r"'mean'.*'l2s'"):
        sp.L2S.from_pretrained(tmp_path)


def test_a_pickle_in_the_place_of_the_tensors_is_refused(tmp_path):
    sp.MeanSteering(torch.ones(4), "resid_post.1").save_pretrained(tmp_path)
    torch.save({"vector": draw(4)}, tmp_path / "tensors.safetensors")
    with pytest.raises(sp.ArtefactError, match="pickle or a zip archive"):
        sp.MeanSteering.from_pretrained(tmp_path)
