"""What a checkpoint costs a run: how long training stands still, what agreeing on a stop takes, how soon it goes on.

python -m benchmarks.checkpoint [--quick] [--json FILE]

Stand-still: a BERT of 108 million parameters with Adam's two moments, in fp32 (1.3 GB), saved by transformers' own
Trainer and by ours at the same places, each in a fresh process; seconds in the call that the training loop makes,
without the first, after which memory and files are warm. Ours leaves the rest to a thread, which is waited for before
the next: checkpoints are farther apart than that. Agreement: the two reductions a step that carry the flag to stop,
between two gloo processes, over a step of 32 rows of 64 tokens in all-MiniLM. Going on: seconds from the call of
`train` with a checkpoint to the first step, at step 1,000,000 of an epoch of 4,000,000 and at step 10, tiny model, the
least of five fresh processes each.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import RIVAL, Claim, finish, in_fresh_process, one_thread, options, table, timed
from benchmarks.sides import made_texts, minilm, our_step, tiny_model, tokenised

FAR = 1_000_000
ROWS = 64


def _config(folder: Path, **train: Any) -> Any:
    from launch.config import RunConfig

    settings = {"global_batch_size": 4, "optim": "adamw_torch", "report_to": [], "run_dir": str(folder / "run")}
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "data": {"sources": [{"path": "made"}], "cache_dir": str(folder / "cache")},
            "train": settings | train,
        }
    )


def _rows() -> Any:
    from datasets import Dataset

    texts = made_texts(2 * ROWS, 16)
    return Dataset.from_dict({"anchor": texts[:ROWS], "positive": texts[ROWS:]})


def _trainer(folder: Path, model: Any, config: Any, steps_per_epoch: int | None = None) -> Any:
    """Ours, as trainer/main.py makes it, of an epoch that may be longer than its rows."""
    from launch.world import World
    from trainer.arguments import training_arguments
    from trainer.exact_step import ExactStep, Tokenised, tokenise
    from trainer.losses import build_loss
    from trainer.sampler import DataOrder
    from trainer.trainer import ContrastiveTrainer

    class Repeated(DataOrder):
        """Rows of a large data set, of which there are few."""

        def rows_of_step(self, epoch: int, step: int) -> np.ndarray:
            return super().rows_of_step(epoch, step) % ROWS

    world, rows, run_dir = World(0, 0, 1, 1, 1), _rows(), folder / "run"
    run_dir.mkdir(exist_ok=True)
    data = tokenise(config, rows, [{"name": "made", "fingerprint": "made", "rows": ROWS}], model)
    batch = config.train.global_batch_size
    if steps_per_epoch:
        data = Tokenised(data.cache, Repeated(config.train.seed, batch, (steps_per_epoch * batch,)))
    step = ExactStep(config, model, data, world, bool)
    arguments = training_arguments(config, run_dir, world)
    return ContrastiveTrainer(config, model, arguments, rows, build_loss(config.loss, model), run_dir, step)


def stall(side: str, width: int, layers: int, saves: int) -> tuple[list[float], list[float], int]:
    """Seconds of each save in the training loop, and until its files are there; bytes of a checkpoint."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model", width, layers, 16, heads=width // 64, vocabulary_size=30_000)
        config = _config(folder, max_steps=saves)
        if side == "ours":
            trainer: Any = _trainer(folder, model, config)
        else:
            arguments = SentenceTransformerTrainingArguments(
                str(folder / "run"),
                per_device_train_batch_size=4,
                max_steps=saves,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            )
            loss = MultipleNegativesRankingLoss(model)
            trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=_rows(), loss=loss)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
        trainer.args.logging_strategy = "no"
        write, stands, whole = trainer._save_checkpoint, [], []

        def watched(*arguments: Any) -> None:
            if side == "ours":
                trainer._writer.wait()
            start = time.perf_counter()
            write(*arguments)
            stands.append(time.perf_counter() - start)
            if side == "ours":
                trainer._writer.wait()
                assert not trainer._writer.problem, trainer._writer.problem
            whole.append(time.perf_counter() - start)

        trainer._save_checkpoint = watched
        trainer.train()
        newest = max((folder / "run").rglob("optimizer.pt"), key=lambda path: path.stat().st_mtime).parent
        return stands[1:], whole[1:], sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def agreement(place: tuple[int, int], times: int) -> float:
    """Seconds of what a step's two agreements take, in process `place` of a group."""
    import torch

    from trainer import collectives

    device = torch.device("cpu")
    for _ in range(50):
        collectives.highest(0, device)
    start = time.perf_counter()
    for _ in range(2 * times):
        collectives.highest(0, device)
    return (time.perf_counter() - start) / times


def step_seconds() -> float:
    """Wall seconds of a whole step of 32 rows of 64 tokens."""
    model = minilm(64)
    texts = made_texts(64, 200)
    rows = list(zip(texts[:32], texts[32:], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        cache = tokenised("agreement", rows, model, Path(folder))
        return min(timed(lambda: our_step(model, cache, np.arange(32), [384], True))[1].wall for _ in range(3))


def going_on(steps: int) -> float:
    """Seconds from `train` to the first step, from a checkpoint at `steps`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model", 64, 1, 16)
        trainer = _trainer(folder, model, _config(folder, max_steps=10), 4 * FAR)
        trainer.train()
        trainer._writer.wait()
        made = folder / "run" / "checkpoints" / "step-10"
        state = json.loads((made / "trainer_state.json").read_text())
        (made / "trainer_state.json").write_text(json.dumps(state | {"global_step": steps}))
        made = made.rename(made.with_name(f"step-{steps}"))
        trainer = _trainer(folder, tiny_model(folder / "model", 64, 1, 16), _config(folder, epochs=1.0), 4 * FAR)

        class Reached(Exception):
            pass

        def first(*_: Any, **__: Any) -> None:
            assert trainer.state.global_step == steps
            raise Reached

        trainer.training_step = first
        start = time.perf_counter()
        try:
            trainer.train_or_stop(made)
        except Reached:
            return time.perf_counter() - start
    raise AssertionError("no step")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    from tests.distributed import run

    args = options(__doc__).parse_args(argv)
    one_thread()
    width, layers, saves = (256, 4, 3) if args.quick else (768, 12, 6)
    found = {side: in_fresh_process(stall, side, width, layers, saves) for side in ("rival", "ours")}
    table(
        ["side", "stands still s", "until written s", "checkpoint MB"],
        [[side, median(s), median(w), f"{size / 1e6:,.0f}"] for side, (s, w, size) in found.items()],
    )
    agreed = max(run(agreement, 2, 200 if args.quick else 2000))
    step = in_fresh_process(step_seconds)
    # By turns, so that another load on the machine does not meet one of them alone; a process a time is slow to start.
    turns = [{n: in_fresh_process(going_on, n) for n in (10, FAR)} for _ in range(5)]
    resumed = {n: min(turn[n] for turn in turns) for n in (10, FAR)}
    print(
        f"\nagreement {agreed * 1e3:.3f} ms of a step of {step:.2f} s; going on at step 10 {resumed[10]:.2f} s, ",
        end="",
    )
    print(f"at step {FAR:,} {resumed[FAR]:.2f} s")
    (theirs, _, size), (ours, written, _) = found["rival"], found["ours"]
    claims = [
        Claim(
            "checkpoint.stall_ratio",
            median(ours) / median(theirs),
            "times",
            "lower",
            RIVAL,
            f"seconds that training stands still a save, BERT of width {width} and {layers} layers with Adam, "
            f"{size / 1e6:,.0f} MB, one thread, median of {len(ours)} saves after the first; until it is published "
            f"{median(written):.2f} s for ours with fsync and hashes, {median(theirs):.2f} s for the rival without",
        ),
        Claim(
            "checkpoint.agreement_share",
            agreed / step,
            "of a step",
            "lower",
            "the same step without it",
            "two reductions of 4 bytes between two gloo processes, over 32 rows of 2 texts of 64 tokens, all-MiniLM",
        ),
        Claim(
            "checkpoint.resume_ratio",
            resumed[FAR] / resumed[10],
            "times",
            "lower",
            "the same at step 10",
            f"seconds from the call of train to the first step, checkpoint at step {FAR:,}, least of 5 processes each",
        ),
    ]
    return finish(claims, args)


if __name__ == "__main__":
    sys.exit(main())
