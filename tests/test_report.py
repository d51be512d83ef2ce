"""trainer/report.py, figures.py: what the pages say, that they fetch nothing, that texts stay texts."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from launch.config_evaluate import Gate
from launch.errors import UserError
from tests import browser
from tests.vectors import ALONE, Encoded
from trainer.evaluation import compare, examples, joined, score
from trainer.gates import judge_gates
from trainer.report import write_report
from trainer.retrieval import RetrievalSet

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


@cache
def evaluated(shift: float, queries: int, text: str) -> str:
    """evaluation.json and evaluation_queries.json; tuned queries lie closer to their answers by `shift` on the domain's
    set and lie further away on the general one."""
    random = np.random.default_rng(0)
    corpus = random.normal(size=(400, 32)).astype(np.float32)
    noise, other = random.normal(size=(2, queries, 32)).astype(np.float32)
    texts = RetrievalSet(
        [f"query {i} {text}" for i in range(queries)],
        [f"passage {i} {text}" for i in range(400)],
        [{i: 1} for i in range(queries)],
    )
    scored = {}
    for name, gain in (("domain", shift), ("general", -0.8)):
        asked = {"base": corpus[:queries] + 1.6 * noise, "tuned": corpus[:queries] + (1.6 - gain) * other}
        scored[name] = {
            model: score(
                Encoded(texts, vectors, corpus),  # pyright: ignore[reportArgumentType]
                texts,
                [32, 16, 4],
                ["int8", "binary"] if model == "tuned" else [],
                batch_tokens=4096,
                world=ALONE,
            )
            for model, vectors in asked.items()
        }
    evaluation = joined([compare(texts, both, name) for name, both in scored.items()])
    gates = [Gate(gain=0.0), Gate(gain=-0.01, set="general"), Gate(gain=0.18)]
    evaluation["gates"] = judge_gates(gates, scored)
    at = {"set": "domain", "metric": "ndcg@10", "dim": 32, "ci95": [0.4, 0.6]}
    evaluation["averages"] = [at | {"base_share": share, "value": 0.5 + share / 10} for share in (0.25, 0.5)]
    for dim in (32, 16, 4):
        timed = {"dim": dim, "vectors": "float32", "ms_per_query": dim / 1000, "threads": 1, "documents": 400}
        evaluation["latency"].append(timed | {"bytes_per_vector": 4 * dim})
    return json.dumps([evaluation, examples(texts, scored["domain"])])


def run_folder(folder: Path, shift: float = 0.4, queries: int = 120, text: str = "plain") -> Path:
    """A run's files."""
    evaluation, by_query = json.loads(evaluated(shift, queries, text))
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
            "padded_over_real": 1.02,
            "memory_bytes": 2_000_000_000,
            **(
                {"eval_ndcg@10_32": step / 100, "eval_loss": 0.5, "eval_loss_by_dim": {"32": 0.25}}
                if step % 20 == 0
                else {}
            ),
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
        "best_step": 40,
        "subset": {"queries": 30, "documents": 200, "fingerprint": "5" * 64, "queries_of_final_evaluation": 3},
        "cost": {"currency": "EUR", "total": 1.25},
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


def test_pages_refer_to_nothing_outside_themselves(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name) for name in ("a", "b")]
    for path in (write_report(runs[0]), write_report(*runs)):
        html = path.read_text()
        page = Page(html)
        assert "default-src 'none'" in html and "script" not in page.tags
        assert not re.search(r"(https?:)?//[a-z]|url\((?!#)|@import|<\?xml|<!DOCTYPE svg", html)
        names = ("src", "href", "xlink:href", "action")
        assert all(value and value.startswith("#") for name, value in page.attributes if name in names)


def test_every_chart_has_a_description_and_ids_of_its_own(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path / "run")).read_text()
    labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', html)
    assert len(labels) == html.count("<svg") == html.count("<figcaption>") == 12
    spoken = " ".join(labels)
    for said in (
        "nDCG@10 by dim. base: 0.",
        "nDCG@10 by size of a vector. float32: 0.",
        "domain: 0.",
        "0.525 at 0.25 share of the base model",
        "nDCG@10 during training, by dim: 32 from 0.2 at step 20 to 0.4 at step 40",
        "held out from 0.5 at step 20",
        "Held-out loss by dim: 32 from 0.25",
        "Learning rate: from 1e-05 at step 1 to 0.0005 at step 50",
    ):
        assert said in spoken, said
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


@pytest.mark.parametrize(
    ("shift", "says"),
    [
        (0.4, "The tuned model is better, and chance does not explain it: nDCG@10 at 32 dims went from"),
        (-0.4, "The tuned model is worse than the base model, and chance does not explain it"),
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


def test_what_to_deploy_is_decided_by_the_interval(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", shift=1.5)
    content = json.loads((folder / "evaluation.json").read_text())
    found = [e for e in content["results"] if (e["model"], e["set"], e["metric"]) == ("tuned", "domain", "ndcg@10")]
    full = next(e["value"] for e in found if (e["vectors"], e["dim"]) == ("float32", 32))

    def words(**lows: float) -> str:
        for entry in content["tradeoffs"]:
            side = entry["b"]
            entry["ci95"][0] = lows.get(f"{side['vectors']}_{side['dim']}", -1.0) * full
        (folder / "evaluation.json").write_text(json.dumps(content))
        return Page(write_report(folder).read_text()).words

    said = words(float32_16=-0.049)
    assert (
        "Deploy 16 dims as float32: 64 bytes a vector instead of 128 (2 times smaller, 50.0 % saved; 0.016 ms" in said
    )
    assert "Deploy 32 dims as int8: 32 bytes" in words(float32_16=-0.049, int8_32=-0.04, int8_16=-0.051)
    assert "Deploy 16 dims as binary: 2 bytes" in words(float32_16=-0.01, binary_32=0.0, binary_16=-0.049)
    assert "Deploy 32 dims as float32: no smaller vector surely keeps 95 %" in words(float32_16=-0.051)


def test_gates_general_set_and_what_run_json_adds_are_said(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    words = Page(write_report(folder).read_text()).words
    content = json.loads((folder / "evaluation.json").read_text())
    assert [gate["outcome"] for gate in content["gates"]] == ["passed", "failed", "not decidable"]
    for gate in content["gates"]:
        assert f"Gate {gate['outcome']}: {gate['gate']}; found {gate['found']}." in words
    for said in (
        "gates passed 1 of 3",
        "It forgot some of what the base model knew: nDCG@10 there went from",
        "The tuned model is that of step 40",
        "30 queries over 200 documents, drawn once; 3 of the queries are in the final evaluation too. Best at step 40.",
        "currency EUR, total 1.25",
        "one exact search of 400 documents",
    ):
        assert said in words, said


@pytest.mark.parametrize("models", [("tuned",), ("base", "tuned")])
def test_a_folder_of_nestling_eval(tmp_path: Path, models: tuple[str, ...]) -> None:
    content, by_query = json.loads(evaluated(0.4, 120, "plain"))
    for kind in ("results", "comparisons", "tradeoffs"):
        content[kind] = [e for e in content[kind] if e["set"] == "domain" and e.get("model", "tuned") in models]
    content["models"] = {m: {"name": f"some/{m}", "artifact": "onnx-fp32", "fingerprint": "f" * 64} for m in models}
    if len(models) == 1:
        content["comparisons"], by_query = [], by_query | {"improved": [], "hurt": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(content | {"gates": [], "averages": []}))
    (tmp_path / "evaluation_queries.json").write_text(json.dumps(by_query))
    words = Page(write_report(tmp_path).read_text()).words
    assert "is missing" not in words and "Undefined" not in words
    assert "some/tuned (onnx-fp32) was judged by retrieval" in words
    alone = len(models) == 1
    assert ("there is nothing to compare" in words) == alone
    assert ("The tuned model is better" in words) == ("Queries that changed most" in words) == (not alone)


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
    assert "Loss: training from 1 at step" in page, "only the last record of a step counts"
    assert "1e+09" not in page and "1G" not in page
    assert "metrics.jsonl: 1 unreadable line(s) left out" in page


def test_half_a_surrogate_pair_does_not_break_the_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", text="\ud800 odd")
    assert "? odd" in write_report(folder).read_text(encoding="utf-8")


def report(*words: Path | str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.report", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ) | environment)


def test_command_line(tmp_path: Path) -> None:
    run, pictures = run_folder(tmp_path / "run"), tmp_path / "pictures"
    # A home that is not there: what matplotlib says of that is no concern of the user.
    done = report(run, "--pictures", pictures, HOME="/proc/none", MPLCONFIGDIR="/proc/none")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run / 'report.html'}\n", "")
    assert len(list(pictures.glob("*.png"))) == len(list(pictures.glob("*.svg"))) == 12
    failed = report(tmp_path / "nowhere")
    assert failed.returncode == 2 and failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1 and str(tmp_path / "nowhere") in failed.stderr


def test_what_a_user_gets_wrong_is_said(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    with pytest.raises(UserError, match="allowed: each run once"):
        write_report(run, tmp_path / "x/../run")
    with pytest.raises(UserError, match=r"cannot write \S*/no/page.html: No such file .*; choose another --out"):
        write_report(run, out=tmp_path / "no/page.html")
    with pytest.raises(UserError, match=r"cannot write \S*/run/run.json: File exists"):
        write_report(run, pictures=run / "run.json")
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == set()


def test_pictures_are_pictures(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path / "run"), pictures=tmp_path / "pictures")
    names = {path.stem for path in (tmp_path / "pictures").iterdir()}
    assert {"quality", "storage", "averages", "eval-ndcg-10", "loss", "throughput", "memory"} < names
    for name in names:
        with Image.open(tmp_path / f"pictures/{name}.png") as image:
            assert image.format == "PNG" and min(image.size) > 400
            colours = image.convert("RGB").getcolors(1 << 20)
            assert colours and max(colours)[1] == (255, 255, 255) and len(colours) > 10
        svg = ElementTree.parse(tmp_path / f"pictures/{name}.svg").getroot()
        assert svg.tag == "{http://www.w3.org/2000/svg}svg" and svg.get("aria-label") and svg.get("width")
        assert "var(" not in (tmp_path / f"pictures/{name}.svg").read_text()


def test_several_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    one, other = run_folder(tmp_path / "runs/one"), run_folder(tmp_path / "runs/$x^2$", shift=0.0)
    content = json.loads((other / "run.json").read_text())
    content["config"] = {"model": {"path": ATTACK}, "train": {"global_batch_size": 96}}
    (other / "run.json").write_text(json.dumps(content))
    assert write_report(one, other) == tmp_path / "runs/report.html"
    html = write_report(one, other, out=tmp_path / "both.html").read_text()
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert f"config.model.path some/model {ATTACK}" in page.words
    assert "config.train.global_batch_size 64 96" in page.words and "versions" not in page.words
    labels = re.findall(r'aria-label="([^"]+)"', html)
    for start in ("nDCG@10 by dim. base: ", "Loss: one from", "Held-out loss: one from", "Real tokens per second: one"):
        label = next(label for label in labels if label.startswith(start))
        assert "; $x^2$" in label
    for folder in (one, other):
        for e in json.loads((folder / "evaluation.json").read_text())["results"]:
            if (e["model"], e["metric"], e["set"], e["vectors"]) == ("tuned", "ndcg@10", "domain", "float32"):
                assert f"{e['value']:.3f} ({e['ci95'][0]:.3f} to {e['ci95'][1]:.3f})" in page.words
    assert "do not compare" not in page.words
    evaluation = json.loads((other / "evaluation.json").read_text())
    evaluation["sets"]["domain"]["fingerprint"] = "other"
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    assert "judged on different sets: their figures do not compare" in Page(write_report(one, other).read_text()).words
    (other / "evaluation.json").unlink()
    assert "evaluation.json is missing" in Page(write_report(one, other).read_text()).words


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium in PATH: apt-get install chromium")
def test_a_browser_shows_the_pages_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / ("b" * 200), text="A" * 300 + ATTACK)]
    pages = [write_report(runs[0]), write_report(runs[1]), write_report(*runs)]
    broken = tmp_path / "broken.html"
    broken.write_text("<script>missing()</script><img src='http://127.0.0.1:9/x'><p style='width: 2000px'>wide")
    with browser.tab() as tab:
        for width in (1280, 390):
            for page in pages:
                found = tab.show(page, width)
                assert (found["requests"], found["complaints"]) == ([], [])
                assert found["width"] <= width
            seen = tab.show(broken, width)
            assert seen["requests"] and seen["complaints"] and seen["width"] > width, "the check can fail"


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of run\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_the_table(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    words = Page(write_report(folder).read_text()).words
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    for entry in results:
        if entry["metric"] == "ndcg@10":
            assert f"{entry['value']:.3f}" in words
    for said in (
        "unknown",
        "2 empty",
        "with uncommitted changes",
        "processes 2, nodes 1",
        "2.00 GB",
        "pooling mean",
    ):
        assert said in words, said
