"""One self-contained HTML page about a run: python -m trainer.report RUN_DIR

Says in words what was trained, whether it is better, by how much and how surely; then curves, tables, the
queries that changed most, data, environment and the command. It opens without a network: no script, no
font, no image, and a policy in its head forbids the browser to fetch any. A missing file is named, not fatal.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launch.errors import UserError, exit_code
from launch.files import write_text
from trainer.charts import Series, chart
from trainer.evaluation import MAIN_METRIC, format_p, rows_by_dim

PAGE = "report.html"
_INPUTS = {
    "run.json": "settings, data, environment and times",
    "metrics.jsonl": "training curves",
    "evaluation.json": "retrieval quality",
    "evaluation_queries.json": "queries that changed most",
    "bundle/manifest.json": "ONNX bundle",
}
_POINTS = 400  # per curve: more are averaged, so that a page of a long run stays small
_LABELS: dict[Any, str] = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map@100": "MAP@100"}
_LABEL = _LABELS[MAIN_METRIC]
_FEW_QUERIES = 50
_KEEPS = 0.95  # a dim is called a good trade if it surely keeps this share of the full width's quality
_DIMS_DRAWN = 4  # curves that can still be told apart


def main(argv: Sequence[str]) -> int:
    """Write RUN_DIR/report.html and print its path."""
    parser = argparse.ArgumentParser(prog="nestling report", description="Write one HTML page about a run.")
    parser.add_argument("run_dir", type=Path, help="run directory, for example runs/demo")
    print(write_report(parser.parse_args(argv).run_dir))
    return 0


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from whatever of the run's files is there, and return its path.

    Raises UserError if the folder or all of its inputs are missing.
    """
    import jinja2

    found, notes = _read(run_dir)
    if not found:
        raise UserError(f"report: {run_dir} holds none of {', '.join(_INPUTS)}; give a run's folder: runs/demo")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined
    )
    environment.filters |= {"p": format_p, "words": _words, "duration": _duration, "thousands": "{:,}".format}
    environment.filters["pretty"] = partial(json.dumps, indent=2, ensure_ascii=False)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    page = template.render(_view(run_dir, found, notes))
    target = run_dir / PAGE
    try:
        write_text(target, page)
    except OSError as error:
        raise UserError(f"report: cannot write {target}: {error.strerror}") from error
    return target


def _read(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """(contents by file name, notes on what is missing or unreadable)."""
    found: dict[str, Any] = {}
    notes = []
    for name, holds in _INPUTS.items():
        try:
            text = (run_dir / name).read_text(encoding="utf-8", errors="replace")
            if name == "metrics.jsonl":
                found[name] = _records(text, notes)
            elif isinstance(content := json.loads(text), dict):
                found[name] = content
            else:
                raise ValueError("not a JSON object")
        except FileNotFoundError:
            notes.append(f"{name} is missing: no {holds}")
        except (OSError, ValueError) as error:
            notes.append(f"{name} cannot be read ({str(error).splitlines()[0]}): no {holds}")
    return found, notes


def _records(text: str, notes: list[str]) -> list[dict[str, Any]]:
    """Steps in order; what is left out is noted. A step that a restart did again counts once, as done last."""
    steps: dict[int, dict[str, Any]] = {}
    broken = 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
            steps[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            broken += 1
    if broken:
        notes.append(f"metrics.jsonl: {broken} unreadable line(s) left out")
    return [steps[number] for number in sorted(steps)]


def _view(run_dir: Path, found: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Everything that the template shows."""
    run, evaluation = found.get("run.json", {}), found.get("evaluation.json", {})
    steps = found.get("metrics.jsonl", [])
    rows = rows_by_dim(evaluation, MAIN_METRIC)
    return {
        "name": run_dir.resolve().name,
        "run": run,
        "notes": notes,
        "evaluation": evaluation,
        "verdict": _verdict(rows[0]) if rows else None,
        "trade": _good_trade(rows) if rows else None,
        "percent": f"{100 * _KEEPS:.0f} %",
        "few_queries": _FEW_QUERIES,
        "metric": _LABEL,
        "rows": rows,
        "quality": _quality_chart(rows),
        "metrics": _all_metrics(evaluation),
        "curves": _curves(steps),
        "steps": steps,
        "queries": found.get("evaluation_queries.json"),
        "bundle": found.get("bundle/manifest.json"),
    }


def _verdict(full: dict[str, Any]) -> str | None:
    """Whether the tuned model is better at full width; None where there is nothing to compare."""
    if full["difference"] is None:
        return None
    low, high = full["ci95"]
    sure = full["p_holm"] < 0.05
    if sure and low > 0:
        return "The tuned model is better, and chance does not explain it"
    if sure and high < 0:
        return "The tuned model is worse than the base model, and chance does not explain it"
    return "The evaluation does not tell the two models apart"


def _good_trade(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The smallest dim that surely keeps _KEEPS of the full width's quality."""
    full = rows[0]["tuned"]["value"] if rows[0]["tuned"] else 0.0
    traded = [row for row in rows[1:] if row["tradeoff"] and full > 0]
    return next((row for row in reversed(traded) if full + row["tradeoff"]["ci95"][0] >= _KEEPS * full), None)


def _quality_chart(rows: list[dict[str, Any]]) -> Any:
    series = []
    for name in ("base", "tuned"):
        known = [(i, row[name]) for i, row in enumerate(rows) if row[name]]
        if known:
            points = [(float(i), entry["value"]) for i, entry in known]
            series.append(Series(name, points, [(e["ci95"][0], e["ci95"][1]) for _, e in known]))
    if not series:
        return None
    spoken = "; ".join(
        f"{row['dim']} dims: " + ", ".join(f"{n} {row[n]['value']:.3f}" for n in ("base", "tuned") if row[n])
        for row in rows
    )
    title = f"{_LABEL} by dim, with 95 % intervals"
    return chart(title, series, "dims", description=spoken, x_names=[str(row["dim"]) for row in rows])


def _all_metrics(evaluation: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    names: dict[str, None] = dict.fromkeys(entry["metric"] for entry in evaluation.get("results", []))
    return {_LABELS.get(name, name): rows_by_dim(evaluation, name) for name in names}


def _curves(steps: list[dict[str, Any]]) -> list[Any]:
    """Losses, learning rate, gradient norm and throughput, as far as they were logged."""
    dims = sorted({d for record in steps for d in record.get("loss_by_dim") or {}}, key=int, reverse=True)
    if len(dims) > _DIMS_DRAWN:
        dims = [dims[round(i * (len(dims) - 1) / (_DIMS_DRAWN - 1))] for i in range(_DIMS_DRAWN)]
    flat = [record | {f"loss_{d}": v for d, v in (record.get("loss_by_dim") or {}).items()} for record in steps]
    wanted = (
        ("Loss", {"loss": "loss", "held out": "eval_loss"}, False),
        ("Loss by dim", {dim: f"loss_{dim}" for dim in dims}, False),
        ("Learning rate", {"learning rate": "learning_rate"}, True),
        ("Gradient norm before clipping", {"norm": "grad_norm"}, True),
        ("Real tokens per second", {"tokens/s": "real_tokens_per_s"}, True),
    )
    charts = []
    for title, lines, from_zero in wanted:
        series = [Series(name, _thin([(r["step"], r.get(key)) for r in flat])) for name, key in lines.items()]
        series = [s for s in series if s.points]
        if series:
            spoken = "; ".join(
                f"{s.name} from {s.points[0][1]:.4g} at step {s.points[0][0]:.0f} to {s.points[-1][1]:.4g} "
                f"at step {s.points[-1][0]:.0f}"
                for s in series
            )
            charts.append(chart(title, series, "step", description=f"{title}: {spoken}", from_zero=from_zero))
    return charts


def _thin(points: list[tuple[int, Any]]) -> list[tuple[float, float]]:
    """Finite points, at most _POINTS: neighbours are averaged."""
    kept = [(float(x), float(y)) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
    size = math.ceil(len(kept) / _POINTS) or 1
    groups = [kept[i : i + size] for i in range(0, len(kept), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _words(value: Any) -> str:
    """Any small JSON value as text."""
    if value is None or value in ({}, [], ""):
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_words(inner) for inner in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _duration(seconds: float) -> str:
    """4.2 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
