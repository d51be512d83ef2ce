"""Out of memory: found at start, recovered in the step, or by a restart: `python -m pytest tests/test_memory.py`."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.errors import UserError
from tests import tiny_models
from tests.distributed import run
from tests.limited_memory import limit
from tests.test_exact_step import _error, _prepare, _train
from tests.test_run import CPU2, ENVIRONMENT, PORT, ROOT, _curve, _finish, _run_file, _start

LIMIT = 40  # padded tokens


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT in it."""
    folder = tmp_path_factory.mktemp("memory")
    tiny_models.minilm(folder / "model")
    return folder


def _recovered(rank: int, size: int, folder: Path, phase: str, workers: int) -> dict[str, Any]:
    """Three steps whose last rank has memory for micro-batches of 40 tokens in one phase, against enough memory."""
    common = {"max_steps": 3, "rows": 64, "double": True, "model": {"dropout": 0.0}}
    truth = _train(folder, (rank, size), **common)
    made = _prepare(folder, (rank, size), **common, loader_workers=workers)
    if rank == size - 1:
        limit(phase, LIMIT)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        made.trainer.train()
    return {
        "error": max(_error(a, b) for a, b in zip(made.gradients, truth.gradients, strict=True)),
        "said": [line for line in out.getvalue().splitlines() if "memory" in line],
        "padded": [log["padded_over_real"] for log in made.logs],
    }


@pytest.mark.parametrize(
    ("phase", "size", "workers"), [("embed", 1, 0), ("embed", 2, 0), ("replay", 2, 0), ("replay", 2, 1)]
)
def test_a_step_out_of_memory_is_done_again_with_smaller_micro_batches_on_all_ranks(
    bert: Path, phase: str, size: int, workers: int
) -> None:
    for rank, seen in enumerate(run(_recovered, size, size, bert, phase, workers)):
        assert seen["error"] < 1e-12
        assert len(seen["said"]) == (0 if rank else 2), seen["said"]
        for line in seen["said"]:
            assert line.startswith("step 1: out of memory with micro-batches of "), "every later step fits"


def _found(rank: int, size: int, folder: Path, limits: list[int]) -> tuple[int, str]:
    made = _prepare(folder, (rank, size))
    exact: Any = made.trainer._exact

    def refuse(_: Any, inputs: Any) -> None:
        if inputs[0]["input_ids"].numel() > limits[rank]:
            raise torch.OutOfMemoryError("as CUDA says it")

    made.trainer.model.register_forward_pre_hook(refuse)
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exact.find_budget(torch.device("cpu"))
        except UserError as error:
            return 0, str(error)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in made.trainer.model.parameters())
    return exact.steps.micro_batch_tokens, out.getvalue()


@pytest.mark.parametrize("size", [1, 2])
def test_the_budget_is_what_the_longest_texts_of_all_ranks_fit_in(bert: Path, size: int) -> None:
    for rank, (tokens, said) in enumerate(run(_found, size, size, bert, [96, 50][-size:])):
        assert tokens == 48 if size == 2 else 96 // 2, "the longest text has 23 tokens: 92 at 96, 46 at 48"
        assert said == ("" if rank else "micro-batches: 96 tokens do not fit, 48 do\n")
    for tokens, said in run(_found, size, size, bert, [96, 10][-size:]):
        assert tokens == 0 and said.startswith("memory: out of it with micro-batches of one text of")


ENGINES = ROOT / "configs/accelerate"


def _limited(engine: str, phase: str) -> str:
    launcher = CPU2 if engine == "ddp" else f"--config_file {ENGINES}/{engine}.yaml --num_processes 2"
    return f"{launcher} -m tests.limited_memory {phase} 20"


PLAIN = ("model.dropout=0.0", "train.optim=sgd", "train.learning_rate=1e-2", "train.micro_batch_tokens=32")


def _same_curve(folder: Path, run_file: Path) -> None:
    """The curve of the run that had little memory is the one of a run that had enough."""
    code, out, err = _finish(_start(str(run_file), f"train.run_dir={folder}/enough", *PLAIN, launcher=CPU2))
    assert code == 0, out + err
    for ours, theirs in zip(_curve(folder / "run"), _curve(folder / "enough"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_zero_recovers_in_the_first_pass(tmp_path: Path, engine: str) -> None:
    run_file = _run_file(tmp_path)
    code, out, err = _finish(_start(str(run_file), *PLAIN, launcher=_limited(engine, "embed")))
    assert code == 0 and "step 1: out of memory with micro-batches of" in out, out + err
    _same_curve(tmp_path, run_file)


SUPERVISED = [("ddp", "last"), ("fsdp2", "embed"), ("fsdp2", "replay"), ("zero2", "replay"), ("zero3", "embed")]


@pytest.mark.parametrize(
    ("engine", "phase"), [pytest.param(*c, marks=[] if c[0] == "ddp" else pytest.mark.slow) for c in SUPERVISED]
)
def test_elsewhere_the_run_is_started_again_with_half_the_micro_batches(
    tmp_path: Path, engine: str, phase: str
) -> None:
    run_file = _run_file(tmp_path)
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch", *PORT, *_limited(engine, phase).split()]
    command = [sys.executable, "-m", "launch.cli", "supervise", *accelerate, "train.py", str(run_file), *PLAIN]
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("nestling: ")]
    assert lines, ended.stdout + ended.stderr
    for line in lines:
        assert "rank 1 is out of memory where the others wait for it; start again" in line
    assert "nestling supervise: out of memory; going on with train.micro_batch_tokens=" in ended.stderr
    _same_curve(tmp_path, run_file)
