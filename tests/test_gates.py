"""trainer/gates.py: a gate opens by the end of an interval, and says so where too few queries can tell."""

import numpy as np
import pytest

from launch.config_evaluate import Gate
from launch.errors import CheckFailed
from trainer.evaluation import Scored
from trainer.gates import judge_gates, require_gates
from trainer.search import Found

EMPTY = Found(np.zeros((0, 0), np.int64), np.zeros((0, 0)))


def scored(queries: int, gain: float, kept: float, noise: float = 0.1) -> dict[str, dict[str, Scored]]:
    """Base and tuned values of `queries` queries: tuned is `gain` above base, 8 of 16 dims keep the share `kept`."""
    random = np.random.default_rng(3)
    base = random.uniform(0.3, 0.5, queries)
    drawn = random.normal(0, noise, queries)
    tuned = base + gain + drawn - drawn.mean()
    drawn = random.normal(0, noise, queries)
    small = tuned * kept + drawn - drawn.mean()
    made = {
        "base": Scored("pytorch", {("float32", 16): {"ndcg@10": base}, ("float32", 8): {"ndcg@10": base}}, EMPTY),
        "tuned": Scored(
            "pytorch",
            {("float32", 16): {"ndcg@10": tuned}, ("float32", 8): {"ndcg@10": small}, ("int8", 8): {"ndcg@10": small}},
            EMPTY,
        ),
    }
    return {"domain": made, "general": made}


@pytest.mark.parametrize(
    ("gate", "queries", "gain", "kept", "outcome"),
    [
        (Gate(gain=0.0), 1000, 0.05, 1.0, "passed"),
        (Gate(gain=0.0), 1000, -0.05, 1.0, "failed"),
        (Gate(gain=0.0), 6, 0.05, 1.0, "not decidable"),
        (Gate(gain=0.0), 1000, 0.001, 1.0, "not decidable"),
        (Gate(gain=0.04), 1000, 0.05, 1.0, "passed"),
        (Gate(gain=0.06), 1000, 0.05, 1.0, "failed"),
        (Gate(gain=-0.02, set="general"), 1000, -0.01, 1.0, "passed"),
        (Gate(gain=-0.02, set="general"), 1000, -0.03, 1.0, "failed"),
        (Gate(dim=8, keeps=0.95), 1000, 0.05, 0.98, "passed"),
        (Gate(dim=8, keeps=0.98), 1000, 0.05, 0.95, "failed"),
        (Gate(dim=8, keeps=0.98), 1000, 0.05, 0.981, "not decidable"),
        (Gate(dim=8, keeps=0.95, vectors="int8"), 1000, 0.05, 0.98, "passed"),
    ],
)
def test_outcomes(gate: Gate, queries: int, gain: float, kept: float, outcome: str) -> None:
    (found,) = judge_gates([gate], scored(queries, gain, kept))
    assert found["outcome"] == outcome, found
    if outcome != "passed":
        with pytest.raises(CheckFailed, match=f"gate {outcome}: ndcg@10 at "):
            require_gates([found])
    else:
        require_gates([found])


def test_words_and_numbers() -> None:
    made = scored(1000, 0.05, 0.98)
    gain, keeps = judge_gates([Gate(gain=0.0), Gate(dim=8, vectors="int8", keeps=0.9)], made)
    assert gain["gate"] == "ndcg@10 at 16 dims: tuned better than base"
    assert gain["found"].startswith("+0.0500 [+0.04")
    assert keeps["gate"] == "ndcg@10 at 8 dims in int8: keeps 90.0% of 16 dims"
    assert keeps["found"].startswith("98.0% [96.")
    (open_,) = judge_gates([Gate(gain=0.0)], scored(100, 0.005, 1.0))
    needed = int(open_["found"].rpartition("about ")[2].split()[0].replace(",", ""))
    assert 1000 < needed < 2500, "1.96 x 0.1 / sqrt(n) = 0.005 at n = 1,537"


def test_many_gates_need_more_certainty() -> None:
    made = scored(60, 0.03, 1.0)
    assert judge_gates([Gate(gain=0.0)], made)[0]["outcome"] == "passed"
    many = judge_gates([Gate(gain=0.0), *[Gate(gain=0.0295, set="general")] * 6], made)
    alone, among = (o[0]["found"] for o in (judge_gates([Gate(gain=0.0)], made), many))
    assert float(among.rpartition("p ")[2].split(";")[0].lstrip("<")) >= float(alone.rpartition("p ")[2].lstrip("<"))
