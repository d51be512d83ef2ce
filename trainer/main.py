"""One run from its config to its report: live checks, training, evaluation, bundle.

`train.py` calls `run` in every process that the launcher started. What can be checked without the other
processes is checked before the process group exists; a world or an engine that is not what was asked for
never trains.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config import RunConfig
from launch.errors import EXIT_DONE, EXIT_PREEMPTED, CheckFailed, Preempted, UserError
from launch.files import read_json, write_json
from launch.reader import resolved_yaml
from launch.world import World, engine_asked_for
from trainer.run_folder import held, mark, read_record, refuse_other_data

MODEL = "model"
BUNDLE = "bundle"
# Process groups that have ended. The DDP wrapper that an error's traceback holds would otherwise free its group while
# it holds the interpreter's lock, for which gloo's own thread may be waiting: the process would never end.
_groups: list[Any] = []


@dataclass(frozen=True)
class Run:
    """What every part of a run needs to know."""

    config: RunConfig
    run_dir: Path
    argv: list[str]
    world: World
    clock: "Clock"
    is_forced: bool
    remote: Any  # trainer.remote.Remote, on rank 0 of a run that has an address for its checkpoints

    def say(self, line: str) -> None:
        """Print on rank 0."""
        if self.world.rank == 0:
            print(line, flush=True)


@dataclass(frozen=True)
class Prepared:
    """A run's rows and model, loaded before the process group exists."""

    rows: Any
    facts: list[dict[str, Any]]
    held_out: Any  # rows of evaluate.sources where their loss is asked for
    sets: Any  # trainer.quality.Sets, None where nothing is evaluated
    model: Any
    data: Any  # trainer.exact_step.Tokenised, None where sentence-transformers' own code trains
    held_out_data: Any  # the same of the held-out pairs, None where their loss is not asked for


def run(config: RunConfig, run_dir: Path, argv: list[str], world: World, is_forced: bool = False) -> int:
    """Train, evaluate and export as `config` says; returns an exit code. Every process of the run must call.

    `is_forced`: a run with other settings or data that this folder holds unfinished goes on with these.
    Raises UserError for what the user can mend and CheckFailed where parity does not hold.
    """
    with held(run_dir, config, world, is_forced) as remote:
        this = Run(config, run_dir, argv, world, Clock(), is_forced, remote)
        import torch

        from trainer import watch
        from trainer.live_checks import check_backend, check_precision
        from trainer.model import quiet_libraries
        from trainer.preemption import Stop

        check_precision(config)
        check_backend()
        quiet_libraries()

        try:
            stop = Stop()
            try:
                with watch.watched():
                    prepared = _prepare(this)
                    tuned = _train(this, prepared, stop)
                    if tuned is not None and prepared.sets:
                        watch.at("evaluation", is_watched=False)
                        with this.clock.phase("evaluate"):
                            _evaluate(this, tuned, prepared.sets)
            finally:
                if torch.distributed.is_initialized():
                    _groups.append(torch.distributed.group.WORLD)
                    torch.distributed.destroy_process_group()
            if tuned is None:
                return EXIT_PREEMPTED
            if world.rank == 0:
                _finish(this, tuned)
        except Preempted as error:
            mark(run_dir, str(error))
            raise
    return EXIT_DONE


def _prepare(run: Run) -> Prepared:
    """Rows, model and token cache. Processes of one node that import or tokenise the same rows wait on a lock."""
    from transformers import set_seed

    from trainer.data import open_sources, refuse_gaps
    from trainer.exact_step import check_candidates, tokenise, tokenise_held_out
    from trainer.model import load_model
    from trainer.objective import check_arguments
    from trainer.quality import open_sets
    from trainer.trainable import choose_trained

    config, cache_dir = run.config, Path(run.config.data.cache_dir)
    exact = config.loss.is_exact
    if config.evaluate and config.evaluate.loss_every and not exact:
        raise UserError(
            f"evaluate.loss_every: got {config.evaluate.loss_every}, which only the exact step computes; "
            "allowed here: null"
        )
    if exact:
        check_arguments(config)
    with run.clock.phase("data"):
        rows, facts = open_sources(config.data.sources, cache_dir, config.data.max_rows)
        if not exact:
            only = f"{config.loss.name} in sentence-transformers' own code needs every column in every row"
            refuse_gaps(rows, facts, rows.column_names, only)
        sources = config.evaluate.sources if config.evaluate and config.evaluate.loss_every else None
        held_out, held_out_facts = open_sources(sources, cache_dir) if sources else (None, [])
        sets = open_sets(config)
        known = open_sources(config.data.known_positives, cache_dir) if config.data.known_positives else None
    all_facts = facts + [fact | {"name": f"{fact['name']} (known positives)"} for fact in (known[1] if known else ())]
    refuse_other_data(run.run_dir, all_facts, run.is_forced)
    if len(rows) < config.train.global_batch_size:
        raise UserError(
            f"data.sources: {len(rows):,} rows are fewer than one batch of {config.train.global_batch_size:,}; "
            f"allowed: train.global_batch_size up to {len(rows):,}"
        )
    if exact and config.train.global_batch_size == 1 and "negative" not in " ".join(rows.column_names):
        raise UserError(
            "train.global_batch_size: got 1 without negative columns, so there is nothing to tell a positive from; "
            "allowed: 2 or more"
        )
    set_seed(config.train.seed)
    with run.clock.phase("load"):
        model = load_model(config.model, "cpu")
    frozen = choose_trained(model, config.model, config.train.seed)
    data = held_out_data = None
    if exact:
        with run.clock.phase("tokenise"):
            data = tokenise(config, rows, facts, model, known)
            if held_out is not None:
                held_out_data = tokenise_held_out(config, held_out, held_out_facts, model)
        check_candidates(data, config.loss.mask_known_positives)
    if frozen:
        run.say(f"frozen: {', '.join(frozen)} (no embedding depends on them)")
    return Prepared(rows, all_facts, held_out, sets, model, data, held_out_data)


def _train(run: Run, prepared: Prepared, stop: Any) -> Any:
    """Train from the start or from the newest whole checkpoint. All ranks must call.

    Returns the tuned model, None where a rank was told to stop (`stop`, a trainer.preemption.Stop) and all is saved.
    """
    from trainer import checkpoint, watch
    from trainer.arguments import training_arguments
    from trainer.exact_step import ExactStep, at_the_limit
    from trainer.live_checks import check_engine, check_live, check_shared_folder
    from trainer.losses import build_loss
    from trainer.model import load_model
    from trainer.pickles import refuse_foreign_pickles
    from trainer.remote import newest_checkpoint
    from trainer.tensorboard import FOLDER
    from trainer.trainer import ContrastiveTrainer

    config, run_dir, model = run.config, run.run_dir, prepared.model
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run_dir / FOLDER))  # the Trainer's callback asks there
    args = training_arguments(config, run_dir, run.world)
    check_live(args, run.world, config, prepared.facts)

    def load_guide(path: str) -> Any:
        return load_model(config.model.model_copy(update={"path": path, "pooling": None}), str(args.device))

    loss = build_loss(config.loss, model, load_guide)
    resume = newest_checkpoint(run_dir, config.checkpoint.remote)
    record = _begin(run, prepared, checkpoint.step_of(resume) if resume else 0)
    for line in batch_arithmetic(run, prepared):
        run.say(line)
    if prepared.data and run.world.rank == 0 and (line := at_the_limit(prepared.data.cache, model)):
        run.say(line)
    if resume:
        run.say(f"resuming from {resume}")
    step = None
    if prepared.data:
        step = ExactStep(config, model, prepared.data, run.world, stop.asked, prepared.held_out_data)
    subset = prepared.sets.subset if prepared.sets else None
    trainer = ContrastiveTrainer(
        config, model, args, prepared.rows, loss, run_dir, step, subset, stop.asked, run.remote
    )
    check_engine(trainer.accelerator, config)
    if engine_asked_for() or not step:  # whose checkpoints have files of every rank
        check_shared_folder(run_dir, run.world)
    if resume:
        checkpoint.refuse_other_engine(resume, trainer.engine_name, run.world.world_size)
        refuse_foreign_pickles(resume)
    watch.begin(run.world, config.train.stall_seconds, config.train.grace_seconds)
    with run.clock.phase("train"), stop.deferred():
        is_stopped = trainer.train_or_stop(resume)
    if is_stopped:
        if run.world.rank == 0:
            step = trainer.state.global_step
            saved = (
                "the same command begins again" if not step else "which is saved; the same command goes on from there"
            )
            line = f"{stop} at step {step:,}, {saved}"
            mark(run_dir, line)
            print(f"nestling: {line}", file=sys.stderr, flush=True)
        return None
    stop.end_if_asked()
    return _keep(run, trainer, record)


def _keep(run: Run, trainer: Any, record: dict[str, Any]) -> Any:
    """Write the tuned model and return it. All ranks must call."""
    import torch

    from trainer import watch
    from trainer.model import load_model
    from trainer.run_record import now
    from trainer.weights import average

    config, run_dir = run.config, run.run_dir
    watch.at("saving the model", is_watched=False)
    tuned = trainer.tuned_model()
    if trainer.best_step is not None:
        record["best_step"] = trainer.best_step
        run.say(f"best checkpoint: step {trainer.best_step:,} of {trainer.state.global_step:,}")
    if share := config.export.average_with_base if config.export else 0.0:
        average(tuned, load_model(config.model, str(tuned.device)), share)
        run.say(f"weights: averaged with {share:.0%} of the base model's")
    if run.world.rank == 0:
        tuned.save_pretrained(str(run_dir / MODEL), create_model_card=False)
        record |= {"trained": now(), "steps": trainer.state.global_step, "seconds": run.clock.seconds}
        write_json(run_dir / "run.json", record)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return tuned


def _begin(run: Run, prepared: Prepared, step: int) -> dict[str, Any]:
    """Write the record of a run that starts at `step`; rank 0 only. A resumed run keeps its id."""
    if run.world.rank:
        return {}
    from trainer.metrics_log import rewind
    from trainer.model import describe
    from trainer.run_record import start_record

    record = start_record(run.config, run.argv, run.world, prepared.facts)
    shape = describe(prepared.model)
    if prepared.sets and prepared.sets.subset:
        record["subset"] = prepared.sets.subset_facts
        run.say(
            "evaluation during training: {queries:,} queries over {documents:,} documents, {queries_of_final_"
            "evaluation:,} of the queries are in the final evaluation too".format(**prepared.sets.subset_facts)
        )
    before = read_record(run.run_dir) or record
    record |= {"model": shape, "run_id": before["run_id"]}
    was, now = (one["versions"] | {"commit of nestling": one["git"]["commit"]} for one in (before, record))
    changed = [f"{name} {version} -> {now.get(name)}" for name, version in was.items() if version != now.get(name)]
    if step and changed:
        run.say(f"the run began with other versions, so bits may differ: {', '.join(changed)}")
    rewind(run.run_dir / "metrics.jsonl", step)
    record["folder"] = run.run_dir.name
    write_json(run.run_dir / "run.json", record)
    if run.remote:
        run.remote.write_record()
    (run.run_dir / "config.yaml").write_text(resolved_yaml(run.config), encoding="utf-8")
    size = f"{shape['parameters']:,} parameters ({shape['trained']:,} trained), {shape['width']} dims, "
    run.say(f"model: {run.config.model.path}, {size}{shape['pooling']} pooling")
    return record


def batch_arithmetic(run: Run, prepared: Prepared) -> list[str]:
    """The arithmetic of a run in words, printed before the first step."""
    from trainer.data import steps_of_run, text_columns

    train, exact = run.config.train, prepared.data is not None
    columns, rows = prepared.rows.column_names, len(prepared.rows)
    batch, processes = train.global_batch_size, run.world.world_size
    steps_per_epoch = prepared.data.order.steps_per_epoch if exact else rows // batch
    steps = steps_of_run(run.config, steps_per_epoch)
    texts = len(text_columns(columns))
    lines = [f"rows: {rows:,} with columns {', '.join(columns)}"]
    spread = f"global batch: {batch:,} rows over {processes} process(es)"
    if exact:
        most = "up to " if any(prepared.rows.data.column(c).null_count for c in columns) else ""
        lines.append(f"{spread}, {most}{batch * (texts - 1) - 1:,} negatives per anchor before masks")
        lines.append(f"step: exact, micro-batches of up to {train.micro_batch_tokens:,} tokens")
    else:
        lines.append(f"{spread}, {batch // processes:,} each")
        lines.append(f"step: sentence-transformers' own {run.config.loss.name}")
    left_out = prepared.data.order.rows_left_out if exact else rows % batch
    once = f"{left_out:,} rows of a pass over all rows do not fill a batch"
    lines.append(f"steps: {steps:,} ({steps_per_epoch:,} an epoch; {once})")
    if exact and len(prepared.data.order.batches) > 1:
        batches = zip(prepared.data.order.batches, prepared.facts, strict=False)
        lines.append(
            "batches of an epoch: " + ", ".join(f"{n:,} of {f['name']} ({f['rows']:,} rows)" for n, f in batches)
        )
    return lines


def _evaluate(run: Run, tuned: Any, sets: Any) -> None:
    """Judge base and tuned model on every set. All ranks must call."""
    from trainer.model import load_model
    from trainer.quality import evaluate_run

    for name, one in sets.final.items():
        what = "evaluation" if name == "domain" else f"evaluation of the set {name}"
        run.say(f"{what}: {len(one.queries):,} queries over {len(one.documents):,} documents")
    found = evaluate_run(run.config, sets, load_model(run.config.model, str(tuned.device)), tuned, run.world)
    if found:
        write_json(run.run_dir / "evaluation.json", found[0])
        write_json(run.run_dir / "evaluation_queries.json", found[1])


def _finish(run: Run, tuned: Any) -> None:
    """Bundle, verification and report; rank 0 only, after the process group is gone."""
    from trainer.figures import table
    from trainer.gates import require_gates
    from trainer.report import write_report
    from trainer.run_record import now
    from trainer.tensorboard import write_summary

    config, run_dir = run.config, run.run_dir
    record = read_record(run_dir)
    assert record is not None
    if config.export:
        from trainer.export.cli import export_run

        with run.clock.phase("export"):
            if _bundle_of(run_dir) == record["run_id"]:
                run.say(f"bundle: {run_dir / BUNDLE} was published before the run stopped")
            else:
                export_run(run_dir, run_dir / BUNDLE, config.export.opset, tuned)
        run.say(f"bundle: {run_dir / BUNDLE}, checked in a process that cannot import torch:")
        with run.clock.phase("verify"):
            verify = [sys.executable, "-m", "trainer.export.verify", str(run_dir / BUNDLE)]
            if subprocess.run(verify, check=False).returncode:
                raise CheckFailed(f"{run_dir / BUNDLE}: the bundle does not verify; see the lines above")
    record |= {"finished": now(), "seconds": run.clock.seconds}
    write_json(run_dir / "run.json", record)
    evaluation = read_json(run_dir / "evaluation.json") if config.evaluate else {}
    if "tensorboard" in config.train.report_to:
        write_summary(config, run_dir, evaluation)
    report = write_report(run_dir)
    if evaluation:
        run.say("\n" + table(evaluation) + "\n")
    run.say("seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in run.clock.seconds.items()))
    run.say(f"model:       {run_dir / MODEL}")
    if config.export:
        run.say(f"bundle:      {run_dir / BUNDLE}")
    run.say(f"report:      {report}")
    run.say(f"TensorBoard: tensorboard --logdir {run_dir}")
    require_gates(evaluation.get("gates", []))


def _bundle_of(run_dir: Path) -> str | None:
    """Id of the run whose bundle lies here already, None if none does."""
    try:
        return json.loads((run_dir / BUNDLE / "manifest.json").read_text(encoding="utf-8")).get("run_id")
    except (OSError, ValueError):
        return None


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
