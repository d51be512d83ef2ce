"""Files for platforms, judged by the platforms' own checkers: `python -m pytest tests/test_launch.py`.

`python -m tests.test_launch` writes tests/golden/launch anew.
"""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
from ruamel.yaml import YAML

from launch.config_launch import Skypilot
from launch.errors import EXIT_USER, UserError
from launch.reader import read_run
from launch.skypilot import price_per_hour
from launch.targets import main
from tests.tiny_models import minilm

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/launch"
RUN = "law-bge.yaml"
FILES = {
    "local.sh": f"local {RUN}",
    "slurm.sh": f"slurm {RUN} --nodes 2 --gpus-per-node 8 --spot train.learning_rate=1e-5",
    "job.yaml": f"kubernetes {RUN} --nodes 2 --gpus-per-node 8 --spot",
    "trainjob.yaml": f"kubernetes {RUN} --nodes 2 --gpus-per-node 8 launch.kubernetes.kind=TrainJob",
    "skypilot.yaml": f"skypilot {RUN} --nodes 2 --gpus-per-node 8 --spot",
    "env.sh": f"env {RUN} --nodes 4 train.micro_batch_tokens=16384 train.graph_memory=auto loss.dims=[768,512,256,128]",
}


def _printed(words: str) -> str:
    out = io.StringIO()
    with contextlib.chdir(GOLDEN), contextlib.redirect_stdout(out):
        assert main(words.split()) == 0
    return out.getvalue()


def _documents(name: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe", pure=True).load_all((GOLDEN / name).read_text()))


@pytest.mark.parametrize("name", FILES)
def test_what_is_printed_is_the_golden_file(name: str) -> None:
    assert _printed(FILES[name]) == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".sh")])
def test_shellcheck_finds_nothing(name: str) -> None:
    checker = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([checker, GOLDEN / name])
    assert done.returncode == 0


@pytest.mark.parametrize("version", ["1.31", "1.34"])
@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_kubernetes_takes_it(name: str, version: str) -> None:
    """Strictly: no key that the schema does not have. The TrainJob's pod is judged as that of a Job."""
    documents = _documents(name)
    for document in documents:
        if document["apiVersion"].startswith("trainer.kubeflow.org/"):
            if document["kind"] != "TrainingRuntime":
                continue
            (node,) = document["spec"]["template"]["spec"]["replicatedJobs"]
            named = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}}
            judged = named | {"spec": node["template"]["spec"]}
        else:
            judged = document
        kubernetes_validate.validate(judged, version, strict=True)
    (config,) = [document for document in documents if document["kind"] == "ConfigMap"]
    assert config["data"][RUN] == (GOLDEN / RUN).read_text()


def test_kubeflow_takes_it_and_keeps_every_key() -> None:
    kinds: dict[str, Any] = {
        "TrainJob": TrainerV1alpha1TrainJob,
        "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
    }
    judged = [document for document in _documents("trainjob.yaml") if document["kind"] in kinds]
    assert len(judged) == 2
    for document in judged:
        assert kinds[document["kind"]].from_dict(document).to_dict() == document


@pytest.fixture(scope="module")
def skypilot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the programs of a SkyPilot in an environment of its own, for its hundred packages."""
    folder = tmp_path_factory.mktemp("sky")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin/python", "-m", "pip", "install", "--quiet", "skypilot==0.14.1"]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "bin"


# Two offers in the columns of SkyPilot's catalogue, whose own files are fetched from the network.
OFFERS = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice
one,H100,1.0,26.0,200.0,2.5,us-east-1,"{'Gpus': [{'MemoryInfo': {'SizeInMiB': 81920}}]}",
eight,H100,8.0,208.0,1800.0,24.0,us-west-1,"{'Gpus': [{'MemoryInfo': {'SizeInMiB': 81920}}]}",8.0
"""


@pytest.mark.slow
def test_prices_are_those_of_skypilots_catalogue(
    skypilot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".sky/catalogs/v8/lambda"
    folder.mkdir(parents=True)
    (folder / "vms.csv").write_text(OFFERS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert price_per_hour(Skypilot(gpu="H100", infra="lambda")) is None  # no SkyPilot is found
    monkeypatch.setenv("PATH", f"{skypilot}:{os.environ['PATH']}")
    assert price_per_hour(Skypilot(gpu="H100", infra="lambda")) == 2.5
    assert price_per_hour(Skypilot(gpu="H100", infra="lambda/us-west-1")) == 3.0
    assert price_per_hour(Skypilot(gpu="H100", infra="lambda", gpus_per_node=8, spot=True)) == 1.0
    with pytest.raises(UserError, match=r"^no price of A100 in SkyPilot's catalogue: no such offer; give --price-per"):
        price_per_hour(Skypilot(gpu="A100", infra="lambda"))


@pytest.mark.slow
def test_skypilot_takes_it(skypilot: Path, tmp_path: Path) -> None:
    """Another setting is refused by the same check."""
    code = "import sys, yaml, sky; sky.Task.from_yaml_config(yaml.safe_load(sys.stdin))"
    text = (GOLDEN / "skypilot.yaml").read_text()
    environment = os.environ | {"HOME": str(tmp_path), "HF_TOKEN": "x"}
    for given, accepted in ((text, True), (text.replace("num_nodes", "num_node"), False)):
        done = subprocess.run(
            [skypilot / "python", "-c", code],
            input=given,
            env=environment,
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
        assert (done.returncode == 0) == accepted, done.stderr


SKY_RUN = """
model: {path: model}
data: {sources: [{path: rows.jsonl}]}
train: {global_batch_size: 16, micro_batch_tokens: 512}
"""


@pytest.mark.slow
def test_setup_and_run_of_skypilots_file_in_a_bare_checkout(tmp_path: Path) -> None:
    """As its machine runs them, with its variables, in a clone of the last commit.

    The environment is this one; with NESTLING_TEST_SETUP set, setup's own lines install one, which takes minutes.
    """
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "bare"], check=True)
    folder = tmp_path / "bare"
    minilm(folder / "model")
    rows = [{"anchor": f"row {n}", "positive": f"a longer text of row {n}"} for n in range(32)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(SKY_RUN)
    words = [sys.executable, "-m", "launch.cli", "launch", "skypilot", "run.yaml", "--gpus-per-node", "0"]
    if "NESTLING_TEST_SETUP" not in os.environ:
        words.append(f"launch.skypilot.setup=[ln -s {sys.prefix} .venv]")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
    task = YAML(typ="safe", pure=True).load(printed)
    environment |= {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "0"}
    environment |= {"SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_TASK_ID": "sky-1", "OMP_NUM_THREADS": "1"}
    # A checkout that is not installed is found where it is run from.
    for part in ("setup", "run"):
        subprocess.run(["bash", "-c", task[part]], cwd=folder, env=environment, check=True)
    assert (folder / "runs/run/model/model.safetensors").is_file()


MISTAKES = {
    f"slurm {RUN} --nodes 5 --gpus-per-node 8": "launch.slurm: nodes: got 5, allowed: 1 to 4 (max_nodes, the quota)",
    f"slurm {RUN} --nodes 2": "launch.slurm.gpus_per_node: required; allowed: --gpus-per-node G, 0 for the CPU",
    f"slurm {RUN} --nodes 0 --gpus-per-node 8": "got 0 (int), allowed: integer >= 1 and <= 10000",
    f"slrum {RUN}": "launch: got 'slrum', allowed: local, slurm, kubernetes, skypilot, env; did you mean slurm?",
    f"local {RUN} --nodes 2": "launch.local.nodes: got 2 (int), allowed: 1",
    f"local {RUN} --spot": "launch.local.spot: unknown key",
    f"kubernetes {RUN} --gpus-per-node 8 --spot launch.kubernetes.spot_selector={{}}": "spot: needs spot_selector",
    f"skypilot {RUN} --gpus-per-node 8 launch.skypilot.gpu=null": "gpu: required with gpus_per_node",
    f"skypilot {RUN} --gpus-per-node 8 --spot checkpoint.remote=null": "null with spot machines, whose disks go",
    f"slurm {RUN} --gpus-per-node 8 'launch.slurm.environment={{HF_TOKEN: x}}'": "HF_TOKEN, a secret, which would",
    f"slurm {RUN} --gpus-per-node 8 launch.slurm.patition=x": "unknown key; did you mean partition?",
    f"slurm {RUN} --gpus-per-node 8 --submit": "launch slurm: the command sbatch is not installed here",
    f"env {RUN} --submit": "launch env: nothing to submit to",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(GOLDEN)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        main(shlex.split(words))
    assert MISTAKES[words] in str(error.value) and "\n" not in str(error.value)


def test_another_targets_section_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "model: {path: m/m}\ndata: {sources: [{path: a.csv}]}\ntrain: {global_batch_size: 8}\nlaunch: {env: {}}\n"
    )
    with pytest.raises(UserError, match=r"run\.yaml has launch\.env; add the section, or nestling launch env"):
        main(["slurm", "run.yaml", "--gpus-per-node", "8"])
    assert read_run(Path("run.yaml")).launch is not None


def test_a_run_file_without_the_section_and_a_missing_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("model: {path: m/m}\ndata: {sources: [{path: a.csv}]}\ntrain: {global_batch_size: 8}\n")
    assert main(["env", str(run_file)]) == 0
    assert "launch.node --nodes 1 " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"launch\.kubernetes\.image: required and missing"):
        main(["kubernetes", str(run_file), "--gpus-per-node", "1"])


def test_submit_hands_the_file_over(tmp_path: Path) -> None:
    """To a program of that name, which keeps what it got and fails when told to."""
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\ncp "$1" {tmp_path}/got\nexit ${{CODE:-0}}\n')
    (tmp_path / "sbatch").chmod(0o755)
    command = [sys.executable, "-m", "launch.cli", "launch", *FILES["slurm.sh"].split(), "--submit"]
    for code in (0, 1):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)}
        done = subprocess.run(command, cwd=GOLDEN, env=environment | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == code
    got, golden = (tmp_path / "got").read_text(), (GOLDEN / "slurm.sh").read_text()
    assert got.splitlines()[2:] == golden.splitlines()[2:]
    assert done.returncode != EXIT_USER


if __name__ == "__main__":
    for file, command_line in FILES.items():
        (GOLDEN / file).write_text(_printed(command_line))
