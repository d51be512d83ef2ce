"""HTML pages about runs: python -m trainer.report RUN [RUN ...] [--out FILE] [--pictures DIR]

One run: says in words what was trained, whether it is better, by how much and how surely, and what to deploy; then
curves, tables, the queries that changed most, data, environment and the command. Several runs: side by side, and what
differs between them. A page opens without a network: no script, no font, no image, and a policy in its head forbids
the browser to fetch any. A missing file is named, not fatal.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from launch.errors import UserError, exit_code
from launch.files import write_text
from trainer.charts import Chart, Series, inline, number, save
from trainer.evaluation import MAIN_METRIC, format_p
from trainer.figures import KEEPS, entries, of_files, rows_by_dim, stored, to_deploy

PAGE = "report.html"
_INPUTS = {
    "run.json": "settings, data, environment and times",
    "metrics.jsonl": "training curves",
    "evaluation.json": "retrieval quality",
    "evaluation_queries.json": "queries that changed most",
    "bundle/manifest.json": "ONNX bundle",
}
_OF_EVAL = ("evaluation.json", "evaluation_queries.json")  # all that `nestling eval` writes
_POINTS = 400  # per curve: more are averaged, so that a page of a long run stays small
_LABELS = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map@100": "MAP@100"}
_LABEL = _LABELS[MAIN_METRIC]
_QUALITY = ("quality", f"{_LABEL} by dim", "dims")
_FEW_QUERIES = 50
_LOSS = ("loss", "Loss", {"training": "loss", "held out": "eval_loss"}, False)
_SPEED = ("throughput", "Real tokens per second", {"": "real_tokens_per_s"}, True)
_CURVES = (  # key, title, {name: key of a flattened record}, does the y axis begin at 0
    _LOSS,
    ("loss-by-dim", "Loss by dim", {"{dim}": "loss_by_dim.{dim}"}, False),
    ("held-out-loss", "Held-out loss by dim", {"{dim}": "eval_loss_by_dim.{dim}"}, False),
    ("learning-rate", "Learning rate", {"": "learning_rate"}, True),
    ("gradient-norm", "Gradient norm before clipping", {"": "grad_norm"}, True),
    _SPEED,
    ("padding", "Padded / real tokens", {"": "padded_over_real"}, False),
    ("memory", "Memory of a process, bytes", {"": "memory_bytes"}, True),
)
_RECORDED = ("config", "git", "versions", "devices", "world")  # of run.json: what of them differs between runs


def main(argv: Sequence[str]) -> int:
    """Write the page and print its path."""
    parser = argparse.ArgumentParser(prog="nestling report", description="Write one HTML page about a run, or several.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, for example runs/demo")
    default = f"default: {PAGE} in the run; of several runs, in the folder that holds them all"
    parser.add_argument("--out", type=Path, metavar="FILE", help=default)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the page's charts as PNG and SVG files too")
    arguments = parser.parse_args(argv)
    print(write_report(*arguments.runs, out=arguments.out, pictures=arguments.pictures))
    return 0


def write_report(*runs: Path, out: Path | None = None, pictures: Path | None = None) -> Path:
    """Write a page about one run or several from whatever of their files is there, and return its path.

    Raises UserError if a folder or all of its inputs are missing, or something cannot be written.
    """
    import jinja2

    folders = [run.resolve() for run in runs]
    if len(set(folders)) < len(runs):
        raise UserError(f"report: got {' '.join(map(str, runs))}, allowed: each run once; leave out the second")
    together = Path(os.path.commonpath([folder.parent for folder in folders]))
    views = [_view(run, folder.relative_to(together).as_posix()) for run, folder in zip(runs, folders, strict=True)]
    ours, lax = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.ChainableUndefined
    environment = jinja2.Environment(loader=ours, undefined=lax, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"p": format_p, "words": _words, "duration": _duration, "draw": inline}
    environment.globals |= {"metric": _LABEL, "labels": _LABELS, "keeps": KEEPS, "few_queries": _FEW_QUERIES}
    forms = {"num": "{:.3f}", "signed": "{:+.3f}", "percent": "{:.1%}", "hundredths": "{:.2%}", "thousands": "{:,.0f}"}
    environment.filters |= {name: partial(_formed, form) for name, form in forms.items()}
    environment.filters["of_files"] = of_files
    environment.filters["pretty"] = partial(json.dumps, indent=2, ensure_ascii=False)
    view, template = (views[0], PAGE) if len(views) == 1 else (_compared(views), "compare.html")
    page = environment.get_template(f"{template}.jinja").render(view)
    target = out or (runs[0] if len(runs) == 1 else together) / PAGE
    try:
        write_text(target, page)
        if pictures:
            save(list(view["charts"].values()), pictures)
    except OSError as error:
        what = str(error.filename).replace(".partial-", "")
        raise UserError(f"report: cannot write {what}: {error.strerror}; choose another --out or --pictures") from error
    return target


def _read(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """(contents by file name, notes on what is missing or unreadable)."""
    found: dict[str, Any] = {}
    notes, missing = [], []
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
            missing.append(name)
        except (OSError, ValueError) as error:
            notes.append(f"{name} cannot be read ({str(error).splitlines()[0]}): no {holds}")
    if not found:
        raise UserError(f"report: {run_dir} holds none of {', '.join(_INPUTS)}; give a run's folder: runs/demo")
    is_eval = "models" in found.get("evaluation.json", {})
    notes += [f"{n} is missing: no {_INPUTS[n]}" for n in missing if n in _OF_EVAL or not is_eval]
    return found, notes


def _records(text: str, notes: list[str]) -> list[dict[str, Any]]:
    """Steps in order, flattened; what is left out is noted. A step that a restart did again counts as done last."""
    steps: dict[int, dict[str, Any]] = {}
    broken = 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
            steps[int(record["step"])] = _flat(record)
        except (ValueError, KeyError, TypeError):
            broken += 1
    if broken:
        notes.append(f"metrics.jsonl: {broken} unreadable line(s) left out")
    return [steps[number] for number in sorted(steps)]


def _view(run_dir: Path, name: str) -> dict[str, Any]:
    """Everything that the template shows of a run."""
    found, notes = _read(run_dir)
    evaluation, steps = found.get("evaluation.json", {}), found.get("metrics.jsonl", [])
    rows, vectors = rows_by_dim(evaluation), stored(evaluation)
    seen = dict.fromkeys(m[1] for record in steps for key in record if (m := re.fullmatch(r"eval_(.+@\d+)_\d+", key)))
    retrieval = [
        (
            f"eval-{m.replace('@', '-')}",
            f"{_LABELS.get(m, m)} during training, by dim",
            {"{dim}": f"eval_{m}_{{dim}}"},
            False,
        )
        for m in seen
    ]
    curves = [chart for curve in (*retrieval, *_CURVES) if (chart := _curve(*curve, {"": steps}))]
    quality = [_points(*_QUALITY, {model: _by_dim(rows, model) for model in ("base", "tuned")}), _sizes(vectors)]
    kinds = dict.fromkeys((e["metric"], e["set"], e["vectors"]) for e in entries(evaluation, "results"))
    return {
        "name": name,
        "run": found.get("run.json", {}),
        "notes": notes,
        "evaluation": evaluation,
        "rows": rows,
        "sure": _sure(rows),
        "general": (general := rows_by_dim(evaluation, set="general")),
        "forgotten": _sure(general),
        "stored": vectors,
        "deploy": to_deploy(vectors),
        "kinds": {(m, s, v): rows_by_dim(evaluation, m, set=s, vectors=v) for m, s, v in kinds},
        "charts": {chart.key: chart for chart in (*quality, _averages(evaluation), *curves) if chart},
        "curves": curves,
        "steps": steps,
        "speed": median([s for record in steps if (s := record.get("real_tokens_per_s"))] or [0]) or None,
        "memory": max((m for record in steps if (m := record.get("memory_bytes"))), default=None),
        "queries": found.get("evaluation_queries.json"),
        "bundle": found.get("bundle/manifest.json"),
    }


def _compared(views: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that the template shows of several runs."""
    flat = [_flat({key: view["run"].get(key) for key in _RECORDED}) for view in views]
    settings = {key: [one.get(key) for one in flat] for key in dict.fromkeys(key for one in flat for key in one)}
    judged = [view for view in views if view["rows"]]
    bases = [_by_dim(view["rows"], "base") for view in judged]
    # One line where all runs began from the same figures.
    models = {"base": bases[0]} if bases and all(base == bases[0] for base in bases) else {}
    models |= {view["name"]: _by_dim(view["rows"], "tuned") for view in judged}
    steps = {view["name"]: view["steps"] for view in views}
    held_out = ("held-out-loss", "Held-out loss", {"": "eval_loss"}, False)
    curves = [_curve(*curve, steps) for curve in ((*_LOSS[:2], {"": "loss"}, False), held_out, _SPEED)]
    sets = [(view["evaluation"].get("sets") or {}).get("domain") or view["stored"][0]["queries"] for view in judged]
    return {
        "name": ", ".join(steps),
        "views": views,
        "differs": {key: values for key, values in settings.items() if any(value != values[0] for value in values)},
        "dims": sorted({row["dim"] for view in views for row in view["rows"]}, reverse=True),
        "is_comparable": all(one == sets[0] for one in sets),
        "charts": {chart.key: chart for chart in (_points(*_QUALITY, models), *curves) if chart},
    }


def _by_dim(rows: list[dict[str, Any]], model: str) -> dict[int, dict[str, Any]]:
    return {row["dim"]: row[model] for row in rows if row[model]}


def _sure(rows: list[dict[str, Any]]) -> str | None:
    """What is sure of the tuned model at full width: better, worse, unclear; None where nothing is compared."""
    if not rows or rows[0]["difference"] is None:
        return None
    low, high = rows[0]["ci95"]
    return "unclear" if rows[0]["p_holm"] >= 0.05 or low <= 0 <= high else "better" if low > 0 else "worse"


def _sizes(rows: list[dict[str, Any]]) -> Chart | None:
    """Quality by what a vector takes, where there is more than one way of storing it."""
    kinds = dict.fromkeys(row["vectors"] for row in rows)
    lines = {kind: {row["bytes"]: row for row in rows if row["vectors"] == kind} for kind in kinds}
    return _points("storage", f"{_LABEL} by size of a vector", "bytes", lines) if len(kinds) > 1 else None


def _averages(evaluation: dict[str, Any]) -> Chart | None:
    """Quality of weights averaged with the base model's, from the tuned model (0) to the base model (1)."""
    found = entries(evaluation, "averages", metric=MAIN_METRIC)
    if not found:
        return None
    dim, share = found[0]["dim"], {"tuned": 0.0, "base": 1.0}
    ends = entries(evaluation, "results", metric=MAIN_METRIC, dim=dim, vectors="float32")
    lines: dict[str, dict[float, dict[str, Any]]] = {}
    ends = [end | {"base_share": share[end["model"]]} for end in ends]
    for entry in found + ends:
        lines.setdefault(entry["set"], {})[entry["base_share"]] = entry
    return _points("averages", f"{_LABEL} at {dim} dims of averaged weights", "share of the base model", lines, False)


def _points(
    key: str, title: str, x_label: str, lines: Mapping[str, Mapping[Any, dict[str, Any]]], is_descending: bool = True
) -> Chart | None:
    """Results with their intervals: a line each, of results by what stands below the x axis."""
    xs = sorted({x for line in lines.values() for x in line}, reverse=is_descending)
    series = []
    for name, line in lines.items():
        at = [(float(i), line[x]) for i, x in enumerate(xs) if x in line]
        if at:
            series.append(Series(name, [(i, e["value"]) for i, e in at], [tuple(e["ci95"]) for _, e in at]))
    if not series:
        return None
    said = (f"{s.name}: " + ", ".join(f"{y:.3f} at {xs[int(i)]:,g} {x_label}" for i, y in s.points) for s in series)
    ticks = [f"{x:g}" for x in xs]  # with commas 1,536 and 1,024 would touch
    return Chart(key, f"{title}, with 95 % intervals", series, x_label, f"{title}. {'; '.join(said)}", ticks)


def _curve(
    key: str, title: str, lines: dict[str, str], from_zero: bool, runs: dict[str, list[dict[str, Any]]]
) -> Chart | None:
    """A curve a run and line over the steps; a line "{dim}" is one for each dim that was logged."""
    series = []
    for run, steps in runs.items():
        for name, wanted in lines.items():
            before, is_by_dim, _ = wanted.partition("{dim}")
            logged = {k.removeprefix(before) for record in steps for k in record if k.startswith(before)}
            dims = sorted(filter(str.isdigit, logged), key=int, reverse=True) if is_by_dim else [""]
            for dim in dims:
                points = _thin([(record["step"], record.get(before + dim)) for record in steps])
                series += [Series(f"{run} {dim or name}".strip(), points)] if points else []
    if not series:
        return None
    said = (
        f"{s.name} from {number(s.points[0][1])} at step {s.points[0][0]:.0f} to {number(s.points[-1][1])} "
        f"at step {s.points[-1][0]:.0f}"
        for s in series
    )
    return Chart(key, title, series, "step", f"{title}: {'; '.join(said)}", from_zero=from_zero)


def _thin(points: list[tuple[int, Any]]) -> list[tuple[float, float]]:
    """Finite points, at most _POINTS: neighbours are averaged."""
    kept = [(float(x), float(y)) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
    size = math.ceil(len(kept) / _POINTS) or 1
    groups = [kept[i : i + size] for i in range(0, len(kept), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Values by dotted path."""
    is_list = isinstance(value, list) and any(isinstance(inner, dict) for inner in value)
    inside = dict(enumerate(value)) if is_list else value
    if not isinstance(inside, dict) or not inside:
        return {path: value}
    dot = path and path + "."
    return {name: leaf for key, inner in inside.items() for name, leaf in _flat(inner, f"{dot}{key}").items()}


def _formed(form: str, value: Any) -> str:
    """A number so written, an interval as "low to high", and what is unknown as a dash."""
    if isinstance(value, list | tuple):
        return " to ".join(_formed(form, end) for end in value)
    return form.format(value).replace("%", " %") if isinstance(value, int | float) else "-"


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
