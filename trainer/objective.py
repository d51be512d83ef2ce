"""What the exact step minimises, from the loss section of a run file, under the names of sentence-transformers."""

from typing import Any

from launch.config import EXACT_LOSSES, RunConfig
from launch.errors import UserError
from trainer.infonce import Objective
from trainer.targets import Scoring

SYMMETRIC = EXACT_LOSSES[1]
# Other values of these arguments are other losses.
_COMPUTED: dict[str, Any] = {
    "similarity_fct": "cos_sim",
    "gather_across_devices": True,
    "show_progress_bar": False,
}


def check_arguments(config: RunConfig) -> None:
    """Raise UserError for arguments of the loss that the exact step does not compute."""
    for name, value in config.loss.arguments.items():
        if name in ("mini_batch_size", "mini_batch_num_tokens"):
            raise UserError(
                f"loss.arguments.{name}: got {value!r}; the exact step takes train.micro_batch_tokens instead"
            )
        if name in _COMPUTED and value != _COMPUTED[name]:
            raise UserError(
                f"loss.arguments.{name}: got {value!r}, the exact step computes {_COMPUTED[name]!r} only; "
                "loss.step=library trains it in sentence-transformers' own code"
            )


def objective_of(config: RunConfig, width: int) -> Objective:
    """The objective of a run whose model has `width` dims; `build_loss` has refused wrong arguments before."""
    arguments: dict[str, Any] = {"hardness_strength": 0.0, **config.loss.arguments}
    if config.loss.name == SYMMETRIC:
        scoring = Scoring(("query_to_doc", "doc_to_query"), "per_direction")
    else:
        scoring = Scoring(
            directions=tuple(arguments.get("directions", ("query_to_doc",))),
            partition_mode=arguments.get("partition_mode", "joint"),
            hardness_mode=arguments.get("hardness_mode") if arguments["hardness_strength"] > 0 else None,
            hardness_strength=float(arguments["hardness_strength"]),
        )
    dims = config.loss.dims or [width]
    return Objective(float(arguments.get("scale", 20.0)), dims, config.loss.dim_weights or [1.0] * len(dims), scoring)
