"""What page and model card show of evaluation.json: base against tuned by dim, what each storage of vectors keeps.

An entry that lacks a key is read as the only choice that there was when it was left out: the domain's set, float32.
"""

from typing import Any

from trainer.evaluation import MAIN_METRIC
from trainer.search import bytes_per_vector

KEEPS = 0.95  # a smaller vector is good enough if it surely keeps this share of the full one's quality
_LEFT_OUT = {"set": "domain", "vectors": "float32"}


def entries(evaluation: dict[str, Any], kind: str, **wanted: Any) -> list[dict[str, Any]]:
    """The entries of results, comparisons, tradeoffs ... that have these values, completed."""
    complete = [_LEFT_OUT | entry for entry in evaluation.get(kind) or []]
    return [entry for entry in complete if all(entry.get(key) == value for key, value in wanted.items())]


def rows_by_dim(evaluation: dict[str, Any], metric: str = MAIN_METRIC, **which: str) -> list[dict[str, Any]]:
    """Base, tuned and their difference of a metric: a dictionary a dim, largest first, None for what is unknown."""
    wanted = _LEFT_OUT | which | {"metric": metric}
    results = {(e["model"], e["dim"]): e for e in entries(evaluation, "results", **wanted)}
    compared = {e["dim"]: e for e in entries(evaluation, "comparisons", **wanted)}
    return [
        {"dim": dim, "base": results.get(("base", dim)), "tuned": results.get(("tuned", dim))}
        | {key: compared.get(dim, {}).get(key) for key in ("difference", "ci95", "p_holm", "wins", "losses")}
        for dim in sorted({dim for _, dim in results}, reverse=True)
    ]


def stored(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The last model's results by dim and vector precision, the full vectors first.

    Each with what a vector takes ("bytes"), the share of the full vectors' quality that it keeps ("kept") with the
    interval of that ("kept95", in which the full quality is taken as known), and milliseconds of a search ("ms").
    """
    found = entries(evaluation, "results", set="domain", metric=MAIN_METRIC)
    found = [entry for entry in found if entry["model"] == found[-1]["model"]]
    found.sort(key=lambda entry: (-entry["dim"], -bytes_per_vector(entry["dim"], entry["vectors"])))
    changes = {_place(e["b"]): e["ci95"] for e in entries(evaluation, "tradeoffs", set="domain", metric=MAIN_METRIC)}
    timed = {_place(entry): entry["ms_per_query"] for entry in evaluation.get("latency") or []}
    for entry in found:
        full, place = found[0]["value"], _place(entry)
        entry |= {"bytes": bytes_per_vector(entry["dim"], entry["vectors"]), "ms": timed.get(place)}
        entry["kept"] = entry["value"] / full if full else None
        entry["kept95"] = [1 + end / full for end in changes[place]] if full and place in changes else None
    return found


def of_files(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a bundle's metrics that were measured on its ONNX files."""
    return [entry for entry in metrics if entry["artifact"].startswith("onnx-")]


def to_deploy(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of `stored` that takes least and surely keeps KEEPS of the full vectors' quality."""
    kept = [row for row in rows if row["kept95"] and row["kept95"][0] >= KEEPS]
    return min(kept, key=lambda row: (row["bytes"], -row["value"]), default=None)


def _place(entry: dict[str, Any]) -> tuple[str, int]:
    return entry.get("vectors", "float32"), entry["dim"]
