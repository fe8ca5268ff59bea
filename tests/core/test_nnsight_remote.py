"""nnsight remote: a steered trace is sent, and runs where steer_plugin and jaxtyping cannot be imported.

`remote="local"` proves little: what is installed stays importable there. Here one process writes the requests, and
another, whose finder knows neither package, executes them on models of its own (_remote_client.py, _remote_server.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import D_MODEL, draw, hook_count, tiny_inputs

import steer_plugin as sp

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
KINDS = ("mean", "sum", "l2s", "prepared", "steervlm")
CASES = [f"{way} {kind}" for way in ("plain in_a_trace", "whole in_a_generation") for kind in KINDS]
CASES += [f"{way} {kind}" for way in ("plain around_a_trace", "whole around_a_generation") for kind in (*KINDS, "late")]


def run_script(name: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, str(HERE / name), str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every case gives in the process that wrote it, and on the server."""
    folder = tmp_path_factory.mktemp("remote")
    run_script("_remote_client.py", folder)
    run_script("_remote_server.py", folder)
    return torch.load(folder / "here.pt"), torch.load(folder / "there.pt")


@pytest.mark.parametrize("case", CASES)
def test_a_steered_request_gives_the_same_elsewhere(results, case: str):
    here, there = results
    assert isinstance(there[case], torch.Tensor), there[case]
    assert torch.equal(there[case], here[case])
    if case.startswith("plain"):  # logits; the tokens of a generation may survive a small steering
        assert not torch.equal(here[case], here["plain unsteered"])


def test_every_case_was_sent(results):
    here, _ = results
    assert set(CASES) | {"plain unsteered", "whole unsteered"} == set(here)


def test_without_the_registration_the_server_refuses(results):
    """Otherwise the finder would let something through, and the tests above would prove nothing."""
    _, there = results
    refused = [value for name, value in there.items() if name.endswith("unregistered")]
    assert len(refused) == 1
    assert "ModuleNotFoundError" in refused[0] and "steer_plugin" in refused[0]


def test_the_server_keeps_nothing(results):
    _, there = results
    assert there["hooks left"] == 0
    assert there["modules"] == []


def test_remote_needs_a_block(nnsight_vlm):
    steering = sp.add("resid_post.1", draw(D_MODEL))
    with pytest.raises(sp.FrameworkError, match=r"remote=True needs a block.*steered\.trace"):
        nnsight_vlm.generate(**tiny_inputs(1), steering=steering, max_new_tokens=1, remote=True)


def test_apply_needs_a_block(nnsight_vlm):
    with pytest.raises(sp.FrameworkError, match="outside a block"):
        sp.add("resid_post.1", draw(D_MODEL)).apply(nnsight_vlm)


def test_a_block_that_is_kept_in_memory_is_over(nnsight_vlm, monkeypatch):
    """As on a server, which may keep a request's variables: they act on no later forward."""
    inputs, model, kept = tiny_inputs(2), nnsight_vlm.model, []
    follow = nnsight_vlm.follow
    monkeypatch.setattr(nnsight_vlm, "follow", lambda run: (kept.append(run), follow(run)))
    before = hook_count(nnsight_vlm.root)
    with torch.no_grad(), model.trace(**inputs):
        sp.add("resid_post.1", draw(D_MODEL, scale=2), "everywhere").apply(nnsight_vlm)
    assert hook_count(nnsight_vlm.root) > before
    with torch.no_grad():
        nnsight_vlm.root(**tiny_inputs(3))
    assert hook_count(nnsight_vlm.root) == before
    assert [run.forwards for run in kept] == [1]
