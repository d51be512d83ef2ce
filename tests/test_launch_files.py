"""The launcher's files that are shipped: `python -m pytest tests/test_launch_files.py`.

DeepSpeed's three differ by their stage only, so that a run that is changed from one to another changes nothing else.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = (1, 2, 3)


def _without_stage(stage: int) -> dict[str, Any]:
    """DeepSpeed's file, without its stage and what only stage 3 reads."""
    settings = json.loads((CONFIGS / f"deepspeed/zero{stage}.json").read_text(encoding="utf-8"))
    own = settings["zero_optimization"]
    assert own.pop("stage") == stage
    settings["zero_optimization"] = {k: v for k, v in own.items() if stage != 3 or not k.startswith("stage3_")}
    return settings


def test_deepspeed_files_differ_by_stage_only() -> None:
    first, *others = map(_without_stage, STAGES)
    assert first["zero_optimization"] and "gradient_clipping" in first
    assert all(other == first for other in others)


def test_accelerate_files_differ_by_the_deepspeed_file_only() -> None:
    found = []
    for stage in STAGES:
        settings = yaml.safe_load((CONFIGS / f"accelerate/zero{stage}.yaml").read_text(encoding="utf-8"))
        assert settings["deepspeed_config"].pop("deepspeed_config_file") == f"configs/deepspeed/zero{stage}.json"
        found.append(settings)
    assert found[0]["distributed_type"] == "DEEPSPEED" and found == found[:1] * 3


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_lines_fit_the_width_of_the_code(path: Path) -> None:
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120
