"""ContrastiveTrainer: SentenceTransformerTrainer with nestling's data order, metrics and checkpoints.

What the Trainer does well (optimiser, scheduler, clipping, callbacks, resume bookkeeping) stays its own.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import nn

from launch.config import RunConfig
from launch.errors import UserError
from launch.world import World
from trainer import checkpoint
from trainer.losses import LossByDim
from trainer.metrics_log import StepLog


@dataclass
class RoleCollator(SentenceTransformerDataCollator):
    """Tells the model which role a column plays, so that queries get their own maximal length."""

    def _get_task_for_column(self, column_name: str, column_position: int, router_mapping: dict[str, str]) -> str:
        return router_mapping.get(column_name) or ("query" if column_name == "anchor" else "document")


def training_arguments(config: RunConfig, run_dir: Path, world: World) -> SentenceTransformerTrainingArguments:
    """The Trainer's arguments for this run. All ranks must call: creating them opens the process group.

    Raises UserError where the world size does not divide the global batch.
    """
    train = config.train
    if train.global_batch_size % world.world_size:
        raise UserError(
            f"train.global_batch_size: got {train.global_batch_size}, which {world.world_size} processes cannot share "
            f"equally; allowed: a multiple of {world.world_size}"
        )
    return SentenceTransformerTrainingArguments(
        output_dir=str(run_dir),
        # Without it two CPU processes train apart and write the same folder.
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=train.global_batch_size // world.world_size,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=train.warmup_steps,
        optim=train.optim,
        optim_args=",".join(f"{k}={v}" for k, v in train.optim_arguments.items()) or None,
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        adam_epsilon=train.adam_epsilon,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm or 0.0,  # None is a TypeError in the loop; 0 turns clipping off
        seed=train.seed,
        data_seed=train.seed,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        activation_checkpointing=train.gradient_checkpointing,
        gradient_accumulation_steps=1,
        dataloader_drop_last=True,
        dataloader_num_workers=train.loader_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        logging_strategy="steps",
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,  # it would hide a NaN behind the mean of earlier losses
        logging_dir=None,
        include_num_input_tokens_seen="no",
        report_to=list(train.report_to) or "none",
        save_strategy="steps" if config.checkpoint.every else "epoch",
        save_steps=config.checkpoint.every or 500,
        save_total_limit=None,  # its pruning counts half-written folders as checkpoints
        disable_tqdm=True,
        prompts=None,
    )


class ContrastiveTrainer(SentenceTransformerTrainer):
    """The trainer of a run. All ranks construct it and call `train` together."""

    def __init__(
        self,
        config: RunConfig,
        model: SentenceTransformer,
        args: SentenceTransformerTrainingArguments,
        rows: Any,
        loss: nn.Module,
        run_dir: Path,
    ) -> None:
        prompts = {c: model.prompts.get("query" if c == "anchor" else "document") for c in rows.column_names}
        args.prompts = {column: prompt for column, prompt in prompts.items() if prompt}
        self._run_dir = run_dir
        self._config = config
        self._writing_to: Path | None = None
        collator = RoleCollator(preprocess_fn=model.preprocess, prompts=args.prompts)
        self._loss_by_dim = LossByDim(loss)
        super().__init__(
            model=model, args=args, train_dataset=rows, loss=loss, data_collator=collator, callbacks=[StepLog(run_dir / "metrics.jsonl")]
        )
        self._drop_library_callbacks()
        self._tokens = torch.zeros(2, dtype=torch.int64, device=args.device)  # [real, padded] since the last log
        self._logged_at = time.monotonic()

    def _drop_library_callbacks(self) -> None:
        """The library's printer repeats StepLog, and its model card asks the hub; the bundle writes its own."""
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "SentenceTransformerModelCardCallback"):
                self.remove_callback(callback)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Loss of one global batch on this rank, gradients left on the parameters. All ranks must call."""
        for name, mask in inputs.items():
            if name.endswith("attention_mask"):
                self._tokens += torch.stack([mask.sum(), torch.tensor(mask.numel())]).to(self._tokens)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; nothing is saved over the last good "
                f"checkpoint in {self._run_dir}; lower train.learning_rate or train in fp32 or bf16"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add nestling's numbers to a training log. All ranks must call: token counts are summed over ranks."""
        if "loss" in logs:
            logs = {**logs, **self._step_metrics()}
        super().log(logs, start_time)

    def _step_metrics(self) -> dict[str, float]:
        if self.args.world_size > 1:
            dist.all_reduce(self._tokens)
        real, padded = self._tokens.tolist()
        now = time.monotonic()
        seconds, self._logged_at = now - self._logged_at, now
        self._tokens.zero_()
        metrics = {f"loss_{dim}": value.item() for dim, value in self._loss_by_dim.values.items()}
        metrics["real_tokens_per_s"] = real / seconds
        if real:
            metrics["padded_over_real"] = padded / real
        if torch.cuda.is_available():
            metrics["memory_bytes"] = float(torch.cuda.max_memory_allocated())
        else:
            metrics["memory_bytes"] = float(psutil.Process().memory_info().rss)
        return metrics

    # Checkpoints: the Trainer writes into a partial folder, rank 0 publishes it.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to or self._run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        final = checkpoint.folder_of(self._run_dir, step)
        partial = self._run_dir / "checkpoints" / f".partial-{step}"
        if final.exists():
            return
        if self.is_world_process_zero():
            checkpoint.partial_of(self._run_dir, step)
        self._barrier()
        self._writing_to = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_to = None
        self._barrier()
        if self.is_world_process_zero():
            written = partial / f"checkpoint-{step}"
            (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            checkpoint.publish(written, final, {"step": step})
            checkpoint.prune(self._run_dir, self._config.checkpoint.keep)
        self._barrier()

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


def text_of_batch(config: RunConfig, columns: Sequence[str], rows: int, world: World) -> list[str]:
    """The arithmetic of a run in words, printed before the first step."""
    train = config.train
    steps_per_epoch = rows // train.global_batch_size
    steps = train.max_steps or int(steps_per_epoch * train.epochs)
    candidates = train.global_batch_size * (len(columns) - 1)
    left_out = rows - steps_per_epoch * train.global_batch_size
    return [
        f"rows: {rows:,} with columns {', '.join(columns)}",
        f"global batch: {train.global_batch_size:,} rows over {world.world_size} process(es)"
        f" = {train.global_batch_size // world.world_size:,} rows each; "
        f"{candidates - 1:,} negatives per anchor" if len(columns) > 1 else f"global batch: {train.global_batch_size:,} rows",
        f"steps: {steps:,} ({steps_per_epoch:,} an epoch; the last {left_out:,} rows of an epoch do not fill a batch)",
    ]
