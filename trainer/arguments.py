"""The Trainer's arguments of a run: transformers' names and defaults where a run file says nothing else."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from launch.config import RunConfig
from launch.errors import UserError
from launch.world import World, engine_asked_for


def training_arguments(config: RunConfig, run_dir: Path, world: World) -> SentenceTransformerTrainingArguments:
    """The Trainer's arguments for this run. All ranks must call: creating them opens the process group.

    Raises UserError where the world size does not divide the global batch of a loss that needs it to.
    """
    train = config.train
    if train.global_batch_size % world.world_size and not config.loss.is_exact:
        raise UserError(
            f"train.global_batch_size: got {train.global_batch_size}, which {world.world_size} processes cannot share "
            f"equally; allowed: a multiple of {world.world_size}"
        )
    return SentenceTransformerTrainingArguments(
        output_dir=str(run_dir),
        # Without it two CPU processes train apart and write the same folder; with it accelerate drops an engine that
        # the launcher's file asks for, without a word (trainer/live_checks.py has one).
        use_cpu=not torch.cuda.is_available() and engine_asked_for() is None,
        per_device_train_batch_size=-(-train.global_batch_size // world.world_size),
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
        include_num_input_tokens_seen="no",
        report_to=list(train.report_to) or "none",
        save_strategy="steps" if config.checkpoint.every else "epoch",
        save_steps=config.checkpoint.every or 500,
        save_total_limit=None,  # its pruning counts half-written folders as checkpoints
        disable_tqdm=True,
        prompts=None,
    )
