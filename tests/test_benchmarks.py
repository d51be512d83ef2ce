"""Every benchmark runs in its quick form and writes its claims: `python -m pytest tests/test_benchmarks.py`.

No speed is asserted: another load on the machine would decide.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

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
        assert math.isfinite(claim["value"]) and claim["value"] > 0, claim
        assert claim["better"] in ("higher", "lower") and "--quick" in claim["conditions"], claim
        assert claim["name"] in done.stdout
    assert {"cpu", "cores", "threads"} <= set(written["machine"]) and written["machine"]["threads"] == 1
    assert written["versions"]["sentence-transformers"] == "6.2.0"
