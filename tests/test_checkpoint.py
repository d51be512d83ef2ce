"""Checkpoints are whole or absent: `python -m pytest tests/test_checkpoint.py`."""

import json
import random
import shutil
from pathlib import Path

import pytest

from launch.errors import UserError
from trainer import checkpoint


def _write(run_dir: Path, step: int) -> Path:
    partial = checkpoint.partial_of(run_dir, step)
    (partial / "sub").mkdir()
    (partial / "model.safetensors").write_bytes(random.Random(step).randbytes(5000))
    (partial / "sub" / "state.json").write_text(json.dumps({"step": step}))
    final = checkpoint.folder_of(run_dir, step)
    checkpoint.publish(partial, final, {"step": step})
    return final


def test_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        _write(tmp_path, step)
    (tmp_path / "checkpoints" / ".partial-120").mkdir()
    warnings: list[str] = []
    assert checkpoint.find_latest(tmp_path, warnings.append) == checkpoint.folder_of(tmp_path, 100)
    assert not warnings
    assert checkpoint.step_of(checkpoint.folder_of(tmp_path, 100)) == 100


def test_every_kind_of_damage_is_seen_and_the_older_one_taken(tmp_path: Path) -> None:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    damages = {
        "missing": lambda folder: (folder / "model.safetensors").unlink(),
        "cut": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 10),
        "flipped": lambda folder: flip(folder / "model.safetensors"),
        "added": lambda folder: (folder / "more.bin").write_bytes(b"1"),
        "no manifest": lambda folder: (folder / "manifest.json").unlink(),
        "cut manifest": lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest of nothing": lambda folder: (folder / "manifest.json").write_text("[]"),
    }
    for name, damage in damages.items():
        run_dir = tmp_path / name
        good, bad = _write(run_dir, 1), _write(run_dir, 2)
        damage(bad)
        warnings: list[str] = []
        assert checkpoint.find_latest(run_dir, warnings.append) == good, name
        assert len(warnings) == 1, name
        assert str(bad) in warnings[0], name


def test_files_of_another_step_are_not_accepted(tmp_path: Path) -> None:
    good, bad = _write(tmp_path, 1), _write(tmp_path, 2)
    shutil.copy(good / "model.safetensors", bad / "model.safetensors")
    assert checkpoint.find_latest(tmp_path, lambda _: None) == good


def test_a_published_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    partial = checkpoint.partial_of(tmp_path, 1)
    (partial / "file").write_text("other")
    with pytest.raises(UserError, match="exists already"):
        checkpoint.publish(partial, checkpoint.folder_of(tmp_path, 1), {"step": 1})
    assert (checkpoint.folder_of(tmp_path, 1) / "model.safetensors").stat().st_size == 5000


def test_pruning_keeps_the_newest_and_at_least_two(tmp_path: Path) -> None:
    for step in range(1, 6):
        _write(tmp_path, step)
    (tmp_path / "checkpoints" / ".partial-6").mkdir()
    checkpoint.prune(tmp_path, keep=3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-3", "step-4", "step-5"]
    checkpoint.prune(tmp_path, keep=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-5"]
