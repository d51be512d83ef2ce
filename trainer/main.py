"""One run from its config to its report: live checks, training, evaluation, bundle.

`train.py` calls `run` in every process that the launcher started. What can be checked without the other
processes is checked before the process group exists; a world or an engine that is not what was asked for
never trains.
"""

import fcntl
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.config import RunConfig
from launch.errors import EXIT_DONE, CheckFailed, UserError
from launch.files import write_json
from launch.reader import resolved_yaml, run_directory
from launch.world import World, check_world

MODEL = "model"
BUNDLE = "bundle"


def run(config: RunConfig, run_file: Path, argv: list[str], world: World) -> int:
    """Train, evaluate and export as `config` says; returns an exit code. Every process of the run must call.

    Raises UserError for what the user can mend and CheckFailed where parity does not hold.
    """
    check_world(config, world)
    run_dir = run_directory(config, run_file)
    with _held(run_dir, config, world):
        quiet_libraries()
        return _run(config, run_dir, argv, world)


def _run(config: RunConfig, run_dir: Path, argv: list[str], world: World) -> int:
    import torch

    from trainer.data import open_sources

    clock = Clock()
    say = print if world.rank == 0 else _silent
    cache_dir = Path(config.data.cache_dir)
    with clock.phase("data"):
        rows, facts = open_sources(config.data.sources, cache_dir, config.data.max_rows)
        held_out = open_sources(config.evaluate.sources, cache_dir)[0] if config.evaluate else None
    if len(rows) < config.train.global_batch_size:
        raise UserError(
            f"data.sources: {len(rows):,} rows are fewer than one batch of {config.train.global_batch_size:,}; "
            f"allowed: train.global_batch_size up to {len(rows):,}"
        )
    try:
        tuned = _train(config, run_dir, world, rows, facts, argv, clock, say)
        if held_out is not None:
            with clock.phase("evaluate"):
                _evaluate(config, run_dir, world, tuned, held_out, say)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if world.rank == 0:
        _finish(config, run_dir, tuned, clock, say)
    return EXIT_DONE


def _train(
    config: RunConfig,
    run_dir: Path,
    world: World,
    rows: Any,
    facts: list[dict[str, Any]],
    argv: list[str],
    clock: "Clock",
    say: Any,
) -> Any:
    """Train from the start or from the newest whole checkpoint; returns the tuned model. All ranks must call."""
    import torch
    from transformers import set_seed

    from trainer import checkpoint
    from trainer.arguments import is_exact, training_arguments
    from trainer.exact_step import ExactStep, check_arguments, tokenise
    from trainer.losses import build_loss
    from trainer.model import describe, freeze_unused, load_model
    from trainer.run_record import now, start_record
    from trainer.trainer import ContrastiveTrainer

    exact = is_exact(config)
    if exact:
        check_arguments(config)
    set_seed(config.train.seed)
    with clock.phase("load"):
        model = load_model(config.model, "cpu")
    frozen = freeze_unused(model)
    data = None
    if exact:
        with clock.phase("tokenise"):
            data = tokenise(config, rows, facts, model)
    check_precision(config)
    args = training_arguments(config, run_dir, world)
    check_live(args, world)

    def load_guide(path: str) -> Any:
        return load_model(config.model.model_copy(update={"path": path, "pooling": None}), str(args.device))

    loss = build_loss(config.loss, model, load_guide)
    shape = describe(model)
    resume = checkpoint.find_latest(run_dir, logging.getLogger("nestling").warning)
    record: dict[str, Any] = {}
    if world.rank == 0:
        record = start_record(config, argv, world, facts)
        record["model"] = shape
        write_json(run_dir / "run.json", record)
        (run_dir / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    width = f"{shape['width']} dims, {shape['pooling']} pooling"
    say(f"model: {config.model.path}, {shape['parameters']:,} parameters, {width}")
    if frozen:
        say(f"frozen: {', '.join(frozen)} (no embedding depends on them)")
    for line in batch_arithmetic(config, rows.column_names, [f["rows"] for f in facts], world, exact):
        say(line)
    if resume:
        say(f"resuming from {resume}")
    step = ExactStep(config, model, data, world, bool) if data else None
    trainer = ContrastiveTrainer(config, model, args, rows, loss, run_dir, step)
    with clock.phase("train"):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if world.rank == 0:
        model.save_pretrained(str(run_dir / MODEL), create_model_card=False)
        record |= {"trained": now(), "steps": trainer.state.global_step, "seconds": clock.seconds}
        write_json(run_dir / "run.json", record)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # Takes off the autocast that accelerate put around forward: evaluation and export are fp32.
    return trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


def batch_arithmetic(
    config: RunConfig, columns: list[str], sizes: list[int], world: World, exact: bool
) -> list[str]:
    """The arithmetic of a run in words, printed before the first step."""
    batch, rows = config.train.global_batch_size, sum(sizes)
    steps_per_epoch = sum(size // batch for size in sizes) if exact else rows // batch
    steps = config.train.max_steps or math.ceil(steps_per_epoch * config.train.epochs)
    texts = len([c for c in columns if c not in ("score", "label")])
    lines = [f"rows: {rows:,} with columns {', '.join(columns)}"]
    spread = f"global batch: {batch:,} rows over {world.world_size} process(es)"
    if exact:
        lines.append(f"{spread}, {batch * (texts - 1) - 1:,} negatives per anchor before masks")
        lines.append(f"step: exact, micro-batches of up to {config.train.micro_batch_tokens:,} tokens")
    else:
        lines.append(f"{spread}, {batch // world.world_size:,} each")
        lines.append(f"step: sentence-transformers' own {config.loss.name}")
    left_out = rows - steps_per_epoch * batch
    lines.append(
        f"steps: {steps:,} ({steps_per_epoch:,} an epoch; {left_out:,} rows of an epoch do not fill a batch)"
    )
    return lines


def _evaluate(config: RunConfig, run_dir: Path, world: World, tuned: Any, rows: Any, say: Any) -> None:
    """Embed the held-out set with base and tuned model, compare at every dim. All ranks must call."""
    from trainer.embed import embed
    from trainer.evaluation import evaluate, retrieval_set
    from trainer.model import load_model, max_length_of, prompt_of

    assert config.evaluate is not None
    settings = config.evaluate
    questions = retrieval_set(rows, settings.max_queries, settings.max_documents, config.train.seed)
    say(f"evaluation: {len(questions.queries):,} queries over {len(questions.documents):,} documents")
    vectors = {}
    for name in ("base", "tuned"):
        model = tuned if name == "tuned" else load_model(config.model, str(tuned.device))
        vectors[name] = tuple(
            embed(
                model,
                texts,
                role,
                prompt=prompt_of(model, role),
                max_length=max_length_of(model, role),
                batch_tokens=settings.batch_tokens,
                world=world,
            )
            for role, texts in (("query", questions.queries), ("document", questions.documents))
        )
    if world.rank == 0:
        dims = config.loss.dims or [tuned.get_embedding_dimension()]
        evaluation, by_query = evaluate(questions, vectors, dims, seed=config.train.seed)
        write_json(run_dir / "evaluation.json", evaluation)
        write_json(run_dir / "evaluation_queries.json", by_query)


def _finish(config: RunConfig, run_dir: Path, tuned: Any, clock: "Clock", say: Any) -> None:
    """Bundle, verification and report; rank 0 only, after the process group is gone."""
    from trainer.evaluation import table
    from trainer.report import write_report
    from trainer.run_record import now

    record = json.loads((run_dir / "run.json").read_text())
    if config.export:
        from trainer.export.cli import export_run

        with clock.phase("export"):
            export_run(run_dir, run_dir / BUNDLE, config.export.opset, tuned)
        with clock.phase("verify"):
            verify = [sys.executable, "-m", "trainer.export.verify", str(run_dir / BUNDLE)]
            if subprocess.run(verify, check=False).returncode:
                raise CheckFailed(f"{run_dir / BUNDLE}: the bundle does not verify; see the lines above")
    record |= {"finished": now(), "seconds": clock.seconds}
    write_json(run_dir / "run.json", record)
    report = write_report(run_dir)
    say("")
    if config.evaluate:
        say(table(json.loads((run_dir / "evaluation.json").read_text())))
        say("")
    say("seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in clock.seconds.items()))
    say(f"model:       {run_dir / MODEL}")
    if config.export:
        say(f"bundle:      {run_dir / BUNDLE}")
    say(f"report:      {report}")
    say(f"TensorBoard: tensorboard --logdir {run_dir}")


def check_live(args: Any, world: World) -> None:
    """Refuse a world or an engine that the libraries silently replaced. All ranks must call.

    accelerate starts independent processes, or plain DDP for FSDP, without an error in cases that a CPU or a
    missing flag brings about; each of them trains something that was not asked for.
    """
    import torch

    got = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if got != world.world_size:
        raise UserError(
            f"world size: the launcher started {world.world_size} processes, but they formed a group of {got}; "
            "start with accelerate launch --config_file configs/accelerate/cpu.yaml (CPU) or ddp.yaml (GPU)"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"devices: one process sees {args.n_gpu} GPUs and would train DataParallel, which is another loss; "
            "start one process per GPU: accelerate launch --config_file configs/accelerate/ddp.yaml train.py RUN.yaml"
        )
    for variable, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UserError(
                f"engine: got {engine}, allowed: one process or DDP; "
                "start with accelerate launch --config_file configs/accelerate/ddp.yaml train.py RUN.yaml"
            )


def check_precision(config: RunConfig) -> None:
    """Raise UserError where the launcher asks for another precision than the run file. Before the arguments exist."""
    asked = {"no": "fp32"}.get(word := os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), word)
    if asked not in ("fp32", config.train.precision):
        raise UserError(
            f"precision: the launcher asks for {asked}, the run file for {config.train.precision}; "
            f"set train.precision={asked} or launch with --mixed_precision no"
        )


class Clock:
    """Seconds by phase of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


@contextmanager
def _held(run_dir: Path, config: RunConfig, world: World) -> Iterator[None]:
    """Lock the run folder for this run on rank 0; raises UserError where it belongs to another run.

    A folder that this run made and left without anything in it is removed again.
    """
    if world.rank:
        yield
        return
    fresh = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"train.run_dir: cannot write to {run_dir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"train.run_dir: {run_dir} is in use by a run that is going on; choose another: train.run_dir=FOLDER"
            ) from None
        if not fresh:
            _refuse_another_run(run_dir, config)
        try:
            yield
        finally:
            if fresh and [p.name for p in run_dir.iterdir()] == [".lock"]:
                (run_dir / ".lock").unlink()
                run_dir.rmdir()


def _refuse_another_run(run_dir: Path, config: RunConfig) -> None:
    try:
        record = json.loads((run_dir / "run.json").read_text())
    except FileNotFoundError:
        others = [p.name for p in run_dir.iterdir() if p.name != ".lock"]
        if others:
            raise UserError(
                f"train.run_dir: {run_dir} holds files of something else ({', '.join(sorted(others)[:3])}); "
                "choose another: train.run_dir=FOLDER"
            ) from None
        return
    except ValueError:
        raise UserError(
            f"train.run_dir: {run_dir}/run.json is broken; choose another: train.run_dir=FOLDER"
        ) from None
    if record.get("finished"):
        raise UserError(
            f"train.run_dir: {run_dir} holds a run that finished at {record['finished']}; "
            "choose another: train.run_dir=FOLDER, or remove it"
        )
    was, now = _flat(record.get("config", {})), _flat(config.model_dump(mode="json"))
    differing = sorted(
        k
        for k in {*was, *now}
        if was.get(k) != now.get(k) and k.startswith(("model", "data", "loss", "train"))
    )
    differing = [
        k
        for k in differing
        if k not in ("train.run_dir", "train.logging_steps", "train.report_to", "train.loader_workers")
    ]
    if differing:
        raise UserError(
            f"train.run_dir: {run_dir} holds an unfinished run with other settings ({', '.join(differing[:5])}); "
            "choose another: train.run_dir=FOLDER"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {
            k: v
            for name, sub in tree.items()
            for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: tree}


def quiet_libraries() -> None:
    """Keep the libraries' hints and bars out of the log; nestling prints its own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="nestling: %(message)s")


def _silent(*_: object) -> None:
    """What ranks other than 0 print."""
