"""`steer-plugin store`: damage is named with exit code 1, and dropped so that the job computes it again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from steer_plugin.cli_store import store_app
from steer_plugin.errors import ArtefactError
from steer_plugin.store import ShardStore, ShardWriter

ORDER = [f"r{k}" for k in range(6)]


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(store_app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def fill(out: Path, *numbers: int) -> None:
    with ShardWriter(out, {"model": "m", "seed": 3}, 2, order=ORDER) as writer:
        for k in numbers:
            writer.append([f"r{k}"], {"resid_post.1": torch.full((1, 4), float(k)), "t": [torch.zeros(k, 3)]})


def test_show_check_and_drop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, 5, 4, 3, 2)
    assert "rows: 4 of 6, not finished" in run("show", tmp_path) + capfd.readouterr().out
    fill(tmp_path, 1, 0)
    told = run("show", tmp_path) + capfd.readouterr().out
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    for part in ('"model": "m"', "rows: 6 of 6, complete", f"shards: 3, {size:,} bytes",
                 "tensor: resid_post.1 (row, 4) float32", "tensor: t (row, token, 3) float32"):  # fmt: skip
        assert part in told
    assert "unharmed: 3 shards, 6 rows" in run("check", tmp_path, "--no-progress") + capfd.readouterr().out
    path = tmp_path / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    told = run("check", tmp_path, "--no-progress", code=1) + capfd.readouterr().out
    assert "damaged: shard-000001.safetensors has" in told and "rows r3, r2" in told and "their 2 rows" in told
    assert len(ShardStore.open(tmp_path)) == 6  # checking changes nothing
    told = run("drop-damaged", tmp_path, "--no-progress") + capfd.readouterr().out
    assert "damaged: shard-000001.safetensors" in told and "dropped: 1 shards, 2 rows" in told
    fill(tmp_path, 3, 2)
    assert ShardStore.open(tmp_path).tensor("resid_post.1")[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert "dropped: 0 shards, 0 rows" in run("drop-damaged", tmp_path) + capfd.readouterr().out


def test_no_store(tmp_path: Path) -> None:
    for command in ("show", "check", "drop-damaged"):
        with pytest.raises(ArtefactError, match=r"holds no manifest\.json"):
            run(command, tmp_path)
    assert list(tmp_path.iterdir()) == []
