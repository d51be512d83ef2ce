"""ContrastiveTrainer: SentenceTransformerTrainer with nestling's step, metrics and checkpoints.

What the Trainer does well (optimiser, scheduler, clipping, callbacks, resume bookkeeping) stays its own. The exact step
replaces two of its methods, `get_train_dataloader` and `training_step`; any other loss runs through them unchanged.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate.utils import save_fsdp_optimizer
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import SCHEDULER_NAME

from launch.config import RunConfig
from launch.errors import UserError
from launch.files import remove_folder
from launch.world import engine_asked_for
from trainer import checkpoint, collectives, watch
from trainer.exact_step import ExactStep
from trainer.gradcache import StepAbandoned
from trainer.loader import step_loader
from trainer.losses import LossByDim
from trainer.memory import MemoryRanOut
from trainer.metrics_log import StepLog
from trainer.model import load_model, prompt_of
from trainer.tokens import role_of
from trainer.trainable import merged, read_adapters, save_adapters
from trainer.weights import is_sharded, load_whole, name_layers, spread, whole_weights


@dataclass
class RoleCollator(SentenceTransformerDataCollator):
    """Tells the model which role a column plays, so that queries get their own maximal length."""

    def _get_task_for_column(self, column_name: str, column_position: int, router_mapping: dict[str, str]) -> str:
        return router_mapping.get(column_name) or role_of(column_name)


class HeldOutLoss(TrainerCallback):
    """Looks at the held-out loss every so many steps, and has that step logged. All ranks."""

    def __init__(self, exact: ExactStep, every: int) -> None:
        self._exact, self._every = exact, every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every == 0:
            self._exact.measure_held_out()
            control.should_log = True


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
        exact: ExactStep | None,
    ) -> None:
        """`exact` computes the step; None leaves it to `loss` in sentence-transformers' own code."""
        prompts = {column: prompt_of(model, role_of(column)) for column in rows.column_names}
        args.prompts = {column: prompt for column, prompt in prompts.items() if prompt}
        self._config, self._run_dir, self._exact = config, run_dir, exact
        self._writing_to: Path | None = None
        self._loss_by_dim = LossByDim(loss)
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            loss=loss,
            data_collator=RoleCollator(preprocess_fn=model.preprocess, prompts=args.prompts),
            callbacks=[StepLog(run_dir / "metrics.jsonl")],
        )
        self.remove_callback(PrinterCallback)  # it repeats StepLog
        self._plain: SentenceTransformer | None = None
        if engine_asked_for() and self.is_world_process_zero():
            self._plain = copy.deepcopy(model)  # the engine takes `model` apart; whole weights are saved from here
        if self.is_fsdp_enabled:
            name_layers(self.accelerator.state.fsdp_plugin, model)
        if exact is not None and config.evaluate and config.evaluate.loss_every:
            self.add_callback(HeldOutLoss(exact, config.evaluate.loss_every))
        self._tokens = torch.zeros(2, dtype=torch.int64, device=args.device)  # [real, padded] since the last log
        self._logged_at = time.monotonic()

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the library's model card reads data and asks the hub; the bundle writes its own."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of an epoch; not prepared by accelerate for the exact step, which would shard it again."""
        if self._exact is None:
            return super().get_train_dataloader()
        return step_loader(self._exact.steps, self.args.dataloader_num_workers)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The next batch, which a loader worker may be making."""
        watch.at("data", self.state.global_step + 1)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Loss of one global batch on this rank, gradients left on the parameters. All ranks must call.

        Raises UserError, on all ranks alike, where the loss is not finite, and StepAbandoned where a stop is asked.
        """
        watch.at("step", self.state.global_step + 1)
        if self._exact is not None:
            model.train()
            try:
                return self._exact.run(model, inputs["batch"], self.accelerator.backward)
            except StepAbandoned as error:
                if error.reason == "stop asked":
                    raise
                raise self._exact.explain(error, inputs["batch"], self._run_dir) from error
            except MemoryRanOut as error:
                raise error.marked(self._run_dir) from error
        for name, mask in inputs.items():
            if name.endswith("attention_mask"):
                self._tokens += torch.stack([mask.sum(), torch.tensor(mask.numel(), device=mask.device)]).to(
                    self._tokens
                )
            elif name.endswith("cu_seq_lens_q"):  # packed without padding
                self._tokens += mask[-1]
        loss = super().training_step(model, inputs, num_items_in_batch)
        watch.at("optimiser")
        if collectives.highest(int(not loss.isfinite()), loss.device):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is not finite; nothing is saved over the last good "
                f"checkpoint in {self._run_dir}; lower train.learning_rate, or train in fp32 or bf16"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add nestling's numbers to a training log. All ranks must call: some are summed over ranks."""
        if "loss" in logs:
            logs = {**logs, **(self._library_metrics() if self._exact is None else self._exact.metrics())}
            logs["memory_bytes"] = (
                float(torch.cuda.max_memory_allocated())
                if torch.cuda.is_available()
                else float(psutil.Process().memory_info().rss)
            )
        super().log(logs, start_time)

    def _library_metrics(self) -> dict[str, float]:
        if self.args.world_size > 1:
            dist.all_reduce(self._tokens)
        real, padded = self._tokens.tolist()
        self._tokens.zero_()
        now = time.monotonic()
        seconds, self._logged_at = now - self._logged_at, now
        by_dim = self._loss_by_dim.values
        values = torch.stack(list(by_dim.values())).to(self.args.device) if by_dim else torch.zeros(0)
        if by_dim and self.args.world_size > 1:
            dist.all_reduce(values)
            values /= self.args.world_size
        metrics = {f"loss_{dim}": value for dim, value in zip(by_dim, values.tolist(), strict=True)}
        return metrics | {"real_tokens_per_s": real / seconds, "padded_over_real": padded / max(1, real)}

    @property
    def engine_name(self) -> str:
        """fsdp2, zero1, zero2, zero3, or ddp, which one process is too: a checkpoint's optimiser state is of one."""
        if self.is_fsdp_enabled:
            return "fsdp2"
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"  # pyright: ignore[reportOptionalMemberAccess]
        return "ddp"

    def tuned_model(self) -> SentenceTransformer:
        """The model after training, whole and in fp32 on every rank, without the engine. All ranks must call."""
        if not is_sharded(self.model_wrapped):
            # Takes off the autocast that accelerate put around forward.
            tuned: Any = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
            return merged(tuned)
        whole = self._whole_model()
        unset_hf_deepspeed_config()  # under ZeRO-3 every model that is loaded would be taken apart
        plain = merged(whole) if whole is not None else load_model(self._config.model, "cpu")
        spread(plain)
        return plain.to(self.args.device)

    def _whole_model(self) -> SentenceTransformer | None:
        """The model as it is now, with its adapters; on rank 0, elsewhere None. All ranks must call."""
        if not is_sharded(self.model_wrapped):
            return self.model if self.is_world_process_zero() else None  # pyright: ignore[reportReturnType]
        weights = whole_weights(self.model_wrapped)
        if self._plain is not None:
            self._plain.load_state_dict(self._plain.state_dict() | weights)  # what is left out never changes
        return self._plain

    # Weights are saved whole, so that any engine reads what any other wrote; optimiser states as the engine has them.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as sentence-transformers does, adapters merged and beside it. All ranks must call."""
        if (whole := self._whole_model()) is not None:
            merged(whole).save_pretrained(str(output_dir), create_model_card=False)
            save_adapters(whole, Path(str(output_dir)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model
        save_fsdp_optimizer(*state, output_dir)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        has_adapters = self._config.model.lora is not None
        if not self.is_fsdp_enabled and not has_adapters:
            return super()._load_from_checkpoint(checkpoint_path)
        if has_adapters:  # what they stand beside is frozen
            weights = read_adapters(Path(checkpoint_path))
        else:
            changed = {"path": checkpoint_path, "revision": None, "pooling": None}
            weights = load_model(self._config.model.model_copy(update=changed), "cpu").state_dict()
        if self.is_fsdp_enabled:
            return load_whole(self.model_wrapped, weights)
        self.model.load_state_dict(self.model.state_dict() | weights)
        return None

    # Checkpoints: the Trainer writes into a partial folder, rank 0 publishes it.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to or self._run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        watch.at("checkpoint", is_watched=False)
        step = self.state.global_step
        final = checkpoint.folder_of(self._run_dir, step)
        if final.exists():
            return
        self._barrier()
        if self.is_world_process_zero():
            checkpoint.partial_of(self._run_dir, step)
        self._barrier()
        self._writing_to = checkpoint.partial_name(self._run_dir, step)
        written = self._writing_to / f"checkpoint-{step}"
        try:
            super()._save_checkpoint(model, trial)
            self._barrier()
            if self.is_world_process_zero():
                (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                checkpoint.publish(written, final, {"step": step, "engine": self.engine_name})
        except Exception as error:
            remove_folder(self._writing_to)
            # A full disk comes as an OSError from Python, and as a text from safetensors and torch.
            if isinstance(error, OSError) or "os error" in str(error) or "file write failed" in str(error):
                reason = str(error).splitlines()[0]
                raise UserError(f"checkpoint of step {step}: cannot write {final}: {reason}") from error
            raise
        finally:
            self._writing_to = None
        if self.is_world_process_zero():
            checkpoint.prune(self._run_dir, self._config.checkpoint.keep)
        self._barrier()

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()
