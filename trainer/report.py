"""One self-contained HTML page about a run: python -m trainer.report RUN_DIR

Says in words what was trained, whether it is better, by how much and how surely; then curves, tables, the
queries that changed most, data, environment and the command. It opens without a network: no script, no
font, no image, and a policy in its head forbids the browser to fetch any. A missing file is named, not fatal.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.errors import UserError, exit_code
from launch.files import fsync_path
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
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "p": format_p,
        "words": _words,
        "duration": _duration,
        "pretty": _pretty,
        "moment": _moment,
    }
    page = environment.get_template("report.html.jinja").render(_view(run_dir, found, notes))
    target, partial = run_dir / PAGE, run_dir / f".{PAGE}.partial"
    try:
        # Half of a surrogate pair can reach a text through JSON; UTF-8 cannot hold it.
        partial.write_text(page, encoding="utf-8", errors="replace")
        fsync_path(partial)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"report: cannot write {target}: {error.strerror}") from error
    return target


def _read(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """(contents by file name, notes on what is missing or unreadable)."""
    found: dict[str, Any] = {}
    notes = []
    for name, holds in _INPUTS.items():
        path = run_dir / name
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            if name.endswith(".jsonl"):
                found[name], broken = _records(text)
                if broken:
                    notes.append(f"{name}: {broken} unreadable line(s) left out")
            else:
                content = json.loads(text)
                if not isinstance(content, dict):
                    raise ValueError("not a JSON object")
                found[name] = content
        except FileNotFoundError:
            notes.append(f"{name} is missing: no {holds}")
        except (OSError, ValueError) as error:
            notes.append(f"{name} cannot be read ({str(error).splitlines()[0]}): no {holds}")
    return found, notes


def _records(text: str) -> tuple[list[dict[str, Any]], int]:
    """(steps in order, lines left out). A step that a restart did again counts once, as done last."""
    steps: dict[int, dict[str, Any]] = {}
    broken = 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
            steps[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            broken += 1
    return [steps[number] for number in sorted(steps)], broken


def _view(run_dir: Path, found: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Everything that the template shows."""
    run, evaluation = found.get("run.json", {}), found.get("evaluation.json", {})
    steps = found.get("metrics.jsonl", [])
    rows = rows_by_dim(evaluation, MAIN_METRIC)
    return {
        "name": run_dir.resolve().name,
        "run": run,
        "notes": notes,
        "summary": [*_training_words(run, steps), *_quality_words(evaluation, rows)],
        "metric": _LABEL,
        "rows": rows,
        "quality": _quality_chart(rows),
        "metrics": _all_metrics(evaluation),
        "results": evaluation.get("results", []),
        "curves": _curves(steps),
        "steps": steps,
        "queries": found.get("evaluation_queries.json"),
        "bundle": found.get("bundle/manifest.json"),
    }


def _training_words(run: dict[str, Any], steps: list[dict[str, Any]]) -> list[str]:
    if not run:
        return []
    config = run.get("config", {})
    data = run.get("data") or []
    pairs = sum(source.get("rows") or 0 for source in data)
    names = ", ".join(str(source.get("name")) for source in data)
    batch = config.get("train", {}).get("global_batch_size")
    done = run.get("steps") or (steps[-1]["step"] if steps else None)
    model = config.get("model", {}).get("path", "The model")
    sentence = f"{model} was fine-tuned on {pairs:,} rows of {names or 'unnamed data'}"
    if done and batch:
        sentence += f", in {done:,} steps of {batch:,} rows"
    if run.get("seconds", {}).get("train"):
        sentence += f" that took {_duration(run['seconds']['train'])}"
    words = [f"{sentence}."]
    if not run.get("finished"):
        words.append("The run has not finished: this page shows what there is so far.")
    return words


def _quality_words(evaluation: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Better or not, by how much, how surely, and which dim is a good trade."""
    if not rows:
        return []
    full = rows[0]
    any_result = evaluation["results"][0]
    setting = f"over {any_result['queries']:,} held-out queries and {any_result['documents']:,} passages"
    if full["difference"] is None:
        one = full["tuned"] or full["base"]
        return [f"{_LABEL} at {full['dim']} dims is {one['value']:.3f} {setting}; there is nothing to compare."]
    low, high = full["ci95"]
    sure = full["p_holm"] < 0.05
    if sure and low > 0:
        verdict = "The tuned model is better, and chance does not explain it"
    elif sure and high < 0:
        verdict = "The tuned model is worse than the base model, and chance does not explain it"
    else:
        verdict = "The evaluation does not tell the two models apart"
    words = [
        f"{verdict}: {_LABEL} at {full['dim']} dims went from {full['base']['value']:.3f} to "
        f"{full['tuned']['value']:.3f} ({full['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, "
        f"p {_p_words(full['p_holm'])}) {setting}."
    ]
    if any_result["queries"] < _FEW_QUERIES:
        words.append(f"{any_result['queries']} queries are few: take the figures as a hint.")
    if len(rows) > 1:
        words.append(_trade_words(rows))
    return words


def _trade_words(rows: list[dict[str, Any]]) -> str:
    full = rows[0]["tuned"]["value"]
    good = [
        row for row in rows[1:] if row["tradeoff"] and full > 0 and full + row["tradeoff"]["ci95"][0] >= _KEEPS * full
    ]
    if not good:
        return f"No smaller dim surely keeps {100 * _KEEPS:.0f} % of the full width's {_LABEL}."
    row, percent = good[-1], 100 * _KEEPS
    return (
        f"{row['dim']} dims are a good trade: {100 * row['kept']:.1f} % of the full width's {_LABEL} "
        f"(at least {percent:.0f} % by the lower end of its interval) "
        f"for {row['bytes']:,} bytes a vector instead of {rows[0]['bytes']:,}."
    )


def _p_words(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"= {p:.3f}"


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
    wanted: list[tuple[str, list[tuple[str, Any]], bool]] = [
        ("Loss", [("loss", lambda r: r.get("loss")), ("held out", lambda r: r.get("eval_loss"))], False),
        ("Loss by dim", [(d, lambda r, d=d: (r.get("loss_by_dim") or {}).get(d)) for d in dims], False),
        ("Learning rate", [("learning rate", lambda r: r.get("learning_rate"))], True),
        ("Gradient norm before clipping", [("norm", lambda r: r.get("grad_norm"))], True),
        ("Real tokens per second", [("tokens/s", lambda r: r.get("real_tokens_per_s"))], True),
    ]
    charts = []
    for title, lines, from_zero in wanted:
        series = [Series(name, _thin([(r["step"], value(r)) for r in steps])) for name, value in lines]
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


def _moment(time: str) -> str:
    """An ISO 8601 time as people write it."""
    return str(time).replace("T", " ").replace("+00:00", " UTC")


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
