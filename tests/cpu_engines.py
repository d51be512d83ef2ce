"""Makes accelerate and DeepSpeed run FSDP2 and ZeRO over gloo on CPUs, which both leave out, for tests only.

accelerate knows these engines on accelerators alone: on a CPU it trains plain DDP, or one process, without a word.
DeepSpeed compiles an operator for shared memory at its start, for minutes, and a build that is ended leaves a lock on
which every later one waits. `python -m tests.cpu_engines train.py RUN.yaml ...` is train.py after that.
"""

import os
import runpy
import sys

from launch.world import engine_asked_for


def use_gloo() -> None:
    """Patch this process, before any accelerate state exists."""
    import torch
    import transformers.training_args
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    kind = DistributedType.MULTI_CPU if engine_asked_for() == "DEEPSPEED" else DistributedType.MULTI_GPU

    def prepare_backend(*_: object) -> tuple[str, DistributedType]:
        return "gloo", kind

    def set_device(state: PartialState) -> None:
        state.device = torch.device("cpu")

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
    logger.setLevel("ERROR")


if __name__ == "__main__":
    use_gloo()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
