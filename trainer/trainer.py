"""ContrastiveTrainer: SentenceTransformerTrainer with nestling's step, metrics and checkpoints.

What the Trainer does well (optimiser, scheduler, clipping, callbacks, resume bookkeeping) stays its own. The exact step
replaces two of its methods, `get_train_dataloader` and `training_step`; any other loss runs through them unchanged.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
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
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from launch.config import Model, RunConfig
from launch.errors import UserError
from launch.world import engine_asked_for, read_world
from trainer import checkpoint, collectives, watch
from trainer.exact_step import ExactStep
from trainer.gradcache import STOP_ASKED, StepAbandoned
from trainer.loader import batches_of
from trainer.losses import LossByDim
from trainer.memory import MemoryRanOut, say
from trainer.metrics_log import Board, StepLog
from trainer.model import load_model, prompt_of
from trainer.preemption import SaveInTime
from trainer.remote import Remote, fetch
from trainer.retrieval import RetrievalSet
from trainer.tokens import role_of
from trainer.trainable import merged, read_adapters, save_adapters
from trainer.validation import Validation
from trainer.weights import is_sharded, load_whole, name_layers, spread, whole_weights

# Of log_history, which the Trainer writes whole into each checkpoint: hundreds of MB at step 1,000,000 otherwise.
_KEPT_LOGS = 100


@dataclass
class RoleCollator(SentenceTransformerDataCollator):
    """Tells the model which role a column plays, so that queries get their own maximal length."""

    def _get_task_for_column(self, column_name: str, column_position: int, router_mapping: dict[str, str]) -> str:
        return router_mapping.get(column_name) or role_of(column_name)


class Stopped(Exception):
    """All ranks left a step because one was told to stop."""


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
        subset: RetrievalSet | None = None,
        stop_asked: Callable[[], bool] = bool,
        remote: Remote | None = None,
    ) -> None:
        """`exact` computes the step; None leaves it to `loss` in sentence-transformers' own code. `subset` is what
        `evaluate.every` looks at, `stop_asked` whether this rank was told to stop, `remote` where rank 0 uploads to."""
        prompts = {column: prompt_of(model, role_of(column)) for column in rows.column_names}
        args.prompts = {column: prompt for column, prompt in prompts.items() if prompt}
        self._config, self._run_dir, self._exact, self._stop_asked = config, run_dir, exact, stop_asked
        self._writing_to: Path | None = None
        self._loss_by_dim = LossByDim(loss)
        # Whole weights are saved from here, because the engine takes `model` apart and training changes it meanwhile.
        self._plain = copy.deepcopy(model) if args.process_index == 0 else None
        self._optimizer_state: Any = None
        self._batches: Any = None
        self._planned_for = 0
        self._remote = remote
        self._writer = checkpoint.Writer(run_dir, config.checkpoint.keep, remote)
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            loss=loss,
            data_collator=RoleCollator(preprocess_fn=model.preprocess, prompts=args.prompts),
            callbacks=[StepLog(run_dir / "metrics.jsonl")],
        )
        self.remove_callback(PrinterCallback)  # it repeats StepLog
        if self.pop_callback(TensorBoardCallback):
            self.add_callback(Board())
        if self.is_fsdp_enabled:
            name_layers(self.accelerator.state.fsdp_plugin, model)
        if exact is not None and config.evaluate and config.evaluate.loss_every:
            self.add_callback(HeldOutLoss(exact, config.evaluate.loss_every))
        self._validation = Validation(config, subset, model, run_dir, read_world()) if subset else None
        if self._validation:
            self.add_callback(self._validation)
        self._save_in_time = SaveInTime(config.train.grace_seconds, config.checkpoint.every)
        self.add_callback(self._save_in_time)
        self._tokens = torch.zeros(2, dtype=torch.int64, device=args.device)  # [real, padded] since the last log
        self._logged_at = time.monotonic()

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the library's model card reads data and asks the hub; the bundle writes its own."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of an epoch; of the exact step its length alone, by which the Trainer counts.

        Accelerate would count through all that a resume skips (40 ms a million), and stop loader workers every epoch.
        """
        self._batches = None
        return super().get_train_dataloader() if self._exact is None else DataLoader(self._exact.steps)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The next batch, which a loader worker may be making."""
        watch.at("data", self.state.global_step + 1)
        if self._exact is not None:
            steps = self._exact.steps
            if self._batches is None or self._planned_for != steps.micro_batch_tokens:  # workers know the former budget
                ends = self.state.global_step, self.state.max_steps
                self._batches = batches_of(steps, *ends, self.args.dataloader_num_workers)
                self._planned_for = steps.micro_batch_tokens
            epoch_iterator = self._batches
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Loss of one global batch on this rank, gradients left on the parameters. All ranks must call.

        Raises UserError, on all ranks alike, where the loss is not finite, and Stopped where a rank was told to stop.
        """
        watch.at("step", self.state.global_step + 1)
        if self._exact is not None:
            model.train()
            try:
                return self._exact.run(model, inputs["batch"], self.accelerator.backward)
            except StepAbandoned as error:
                if error.reason == STOP_ASKED:
                    raise Stopped from error
                raise self._exact.explain(error, inputs["batch"], self._run_dir) from error
            except MemoryRanOut as error:
                raise error.told() from error
        for name, mask in inputs.items():
            if name.endswith("attention_mask"):
                self._tokens += torch.stack([mask.sum(), torch.tensor(mask.numel(), device=mask.device)]).to(
                    self._tokens
                )
            elif name.endswith("cu_seq_lens_q"):  # packed without padding
                self._tokens += mask[-1]
        loss = super().training_step(model, inputs, num_items_in_batch)
        watch.at("optimiser")
        code = collectives.highest(2 if not loss.isfinite() else int(self._stop_asked()), loss.device)
        if code == 1:
            raise Stopped
        if code == 2:
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is not finite; nothing is saved over the last good "
                f"checkpoint in {self._run_dir}; lower train.learning_rate, or train in fp32 or bf16"
            )
        return loss

    def train_or_stop(self, resume: Path | None) -> bool:
        """Train from the start or from a checkpoint; whether a rank was told to stop. All ranks must call.

        Then a checkpoint of the last whole step is there, if there was one.
        """
        try:
            self.train(resume_from_checkpoint=str(resume) if resume else None)
        except Stopped:
            if self.state.global_step:
                self._save_checkpoint(self.model, None)
                self._finish_checkpoints(is_stopped=True)
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # closes what logs are written to
            return True
        finally:
            self._batches = None  # loader workers end
        return self._finish_checkpoints()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add nestling's numbers to a training log. All ranks must call: some are summed over ranks."""
        if "loss" in logs:
            logs = {**logs, **(self._library_metrics() if self._exact is None else self._exact.metrics())}
            logs["memory_bytes"] = (
                float(torch.cuda.max_memory_allocated())
                if torch.cuda.is_available()
                else float(psutil.Process().memory_info().rss)
            )
            if self._validation:
                logs |= self._validation.take()
        super().log(logs, start_time)
        del self.state.log_history[:-_KEPT_LOGS]

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
        """The model after training, whole and in fp32 on every rank, without the engine. All ranks must call.

        With `evaluate.best` it is that of the best checkpoint.
        """
        if (best := self.best_step) not in (None, self.state.global_step):
            return self._model_of(checkpoint.folder_of(self._run_dir, best))
        if not is_sharded(self.model_wrapped):
            # Takes off the autocast that accelerate put around forward.
            tuned: Any = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
            return merged(tuned)
        whole = self._whole_model()
        return self._spread(merged(whole) if whole is not None else None)

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint `evaluate.best` chose so far, None where it is not asked for."""
        return self._validation.best_step if self._validation else None

    def _model_of(self, folder: Path) -> SentenceTransformer:
        """The model of a checkpoint that rank 0 can read, on every rank. All ranks must call."""
        problem = checkpoint.problem_with(folder) if self.is_world_process_zero() else None
        if problem and (url := self._config.checkpoint.remote):  # a machine that went on from a newer one
            fetch(url, checkpoint.step_of(folder), self._run_dir, logging.getLogger("nestling").warning)
            problem = checkpoint.problem_with(folder)
        if collectives.highest(int(problem is not None), self.args.device):
            raise UserError(f"{problem}; it is the best one, so there is no tuned model; set evaluate.best to null")
        settings = self._config.model
        if self.is_world_process_zero():
            settings = settings.model_copy(update={"path": str(folder), "revision": None, "pooling": None})
        return self._spread(None, settings)

    def _spread(self, whole: SentenceTransformer | None, settings: Model | None = None) -> SentenceTransformer:
        """Rank 0's model on every rank: `whole`, or where it is None what `settings` name. All ranks must call."""
        unset_hf_deepspeed_config()  # under ZeRO-3 every model that is loaded would be taken apart
        plain = whole if whole is not None else load_model(settings or self._config.model, "cpu")
        spread(plain)
        return plain.to(self.args.device)

    def _whole_model(self) -> SentenceTransformer | None:
        """A copy of the model as it is now, with its adapters; on rank 0, elsewhere None. All ranks must call.

        It is the same one at each call, so wait for the writer before.
        """
        weights = whole_weights(self.model_wrapped) if is_sharded(self.model_wrapped) else self.model.state_dict()
        if self._plain is not None:
            self._plain.load_state_dict(self._plain.state_dict() | weights)  # what is left out never changes
        return self._plain

    # Weights are saved whole, so that any engine reads what any other wrote; optimiser states as the engine has them.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as sentence-transformers does, adapters merged and beside it. All ranks must call."""
        if (whole := self._whole_model()) is not None:
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self._writer.later(lambda: merged(whole).save_pretrained(str(folder), create_model_card=False))
            self._writer.later(lambda: save_adapters(whole, folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled:
            state = self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model
            save_fsdp_optimizer(*state, output_dir)
        elif self.args.should_save:
            optimizer: Any = self.optimizer
            self._optimizer_state = state = checkpoint.copied(optimizer.state_dict(), self._optimizer_state)
            self._writer.later(lambda: torch.save(state, Path(output_dir) / OPTIMIZER_NAME))
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            its = checkpoint.copied(scheduler.state_dict())
            self._writer.later(lambda: torch.save(its, Path(output_dir) / SCHEDULER_NAME))
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

    # Checkpoints: the Trainer writes into a partial folder, a thread of rank 0 what takes long and publishes it.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to or self._run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        watch.at("checkpoint", is_watched=False)
        step, writer, device = self.state.global_step, self._writer, self.args.device
        writer.wait()
        if self._remote:
            self._remote.refuse_if_lost()
        if line := self._save_in_time.saved(collectives.highest(math.ceil(writer.seconds), device)):
            say(line)
        if collectives.highest(int(checkpoint.folder_of(self._run_dir, step).exists()), device):
            return
        if writer.problem:
            logging.getLogger("nestling").warning("%s; training goes on", writer.problem)
        self._writing_to = checkpoint.partial_name(self._run_dir, step)
        try:
            writer.begin(step, self.is_world_process_zero())
        except OSError as error:
            writer.fail(step, error)
        if collectives.highest(int(writer.problem is not None), device):  # which is a barrier too
            self._writing_to = None
            return
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            writer.fail(step, error)
            if engine_asked_for():  # whose ranks wait for each other in there
                raise UserError(writer.problem) from error
        written, self._writing_to = self._writing_to / f"checkpoint-{step}", None
        has_failed = collectives.highest(int(writer.problem is not None), device)
        if self.is_world_process_zero() and not has_failed:
            facts = {"engine": self.engine_name, "processes": self.args.world_size}
            writer.publish(written, step, facts, self.best_step)

    def _finish_checkpoints(self, is_stopped: bool = False) -> bool:
        """Wait for the last one and its upload, for that half the grace once a rank is told to stop; whether one was.

        Raises UserError, on all ranks alike, where it is not there. All ranks must call.
        """
        self._writer.wait()
        if self._config.checkpoint.remote:
            code = 1
            while code == 1 and not is_stopped:  # the other ranks come back each second to look at their signals
                is_waiting = self._remote is not None and not self._remote.is_idle(1.0)
                code = collectives.highest(2 if self._stop_asked() else int(is_waiting), self.args.device)
                is_stopped = code == 2
            if self._remote:
                self._remote.finish(self._config.train.grace_seconds / 2)
        if collectives.highest(int(self._writer.problem is not None), self.args.device):
            raise UserError(self._writer.problem or "the last checkpoint cannot be written; see rank 0")
        return bool(collectives.highest(int(is_stopped or self._stop_asked()), self.args.device))

    def _save_rng_state(self, output_dir: str) -> None:
        if self._exact is None:  # whose randomness comes from the seed, step and rank
            super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._exact is None:
            super()._load_rng_state(checkpoint)
