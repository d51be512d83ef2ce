"""trainer/report.py: what the page says, that it fetches nothing, and that texts stay texts."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.errors import UserError
from trainer.charts import Series, chart
from trainer.evaluation import RetrievalSet, evaluate
from trainer.report import write_report

ROOT = Path(__file__).parent.parent
ATTACK = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&</p>{{ 7*7 }}'


class Page(HTMLParser):
    """Elements, attributes and text of a page as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def run_folder(folder: Path, shift: float = 0.8, queries: int = 120, text: str = "plain") -> Path:
    """A run's files; the tuned model's queries lie closer to their answers by `shift`."""
    random = np.random.default_rng(0)
    corpus = random.normal(size=(400, 32)).astype(np.float32)
    noise = random.normal(size=(queries, 32)).astype(np.float32)
    other = random.normal(size=(queries, 32)).astype(np.float32)
    answers = corpus[:queries]
    models = {"base": (answers + 1.6 * noise, corpus), "tuned": (answers + (1.6 - shift) * other, corpus)}
    texts = RetrievalSet(
        [f"query {i} {text}" for i in range(queries)],
        [f"passage {i} {text}" for i in range(400)],
        [{i} for i in range(queries)],
    )
    evaluation, by_query = evaluate(texts, models, [32, 16, 4])
    folder.mkdir(exist_ok=True)
    steps = [
        {
            "step": step,
            "epoch": step / 50,
            "loss": 3 / step,
            "loss_by_dim": {"32": 1 / step, "4": 2 / step},
            "learning_rate": 1e-5 * step,
            "grad_norm": 1.0,
            "real_tokens_per_s": 500.0 + step,
            "seconds": {"embed": 1.0},
            "memory_bytes": 2_000_000_000,
        }
        for step in range(1, 51)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "evaluation_queries.json").write_text(json.dumps(by_query))
    run = {
        "run_id": "abc123",
        "config": {"model": {"path": "some/model"}, "train": {"global_batch_size": 64}},
        "argv": ["demo.yaml"],
        "git": {"commit": "deadbeef", "dirty": True},
        "versions": {"torch": "2.13.0"},
        "devices": ["CPU, 2 cores"],
        "world": {"processes": 2, "nodes": 1},
        "data": [
            {
                "name": f"train {text}",
                "fingerprint": "f" * 64,
                "rows": 12345,
                "license": None,
                "dropped": {"empty": 2},
            }
        ],
        "started": "2025-01-01T00:00:00+00:00",
        "finished": "2025-01-01T00:05:00+00:00",
        "seconds": {"train": 245.0},
        "command": f"accelerate launch train.py {text}",
        "steps": 50,
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "bundle").mkdir(exist_ok=True)
    (folder / "bundle/manifest.json").write_text(json.dumps({"pooling": "mean", "base_model": f"base {text}"}))
    return folder


def test_texts_of_every_file_stay_texts(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path / "run", text=ATTACK)).read_text()
    page = Page(html)
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for place in ("train", "accelerate launch train.py", "base"):
        assert f"{place} {ATTACK}" in page.words
    assert re.search(r"query \d+ " + re.escape(ATTACK), page.words)
    assert re.search(r"passage \d+ " + re.escape(ATTACK), page.words)
    assert "<script" not in html and "<img" not in html


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path / "run")).read_text()
    page = Page(html)
    assert "default-src 'none'" in html
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import", html)
    assert not [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]


def test_every_chart_has_a_name_and_stays_inside_its_frame(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path / "run")).read_text()
    charts = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)" role="img" aria-label="([^"]+)">(.*?)</svg>', html)
    assert len(charts) == html.count("<svg") == 6
    for width, height, label, inside in charts:
        assert len(label) > 10
        for points in re.findall(r'points="([^"]+)"', inside):
            xy = np.array([[float(n) for n in point.split(",")] for point in points.split()])
            assert len(xy) == 50
            assert (xy >= 0).all() and (xy[:, 0] <= int(width)).all() and (xy[:, 1] <= int(height)).all()


def test_chart_places_points_by_their_values() -> None:
    data = [(1.0, 10.0), (2.0, 40.0), (5.0, 20.0)]
    svg = str(chart("t", [Series("a", data)], "step", description="d"))
    found = re.search(r'points="([^"]+)"', svg)
    assert found
    xy = np.array([[float(n) for n in point.split(",")] for point in found[1].split()])
    scale_x = np.polyfit([x for x, _ in data], xy[:, 0], 1)
    scale_y = np.polyfit([y for _, y in data], xy[:, 1], 1)
    assert scale_x[0] > 0 > scale_y[0]
    np.testing.assert_allclose(np.polyval(scale_x, [x for x, _ in data]), xy[:, 0], atol=0.1)
    np.testing.assert_allclose(np.polyval(scale_y, [y for _, y in data]), xy[:, 1], atol=0.1)
    # The tick that reads 20 stands where the value 20 is drawn.
    tick = re.search(r'y="([\d.]+)" text-anchor="end">20<', svg)
    assert tick and float(tick[1]) - 4 == pytest.approx(xy[2, 1], abs=0.11)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-9, 2e-9], [-3.0, 1e7]])
def test_chart_of_odd_values(values: list[float]) -> None:
    svg = str(chart("t", [Series("a", list(enumerate(values, 1)))], "step", description="d", from_zero=True))
    assert "nan" not in svg and "inf" not in svg and svg.count("<line") >= 2


@pytest.mark.parametrize(
    ("shift", "says"),
    [
        (0.8, "The tuned model is better, and chance does not explain it: nDCG@10 at 32 dims went from"),
        (-0.8, "The tuned model is worse than the base model, and chance does not explain it"),
        (0.0, "The evaluation does not tell the two models apart"),
    ],
)
def test_summary_follows_the_figures(tmp_path: Path, shift: float, says: str) -> None:
    folder = run_folder(tmp_path / "run", shift)
    words = Page(write_report(folder).read_text()).words
    assert says in words
    assert (
        "some/model was fine-tuned on 12,345 rows of train plain, in 50 steps of 64 rows that took 4 min 5 s." in words
    )
    evaluation = json.loads((folder / "evaluation.json").read_text())
    entry = next(e for e in evaluation["comparisons"] if e["dim"] == 32 and e["metric"] == "ndcg@10")
    assert f"({entry['difference']:+.3f}, 95 % interval {entry['ci95'][0]:+.3f} to {entry['ci95'][1]:+.3f}" in words
    assert "120 held-out queries and 400 passages" in words


def test_good_trade_needs_its_interval(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", shift=1.5)
    content = json.loads((folder / "evaluation.json").read_text())
    full = next(e for e in content["results"] if (e["model"], e["dim"], e["metric"]) == ("tuned", 32, "ndcg@10"))

    def words(low: float) -> str:
        for entry in content["tradeoffs"]:
            entry["ci95"][0] = low * full["value"] if entry["b"]["dim"] == 16 else -1.0
        (folder / "evaluation.json").write_text(json.dumps(content))
        return Page(write_report(folder).read_text()).words

    assert "16 dims are a good trade" in words(-0.049)
    assert "No smaller dim surely keeps 95 %" in words(-0.051)


def test_few_queries_are_called_few(tmp_path: Path) -> None:
    assert "30 queries are few" in Page(write_report(run_folder(tmp_path / "run", queries=30)).read_text()).words


@pytest.mark.parametrize(
    "name",
    ["run.json", "metrics.jsonl", "evaluation.json", "evaluation_queries.json", "bundle/manifest.json"],
)
def test_a_missing_or_broken_file_is_named(tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / name).unlink()
    words = Page(write_report(folder).read_text()).words
    assert f"{name} is missing" in words
    (folder / name).write_bytes(b'{"step": 1, \xff')
    words = Page(write_report(folder).read_text()).words
    assert (f"{name}: 1 unreadable line" if name.endswith("l") else f"{name} cannot be read") in words


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "evaluation.json"])
def test_one_file_alone_makes_a_page(tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path / "run")
    for path in folder.rglob("*.json*"):
        if path.name != name:
            path.unlink()
    html = write_report(folder).read_text()
    assert html.rstrip().endswith("</html>")
    assert Page(html).words.count(" is missing") == 4


def test_curves_of_a_long_restarted_run_with_nan(tmp_path: Path) -> None:
    steps = [{"step": step, "loss": float("nan") if step == 7 else 1.0} for step in [*range(1, 90), *range(50, 50_000)]]
    steps[-1]["loss_by_dim"] = None
    steps[60]["loss"] = 1e9  # done again by the restart
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 50000, "lo')
    page = write_report(tmp_path).read_text()
    assert len(page) < 40_000
    assert "Loss: loss from 1 at step" in page, "only the last record of a step counts"
    assert "1e+09" not in page and "1000000k" not in page
    assert "metrics.jsonl: 1 unreadable line(s) left out" in page


def test_half_a_surrogate_pair_does_not_break_the_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", text="\ud800 odd")
    assert "? odd" in write_report(folder).read_text(encoding="utf-8")


def test_command_line(tmp_path: Path) -> None:
    def report(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trainer.report", str(folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))

    done = report(run_folder(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'run' / 'report.html'}\n")
    for folder in (tmp_path / "nowhere", tmp_path):
        failed = report(folder)
        assert failed.returncode == 2 and failed.stdout == ""
        assert len(failed.stderr.splitlines()) == 1 and str(folder) in failed.stderr
    assert {path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")} == set()


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of run\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_the_table(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    words: Any = Page(write_report(folder).read_text()).words
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    for entry in results:
        if entry["metric"] == "ndcg@10":
            assert f"{entry['value']:.3f}" in words
    for said in (
        "unknown",
        "empty 2",
        "with uncommitted changes",
        "processes 2, nodes 1",
        "2.00 GB",
        "pooling mean",
    ):
        assert said in words, said
