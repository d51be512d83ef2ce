"""trainer/validation.py and quality.py: evaluation during training, the best checkpoint, averages, against
sentence-transformers' evaluator on the checkpoint that was kept."""

import copy
import json
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim
from transformers import TrainerControl

from launch.config import RunConfig
from launch.reader import read_run
from launch.world import World
from tests import tiny_models
from tests.test_run import CPU2, _curve, _finish, _run_file, _start, _tensorboard_tags
from tests.test_trainable import kill_after
from tests.vectors import ALONE
from trainer import validation
from trainer.quality import evaluate_run, open_sets
from trainer.retrieval import RetrievalSet

EVALUATED = """
loss: {dims: [32, 8]}
checkpoint: {every: 3}
evaluate: {sources: [{path: HELD}], max_queries: 10, every: 2, best: mrr@10, subset_queries: 12, subset_documents: 20}
"""


def by_sentence_transformers(model: SentenceTransformer, texts: RetrievalSet, dim: int) -> dict[str, float]:
    evaluator = InformationRetrievalEvaluator(
        {str(i): text for i, text in enumerate(texts.queries)},
        {str(i): text for i, text in enumerate(texts.documents)},
        {str(i): {str(d) for d in found} for i, found in enumerate(texts.relevant)},
        truncate_dim=dim,
        score_functions={"cosine": cos_sim},
    )
    found: Any = evaluator.compute_all_metrics(model)["cosine"]
    return {"ndcg@10": found["ndcg@k"][10], "mrr@10": found["mrr@k"][10]}


def test_the_best_checkpoint_is_kept_and_becomes_the_model(tmp_path: Path) -> None:
    extra = EVALUATED.replace("HELD", str(tmp_path / "held_out.jsonl"))
    run_file = _run_file(tmp_path, rows=80, extra=extra, train="  optim: sgd")
    # Dropout is drawn anew on another number of processes, which the run below goes on with.
    path = tiny_models.minilm(tmp_path / "tiny")
    words = str(run_file), f"model.path={path}", "model.dropout=0.0", "train.learning_rate=0.5"
    code, out, err = _finish(_start(*words, f"train.run_dir={tmp_path}/whole", launcher=CPU2))
    assert code == 0, out + err
    run_dir = tmp_path / "whole"
    seen = {line["step"]: line for line in _curve(run_dir) if "eval_mrr@10_32" in line}
    assert list(seen) == [2, 4, 6, 8, 10]
    assert len({line["eval_mrr@10_32"] for line in seen.values()}) > 1, "quality must change for this to be a test"
    best = max(seen, key=lambda step: (seen[step]["eval_mrr@10_32"], -step))
    record = json.loads((run_dir / "run.json").read_text())
    assert record["best_step"] == best and f"best checkpoint: step {best} of 10" in out
    # 30 held-out queries: 10 are in the final evaluation, so 12 others are left for the subset.
    assert record["subset"]["queries"] == 12 and record["subset"]["queries_of_final_evaluation"] == 0
    kept = run_dir / "checkpoints" / f"step-{best}"
    tuned = load_file(run_dir / "model/model.safetensors")
    assert all(value.equal(tuned[name]) for name, value in load_file(kept / "model.safetensors").items())
    sets = open_sets(read_run(run_file, words[1:]))
    assert sets and sets.subset and not set(sets.subset.queries) & set(sets.final["domain"].queries)
    for dim in (32, 8):
        expected = by_sentence_transformers(SentenceTransformer(str(kept), device="cpu"), sets.subset, dim)
        for metric, value in expected.items():
            assert seen[best][f"eval_{metric}_{dim}"] == pytest.approx(value, abs=1e-6)
    assert {"eval/mrr@10_32", "eval/ndcg@10_8", "retrieval/domain/ndcg@10/tuned"} <= _tensorboard_tags(run_dir)

    # Killed and started again, with a gate that cannot hold: the same model, exit code 3, everything written.
    kill_after(tmp_path / "run/checkpoints/step-6", *words, launcher=CPU2)
    code, out, err = _finish(_start(*words, "evaluate.gate=[{gain: 0.99}]"))
    assert code == 3 and "nestling: gate failed: ndcg@10 at 32 dims: tuned minus base above +0.99" in err, out + err
    assert json.loads((tmp_path / "run/run.json").read_text())["best_step"] == best
    losses = [[line["loss"] for line in _curve(folder)] for folder in (run_dir, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    again = load_file(tmp_path / "run/model/model.safetensors")
    assert all(value.allclose(tuned[name], atol=1e-5) for name, value in again.items())
    assert (tmp_path / "run/report.html").is_file()


@pytest.mark.slow
def test_a_fresh_machine_fetches_the_best_checkpoint_too(tmp_path: Path) -> None:
    """The one before lost its disk after the best evaluation; the learning rate spoils what follows."""
    extra = EVALUATED.replace("HELD", str(tmp_path / "held_out.jsonl"))
    run_file = _run_file(tmp_path, rows=80, extra=extra, train="  optim: sgd")
    path, bucket = tiny_models.minilm(tmp_path / "tiny"), tmp_path / "bucket"
    words = [str(run_file), f"model.path={path}", f"checkpoint.remote=file://{bucket}"]
    words += ["train.learning_rate=5", "train.epochs=4"]
    kill_after(bucket / "checkpoints/step-9/manifest.json", *words, launcher=CPU2)
    shutil.rmtree(tmp_path / "run")
    code, out, err = _finish(_start(*words))
    assert code == 0, out + err
    best = json.loads((tmp_path / "run/run.json").read_text())["best_step"]
    assert best < 9, "for this to be a test the best one must not be the one to go on from"
    kept = load_file(tmp_path / f"run/checkpoints/step-{best}/model.safetensors")
    tuned = load_file(tmp_path / "run/model/model.safetensors")
    assert all(value.equal(tuned[name]) for name, value in kept.items())


def config(folder: Path, **evaluate: Any) -> RunConfig:
    run: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"sources": [{"path": "x.jsonl"}]},
        "train": {"global_batch_size": 2},
        "evaluate": {"sources": [{"path": str(folder / "held_out.jsonl")}], **evaluate},
    }
    return RunConfig.model_validate(run)


def test_training_stops_after_so_many_evaluations_without_a_better_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = dict(zip(range(10, 90, 10), (0.3, 0.5, 0.4, 0.5, 0.6, 0.1, 0.2, 0.3), strict=True))
    model: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device="cpu")]), device="cpu")
    model.get_embedding_dimension = lambda: 4

    def run(steps: range, log: str, best: str | None = "ndcg@10") -> tuple[list[int], list[int], Any]:
        settings = config(tmp_path, every=10, best=best, patience=best and 3)
        (tmp_path / "metrics.jsonl").write_text(log)
        callback = validation.Validation(settings, RetrievalSet(["q"], ["a", "b"], [{0: 1}]), model, tmp_path, ALONE)
        state, saved, control = SimpleNamespace(global_step=steps.start - 1, max_steps=85), [], TrainerControl()
        callback.on_train_begin(None, state, control)
        ran = []
        for step in steps:
            state.global_step, control = step, TrainerControl()
            by_metric = {("float32", 4): {"ndcg@10": _Mean(values.get(step, 0.0))}}
            scored = SimpleNamespace(by_metric=by_metric, dims=[4])
            monkeypatch.setattr(validation, "score", lambda *_, found=scored, **__: found)
            callback.on_step_end(None, state, control)
            ran.append(step)
            saved += [step] * control.should_save
            if control.should_training_stop:
                break
        return ran, saved, callback.best_step

    ran, saved, best = run(range(1, 86), "")
    assert (ran[-1], saved, best) == (80, [10, 20, 50, 80], 50), "a tie is no gain; the stop is saved too"
    line = '{{"step": {}, "eval_ndcg@10_4": {}, "eval_ndcg@10_2": 0.9}}\n'
    log = "".join(line.format(step, value) for step, value in values.items())
    ran, saved, best = run(range(61, 86), "".join(log.splitlines(keepends=True)[:6]))
    assert (ran[-1], saved, best) == (80, [80], 50), "resumed after step 60"
    assert run(range(81, 86), log)[0] == [81], "resumed after it had stopped: no further training"
    assert run(range(1, 86), "", best=None)[::2] == (list(range(1, 86)), None)


class _Mean(float):
    def mean(self) -> float:
        return float(self)


def test_averages_are_those_of_averaged_weights(tmp_path: Path) -> None:
    _run_file(tmp_path)
    settings = config(tmp_path, averages=[0.25, 0.5], every=None, max_queries=None)
    base = SentenceTransformer(str(tiny_models.minilm(tmp_path / "tiny")), device="cpu")
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.data += parameter.data.roll(1) * 0.5
    sets = open_sets(settings)
    assert sets
    before = copy.deepcopy(base.state_dict())
    found = evaluate_run(settings, sets, copy.deepcopy(base), tuned, ALONE)
    assert found
    for entry in found[0]["averages"]:
        share = entry["base_share"]
        mixed = copy.deepcopy(base)
        with_names = dict(tuned.named_parameters())
        for name, parameter in mixed.named_parameters():
            parameter.data = (share * before[name].double() + (1 - share) * with_names[name].double()).float()
        expected = by_sentence_transformers(mixed, sets.final["domain"], 32)["ndcg@10"]
        assert entry["value"] == pytest.approx(expected, abs=1e-6)
    assert [entry["base_share"] for entry in found[0]["averages"]] == [0.25, 0.5]
    assert len({entry["value"] for entry in found[0]["averages"]}) == 2


def test_a_small_set_shares_queries_with_the_final_evaluation_and_says_so(tmp_path: Path) -> None:
    _run_file(tmp_path)  # 30 held-out pairs
    sets = open_sets(config(tmp_path, every=1, max_queries=25, subset_queries=12))
    assert sets and sets.subset
    shared = set(sets.subset.queries) & set(sets.final["domain"].queries)
    assert len(sets.subset.queries) == 12 and len(shared) == sets.subset_facts["queries_of_final_evaluation"] == 7


def _resumed(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    model: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device="cpu")]), device="cpu")
    model.get_embedding_dimension = lambda: 4
    settings = config(folder, every=10, best="ndcg@10", patience=3)
    world = World(rank, rank, 2, 1, 2)
    callback = validation.Validation(
        settings, RetrievalSet(["q"], ["a", "b"], [{0: 1}]), model, folder / f"node{rank}", world
    )
    state, ends, seen = SimpleNamespace(global_step=60, max_steps=100), [], []
    callback.on_train_begin(None, state, TrainerControl())
    for step in range(61, 81):
        value = _Mean({70: 0.5, 80: 0.6}.get(step, 0.0) + 1e-9 * rank)  # the last digit differs between machines
        scored = SimpleNamespace(by_metric={("float32", 4): {"ndcg@10": value}}, dims=[4])
        validation.score = lambda *_, found=scored, **__: found
        state.global_step, control = step, TrainerControl()
        there = [torch.zeros(1) for _ in range(2)]
        dist.all_gather(there, torch.full((1,), float(step)))  # what a step does
        ends.append([float(other) for other in there])
        callback.on_step_end(None, state, control)
        seen.append([control.should_save, control.should_training_stop])
    (folder / f"said{rank}").write_text(json.dumps([ends, seen, callback.best_step]))


def test_a_machine_without_the_log_decides_as_the_others(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    lines = [json.dumps({"step": step, "eval_ndcg@10_4": value}) for step, value in ((50, 0.9), (60, 0.4))]
    (tmp_path / "node0/metrics.jsonl").write_text("\n".join(lines) + "\n")
    torch.multiprocessing.spawn(_resumed, (tmp_path,), nprocs=2)
    one, other = (json.loads((tmp_path / f"said{rank}").read_text()) for rank in (0, 1))
    assert one == other and one[2] == 50 and one[1][-1] == [True, True]
    assert one[0] == [[float(step)] * 2 for step in range(61, 81)]
