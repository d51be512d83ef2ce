"""Gates: what must surely hold of the tuned model before anybody deploys it.

A gate is a claim about a mean over queries; what decides is the paired 95 % interval of what is claimed and a
permutation test, corrected over all gates of the run (Holm), not the point estimate.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.config_evaluate import PASSED, Gate, unmet
from launch.errors import CheckFailed
from trainer import metrics
from trainer.evaluation import Scored, format_p

_LEVEL = 0.05
FAILED, OPEN = "failed", "not decidable"


def judge_gates(
    gates: Sequence[Gate], scored: Mapping[str, Mapping[str, Scored]], seed: int = 0
) -> list[dict[str, Any]]:
    """Outcome of each gate: {"gate", "outcome", "found"}. `scored` maps sets to "base" and "tuned"."""
    if not gates:
        return []
    names, sides = zip(*(_sides(gate, scored[gate.set]) for gate in gates), strict=True)
    # Sets differ in their queries, so each gate is one call.
    compared = [metrics.compare(a, b, seed=seed) for a, b in sides]
    corrected = metrics.holm([float(c.p[0]) for c in compared])
    outcomes = []
    for gate, name, (a, b), found, p in zip(gates, names, sides, compared, corrected, strict=True):
        excess, low, high = (float(side[0]) for side in (found.difference, found.low, found.high))
        outcome = PASSED if low > 0 and p < _LEVEL else FAILED if high <= 0 else OPEN
        if gate.gain is not None:
            text = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*(gate.gain + x for x in (excess, low, high)))
        else:
            full = float(a.mean()) / (gate.keeps or 1) or 1.0
            text = "{:.1%} [{:.1%}, {:.1%}]".format(*((gate.keeps or 0) + x / full for x in (excess, low, high)))
        text += f", p {format_p(p)}"
        if outcome == OPEN:
            needed = math.ceil(len(b) * ((high - low) / 2 / abs(excess)) ** 2) if excess else 0
            text += f"; {len(b):,} queries are too few" + (f", about {needed:,} would do" if needed > len(b) else "")
        outcomes.append({"gate": name, "outcome": outcome, "found": text})
    return outcomes


def require_gates(outcomes: Sequence[dict[str, Any]]) -> None:
    """Raise CheckFailed with a line for each gate that did not pass."""
    if lines := unmet(outcomes):
        raise CheckFailed("\n".join(lines))


def _sides(gate: Gate, scored: Mapping[str, Scored]) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    """The gate in words, and two columns of values per query of which the second is claimed to be larger."""
    tuned = scored["tuned"]
    full = tuned.dims[0]
    dim = gate.dim or full
    ours = tuned.by_metric[gate.vectors, dim][gate.metric]
    where = f"{gate.metric} at {dim} dims" + (f" in {gate.vectors}" if gate.vectors != "float32" else "")
    where += "" if gate.set == "domain" else f" of the set {gate.set}"
    if gate.gain is not None:
        wanted = "tuned better than base" if gate.gain == 0 else f"tuned minus base above {gate.gain:+g}"
        return f"{where}: {wanted}", (scored["base"].by_metric["float32", dim][gate.metric] + gate.gain, ours)
    keeps = gate.keeps or 0.0
    return f"{where}: keeps {keeps:.1%} of {full} dims", (keeps * tuned.by_metric["float32", full][gate.metric], ours)
