"""What TensorBoard gets beside the curves of training: the resolved run, its hyperparameters, quality by dim."""

from pathlib import Path
from typing import Any

from launch.config import RunConfig
from launch.reader import resolved_yaml
from trainer.evaluation import MAIN_METRIC

FOLDER = "tensorboard"


def write_summary(config: RunConfig, run_dir: Path, evaluation: dict[str, Any]) -> None:
    """Write RUN/tensorboard/summary. Quality is a curve over dims: what TensorBoard calls the step is the dim."""
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(run_dir / FOLDER / "summary")) as writer:
        writer.add_text("run", "\n".join(f"    {line}" for line in resolved_yaml(config).splitlines()))
        reached = {}
        for entry in evaluation.get("results", []):
            if entry["vectors"] == "float32":
                name = f"retrieval/{entry['set']}/{entry['metric']}/{entry['model']}"
                writer.add_scalar(name, entry["value"], entry["dim"])
                if entry["model"] == "tuned" and entry["metric"] == MAIN_METRIC:
                    reached[f"hparam/{entry['set']}/{MAIN_METRIC}/{entry['dim']}"] = entry["value"]
        flat: dict[str, Any] = {
            "model": config.model.path,
            "loss": config.loss.name,
            "dims": ",".join(map(str, config.loss.dims or [])),
        }
        for name, value in config.train.model_dump().items():
            if isinstance(value, bool | int | float | str):
                flat[name] = value
        writer.add_hparams(flat, reached or {"hparam/steps": 0}, run_name=".")
