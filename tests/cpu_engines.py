"""Makes accelerate and DeepSpeed run FSDP2 and ZeRO over gloo on CPUs, which both leave out, for tests only.

accelerate knows these engines on accelerators alone: on a CPU it trains plain DDP, or one process, without a word.
Likewise it leaves fp16 out on a CPU, which we refuse there; here it has the scaler that it would have on a GPU.
DeepSpeed compiles an operator for shared memory at its start, for minutes, and a build that is ended leaves a lock on
which every later one waits. `python -m tests.cpu_engines train.py RUN.yaml ...` is train.py after that.
"""

import os
import runpy
import sys
from typing import Any

from launch.world import engine_asked_for


def use_gloo() -> None:
    """Patch this process, before any accelerate state exists."""
    import torch
    import transformers.training_args
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType

    from trainer import live_checks

    kind = DistributedType.MULTI_CPU if engine_asked_for() == "DEEPSPEED" else DistributedType.MULTI_GPU

    def prepare_backend(*_: object) -> tuple[str, DistributedType]:
        return "gloo", kind

    def set_device(state: PartialState) -> None:
        state.device = torch.device("cpu")

    made, check_live = Accelerator.__init__, live_checks.check_live

    def with_scaler(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.mixed_precision == "fp16" and kind == DistributedType.MULTI_GPU:
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", 2.0**10)

    def check_live_on_gpu(args: Any, world: Any, config: Any, facts: Any) -> None:
        train = config.train.model_copy(update={"precision": "fp32"})
        check_live(args, world, config.model_copy(update={"train": train}), facts)

    setattr(Accelerator, "__init__", with_scaler)  # noqa: B010
    setattr(live_checks, "check_live", check_live_on_gpu)  # noqa: B010
    setattr(PartialState, "_prepare_backend", prepare_backend)  # noqa: B010  (a method to the type checker)
    setattr(PartialState, "set_device", set_device)  # noqa: B010
    setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)  # noqa: B010
    quiet_deepspeed()


def quiet_deepspeed(device: str = "cpu") -> None:
    """DeepSpeed on this kind of device, without its log, and on a CPU without compiling anything."""
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device == "cpu":  # torch computes fp16 on any CPU; DeepSpeed wants instructions for it
        setattr(deepspeed.get_accelerator(), "is_fp16_supported", lambda: True)  # noqa: B010
    logger.setLevel("ERROR")


if __name__ == "__main__":
    use_gloo()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
