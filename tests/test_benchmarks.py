"""Every benchmark runs in its quick form and writes its claims: `python -m pytest tests/test_benchmarks.py`.

No speed is asserted: another load on the machine would decide. Counts are.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CLAIMS = {
    "step": [
        "step.docstring256.speedup_recompute",
        "step.docstring256.speedup_kept",
        "step.docstring512.speedup_recompute",
        "step.docstring512.speedup_kept",
        "step.repeated.speedup_recompute",
        "step.padded_over_real_max",
    ],
    "loss": ["loss.d768_dims5.speedup", "loss.d768_dims5.memory_ratio"],
    "loader": ["loader.speedup", "loader.plan_seconds_65536"],
    "collectives": ["collectives.embedding_gathers_max", "collectives.embedding_scatters_max"],
    "huge_batch": ["huge_batch.peak_over_expected", "huge_batch.row_time_ratio"],
    "overhead": ["overhead.kept", "overhead.recompute"],
    "checkpoint": ["checkpoint.stall_ratio", "checkpoint.agreement_share", "checkpoint.resume_ratio"],
    "chaos": ["chaos.lost_runs", "chaos.diverged_curves", "chaos.damaged_accepted"],
    "evaluate": ["evaluate.speedup", "evaluate.memory_ratio"],
    "onnx": [
        "onnx.int8_speedup_32",
        "onnx.int8_speedup_128",
        "onnx.int8_ndcg_loss",
        "onnx.encoder_over_sentence_transformers",
        "onnx.fp32_bytes",
        "onnx.fp16_bytes",
        "onnx.int8_bytes",
    ],
    "engines": ["engines.max_gradient_error"],
    "data": ["data.documents_per_s", "data.memory_growth", "data.time_linearity"],
    "mine": ["mine.speedup", "mine.memory_ratio"],
    "mined": ["mined.ndcg_gain"],
    "plan": ["plan.max_memory_deviation", "plan.max_flops_deviation"],
    "gpu": ["gpu.tokens_per_s", "gpu.mfu", "gpu.speedup", "gpu.peak_over_expected"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_quick_form_writes_its_claims(name: str, tmp_path: Path) -> None:
    file = tmp_path / "claims.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert [claim["name"] for claim in written["claims"]] == CLAIMS[name]
    for claim in written["claims"]:
        assert set(claim) == {"name", "value", "unit", "better", "rival", "conditions"}
        if claim["name"] == "gpu.mfu" and not torch.cuda.is_available():
            assert claim["value"] is None and "MFU is not known; on a CPU, not on a GPU" in claim["conditions"], claim
        else:
            may_be_zero = name == "chaos" or claim["name"] == "onnx.int8_ndcg_loss"
            assert math.isfinite(claim["value"]) and (claim["value"] > 0 or may_be_zero), claim
        assert claim["better"] in ("higher", "lower") and "--quick" in claim["conditions"], claim
        assert claim["name"] in done.stdout
    if name == "collectives":
        assert [claim["value"] for claim in written["claims"]] == [1, 1]
        # sentence-transformers' own, of 2 to 5 columns, 1 or 5 dims and 1 to 8 chunks of the loss.
        assert written["claims"][0]["conditions"].endswith("calls 2 to 25")
        assert written["claims"][1]["conditions"].endswith("calls 2 to 200")
    if name == "chaos":
        assert [claim["value"] for claim in written["claims"]] == [0, 0, 0], done.stdout
    if name == "engines":
        assert written["claims"][0]["value"] <= 1e-5
        # sentence-transformers' own, whose backwards reduce each parameter more than once a step.
        assert "zero1 AssertionError, 2 x zero2 AssertionError, 2 x zero3 " in written["claims"][0]["conditions"]
    assert {"cpu", "cores", "threads"} <= set(written["machine"]) and written["machine"]["threads"] == 1
    assert written["versions"]["sentence-transformers"] == "6.2.0"


@pytest.mark.slow
def test_one_case_of_a_step_runs_alone(tmp_path: Path) -> None:
    file = tmp_path / "claims.json"
    command = [sys.executable, "-m", "benchmarks.step", "--quick", "--case", "padding", "--json", str(file)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    assert [claim["name"] for claim in json.loads(file.read_text())["claims"]] == ["step.padded_over_real_max"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it measures")
def test_the_full_form_for_a_gpu_says_in_one_line_that_there_is_none(tmp_path: Path) -> None:
    file = tmp_path / "claims.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", str(file)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and not file.exists()
    assert done.stderr.count("\n") == 1 and "got none with CUDA, allowed: one GPU, or --quick" in done.stderr
