"""What page, model card and terminal show of evaluation.json: base against tuned by dim, what each storage keeps.

An entry that lacks a key is read as the only choice that there was when it was left out: the domain's set, float32.
"""

from typing import Any

from launch.config_evaluate import gate_line
from trainer.evaluation import MAIN_METRIC, format_p
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


def table(evaluation: dict[str, Any]) -> str:
    """Plain text of MAIN_METRIC: a line a set and dim (base, tuned, difference with interval and p), then a line a dim
    and storage (bytes, milliseconds, share of full quality kept)."""
    lines = []
    for name, size in evaluation["sets"].items():
        rows = rows_by_dim(evaluation, set=name)
        models = [model for model in ("base", "tuned") if any(row[model] for row in rows)]
        is_compared = any(row["difference"] is not None for row in rows)
        cells = [["dim", *models, *(["difference [95 % interval]", "p (Holm)", "wins/losses"] if is_compared else [])]]
        for row in rows:
            cells.append([str(row["dim"]), *(f"{row[model]['value']:.4f}" for model in models)])
            if is_compared:
                change = "{:+.4f} [{:+.4f}, {:+.4f}]".format(row["difference"], *row["ci95"])
                cells[-1] += [change, format_p(row["p_holm"]), f"{row['wins']}/{row['losses']}"]
        what = "" if name == "domain" else f" of the set {name}"
        lines += [f"{MAIN_METRIC} over {size['queries']:,} queries and {size['documents']:,} documents{what}"]
        lines += [*_aligned(cells), ""]
    vectors = stored(evaluation)
    kinds = list(dict.fromkeys(entry["vectors"] for entry in evaluation["results"]))
    cells = [["vectors", "dim", "bytes", "ms/search", MAIN_METRIC, "kept"]]
    for row in sorted(vectors, key=lambda row: kinds.index(row["vectors"])):
        kept = "-" if row["kept"] is None else f"{100 * row['kept']:.1f} %"
        ms = "-" if row["ms"] is None else f"{row['ms']:.3f}"
        cells.append([row["vectors"], str(row["dim"]), str(row["bytes"]), ms, f"{row['value']:.4f}", kept])
    lines += [f"what a vector costs and keeps ({vectors[0]['model']})", *_aligned(cells)]
    return "\n".join([*lines, *map(gate_line, evaluation.get("gates", []))])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _place(entry: dict[str, Any]) -> tuple[str, int]:
    return entry.get("vectors", "float32"), entry["dim"]
