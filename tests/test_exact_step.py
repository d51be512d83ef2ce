"""The exact step inside the real Trainer, in real processes: `python -m pytest tests/test_exact_step.py`.

Every case trains a small BERT through ContrastiveTrainer as accelerate prepares it; what is compared are the gradients
that the optimiser is about to see.
"""

import contextlib
import copy
import io
import itertools
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import psutil
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from launch.config import RunConfig
from launch.errors import UserError
from launch.world import World
from tests import tiny_models
from tests.distributed import run
from trainer import flops
from trainer.arguments import training_arguments
from trainer.exact_step import ExactStep, tokenise, tokenise_held_out
from trainer.losses import build_loss
from trainer.model import freeze_unused, load_model
from trainer.trainer import ContrastiveTrainer

WORDS = " ".join(tiny_models.SENTENCES).split()
COLUMNS = ("anchor", "positive", "negative")
HELD_OUT = 20


def _rows(count: int, seed: int = 0) -> datasets.Dataset:
    draw = random.Random(seed)
    texts = {c: [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)] for c in COLUMNS}
    return datasets.Dataset.from_dict(texts)


@dataclass
class Run:
    """What a training left behind."""

    trainer: ContrastiveTrainer
    gradients: list[Tensor] = field(default_factory=list)  # after clipping, one a step
    marks: list[int] = field(default_factory=list)  # entries of `seen` before each step
    seen: list[tuple[bool, torch.dtype, torch.dtype]] = field(default_factory=list)  # graph wanted, inside, embedding

    @property
    def logs(self) -> list[dict[str, float]]:
        return [log for log in self.trainer.state.log_history if "loss" in log]

    @property
    def weights(self) -> Tensor:
        return _flat([p.detach() for p in self.trainer.model.parameters()])


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _held_out() -> datasets.Dataset:
    return _rows(HELD_OUT, seed=7).remove_columns("negative")


def _settings(
    folder: Path, model: dict[str, Any], loss: dict[str, Any], evaluate: dict[str, Any] | None, train: dict[str, Any]
) -> RunConfig:
    defaults = {"global_batch_size": 16, "max_steps": 1, "max_grad_norm": None, "micro_batch_tokens": 96}
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder / "model"), **model},
            "data": {"sources": [{"path": "rows"}], "cache_dir": str(folder / "cache")},
            "loss": {"dims": [32, 8], "mask_known_positives": False, **loss},
            "evaluate": evaluate and {"sources": [{"path": "held out"}], **evaluate},
            "train": {**defaults, "report_to": [], "optim": "sgd", "learning_rate": 0.1, **train},
        }
    )


def _prepare(
    folder: Path,
    place: tuple[int, int],
    *,
    rows: int = 16,
    double: bool = False,
    flat: bool = False,
    model: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    evaluate: dict[str, Any] | None = None,
    **train: Any,
) -> Run:
    """A trainer as trainer/main.py makes it, in a process of tests/distributed.py; all ranks must call."""
    rank, size = place
    if size > 1:  # what torchrun sets
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    config = _settings(folder, model or {}, loss or {}, evaluate, train)
    world = World(rank, rank, size, size, 1)
    encoder = load_model(config.model, "cpu")
    freeze_unused(encoder)
    if double:
        encoder.double()
    if flat:
        tiny_models.flatten(encoder)
    data, held_out = _rows(rows), None
    tokenised = tokenise(config, data, [{"name": "rows", "fingerprint": str(rows), "rows": rows}], encoder)
    args = training_arguments(config, folder / f"run-{rank}", world)
    args.save_strategy = "no"
    if config.evaluate:
        facts = [{"name": "held out", "fingerprint": "held out", "rows": HELD_OUT}]
        held_out = tokenise_held_out(config, _held_out(), facts, encoder)
    step = ExactStep(config, encoder, tokenised, world, bool, held_out) if config.loss.is_exact else None
    (folder / f"run-{rank}").mkdir(exist_ok=True)
    trainer = ContrastiveTrainer(
        config, encoder, args, data, build_loss(config.loss, encoder), folder / f"run-{rank}", step
    )
    made = Run(trainer)
    trainer.add_callback(Watch(made))
    return made


class Watch(TrainerCallback):
    """Notes the gradients, and in which arithmetic a layer of the encoder and the whole model answer."""

    def __init__(self, run: Run) -> None:
        self.run = run
        layer = next(module for module in run.trainer.model.modules() if isinstance(module, torch.nn.Linear))
        inside: list[torch.dtype] = []
        layer.register_forward_hook(lambda *a: inside.append(a[2].dtype))
        run.trainer.model[1].register_forward_hook(
            lambda *a: run.seen.append((torch.is_grad_enabled(), inside[-1], a[2]["sentence_embedding"].dtype))
        )

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.run.marks.append(len(self.run.seen))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        parameters = self.run.trainer.model.parameters()
        self.run.gradients.append(_flat([p.grad.clone() for p in parameters if p.grad is not None]))


def _train(folder: Path, place: tuple[int, int], **settings: Any) -> Run:
    made = _prepare(folder, place, **settings)
    made.trainer.train()
    return made


def _error(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT of dropout 0.1 in it."""
    folder = tmp_path_factory.mktemp("exact")
    tiny_models.minilm(folder / "model")
    return folder


def _bf16(rank: int, size: int, folder: Path) -> dict[str, Any]:
    place, still = (rank, size), {"dropout": 0.0}
    library = {"step": "library", "arguments": {"mini_batch_size": 4}}
    truth = _train(folder, place, model=still)
    ours = _train(folder, place, model=still, precision="bf16", graph_memory=3e-4)
    theirs = _train(folder, place, model=still, precision="bf16", loss=library)
    exact = truth.gradients[0]
    return {
        "fp32": {*truth.seen},
        "bf16": {*ours.seen},
        "passes": [sum(graph == wanted for graph, *_ in ours.seen) for wanted in (False, True)],
        "recomputed": ours.logs[0]["recomputed_share"],
        "library": _error(_train(folder, place, model=still, loss=library).gradients[0], exact),
        "errors": (_error(ours.gradients[0], exact), _error(theirs.gradients[0], exact)),
    }


@pytest.mark.parametrize("size", [1, 2])
def test_both_passes_run_in_bf16_and_the_gradient_is_as_close_to_fp32_as_the_librarys(folder: Path, size: int) -> None:
    """Under DDP all but the last micro-batch run on the unwrapped model, which must be under autocast too."""
    for seen in run(_bf16, size, size, folder):
        half, single = torch.bfloat16, torch.float32
        assert {inside for _, inside, _ in seen["fp32"]} == {single}
        assert {(graph, inside) for graph, inside, _ in seen["bf16"]} == {(False, half), (True, half)}
        assert len({embedding for _, _, embedding in seen["bf16"]}) == 1, "both passes hand over one dtype"
        assert min(seen["passes"]) >= 1 and 0 < seen["recomputed"] < 1, "none, kept and replayed graphs"
        ours, theirs = seen["errors"]
        assert seen["library"] < 1e-5
        assert 1e-4 < ours <= 2 * theirs, (ours, theirs)


def _checkpointing(rank: int, size: int, folder: Path) -> tuple[list[float], list[float]]:
    """Errors of the gradient with checkpointing, and shares of tokens computed again, with none and some kept."""
    errors, shares = [], []
    for dropout in (0.0, 0.3):
        common = {"double": True, "model": {"dropout": dropout}}
        truth = _train(folder, (rank, size), **common).gradients[0]
        for memory in (0.0, 1.5e-4):
            ours = _train(folder, (rank, size), **common, gradient_checkpointing=True, graph_memory=memory)
            assert ours.trainer.model[0].auto_model.is_activation_checkpointing
            errors.append(_error(ours.gradients[0], truth))
            shares.append(ours.logs[0]["recomputed_share"])
    assert _error(_train(folder, (rank, size), double=True, model={"dropout": 0.0}).gradients[0], truth) > 0.1
    return errors, shares


@pytest.mark.parametrize("size", [1, 2])
def test_gradient_checkpointing_changes_neither_the_gradient_nor_the_dropout(folder: Path, size: int) -> None:
    for errors, (none, some, *_) in run(_checkpointing, size, size, folder):
        assert len(errors) == 4 and max(errors) <= 1e-12, errors
        assert none == 1 and 0 < some < 1


def _clipping(rank: int, size: int, folder: Path) -> tuple[float, float, float, float]:
    still = {"double": True, "model": {"dropout": 0.0}}
    truth = _train(folder, (rank, size), loss={"step": "library"}, **still).gradients[0]
    clipped = _train(folder, (rank, size), max_grad_norm=0.01, **still)
    free = _train(folder, (rank, size), **still)
    whole = float(clipped.logs[0]["grad_norm"]), float(free.logs[0]["grad_norm"])
    return float(truth.norm()), *whole, _error(clipped.gradients[0], truth * 0.01 / truth.norm())


@pytest.mark.parametrize("size", [1, 2])
def test_the_logged_norm_is_that_of_the_true_gradient_and_clipping_scales_it(folder: Path, size: int) -> None:
    for truth, clipped, free, error in run(_clipping, size, size, folder):
        assert truth > 0.1
        assert clipped == pytest.approx(truth, rel=1e-6) and free == pytest.approx(truth, rel=1e-6)
        assert error < 1e-5  # torch adds 1e-6 to the norm that it divides by


def _fp16(rank: int, size: int, folder: Path, scale: float) -> tuple[Run, list[tuple[bool, float]]]:
    """fp16 as accelerate sets it up on a GPU, with the CPU's scaler; after each step whether the weights are as at the
    start, and the scale."""
    made = _prepare(folder, (rank, size), model={"dropout": 0.0}, precision="fp16", max_steps=3)
    accelerator, start = made.trainer.accelerator, made.weights
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-30)
    accelerator.native_amp, accelerator.scaler = True, scaler
    states: list[tuple[bool, float]] = []

    class Steps(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            states.append((torch.equal(made.weights, start), scaler.get_scale()))

    made.trainer.add_callback(Steps())
    made.trainer.train()
    return made, states


def _scaled(rank: int, size: int, folder: Path) -> dict[str, Any]:
    exact = _train(folder, (rank, size), model={"dropout": 0.0}).gradients[0]
    right, states = _fp16(rank, size, folder, 2.0**10)
    skipping, skipped = _fp16(rank, size, folder, 2.0**40)
    return {
        "inside": {inside for _, inside, _ in right.seen},
        "errors": [_error(right.gradients[0], exact), _error(skipping.gradients[1], exact)],
        "norm": float(right.logs[0]["grad_norm"]) / float(exact.norm()),
        "rates": [[round(log["learning_rate"], 6) for log in r.logs] for r in (right, skipping)],
        "states": [states, skipped],
        "lines": (folder / f"run-{rank}" / "metrics.jsonl").read_text() if rank == 0 else "",
    }


@pytest.mark.parametrize("size", [1, 2])
def test_fp16_unscales_to_the_true_gradient_and_an_overflow_skips_the_step(folder: Path, size: int) -> None:
    for seen in run(_scaled, size, size, folder):
        assert seen["inside"] == {torch.float16}
        assert max(seen["errors"]) < 0.01 and seen["norm"] == pytest.approx(1, rel=0.01)
        assert seen["states"] == [[(False, 2.0**10)] * 3, [(True, 2.0**10), (False, 2.0**10), (False, 2.0**10)]]
        assert seen["rates"] == [[0.1, 0.066667, 0.033333], [0.1, 0.1, 0.066667]], "the schedule waits for the step"
        for line in seen["lines"].splitlines():
            json.loads(line, parse_constant=pytest.fail)  # Infinity is no JSON


def _not_a_number(rank: int, size: int, folder: Path) -> str:
    made = _prepare(folder, (rank, size))
    with torch.no_grad():
        unused = made.trainer.model[0].auto_model.embeddings.word_embeddings.weight
        unused[made.trainer.model.tokenizer.convert_tokens_to_ids("kidney")] = torch.nan
    with pytest.raises(UserError) as caught:
        made.trainer.train()
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2])
def test_rows_that_are_not_finite_are_named_by_all_ranks_alike(folder: Path, size: int) -> None:
    rows = [n + 1 for n, row in enumerate(_rows(16).to_list()) if "kidney" in " ".join(row.values())]
    assert 1 < len(rows) <= 5
    for line in run(_not_a_number, size, size, folder):
        assert f"step 1: non-finite loss, the embeddings of row {', '.join(map(str, rows))} are not finite" in line


def _budget(rank: int, size: int, folder: Path, ends: str) -> dict[str, Any]:
    """Three steps with kept graphs as memory allows, against none; rank 1 has less memory, or none left in step 3."""
    common = {"max_steps": 3, "rows": 32, "global_batch_size": 32}
    none = _train(folder, (rank, size), **common)
    made = _prepare(folder, (rank, size), **common, graph_memory="auto" if ends == "auto" else 1.0)
    if ends == "auto":
        available = 5e6 if rank else 5e7
        psutil.virtual_memory = lambda: SimpleNamespace(available=available)
    else:
        exhausted: list[bool] = []

        def exhaust(*_: Any) -> None:
            kept = sum(graph for graph, *_ in made.seen[made.marks[-1] :])
            if rank == size - 1 and made.trainer.state.global_step == 2 and kept == 2 and not exhausted:
                exhausted.append(True)
                raise torch.OutOfMemoryError("as CUDA says it")

        made.trainer.model[0].register_forward_hook(exhaust)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        made.trainer.train()
    passes = [[graph for graph, *_ in made.seen[a:b]] for a, b in itertools.pairwise([*made.marks, None])]
    return {
        "same": all(torch.equal(a, b) for a, b in zip(made.gradients, none.gradients, strict=True)),
        "forwards": [len(p) for p in passes],
        "first": [p.count(False) for p in passes],
        "recomputed": [round(log["recomputed_share"], 3) for log in made.logs],
        "said": [line for line in out.getvalue().splitlines() if "graph" in line],
    }


@pytest.mark.parametrize("size", [1, 2])
def test_the_memory_left_after_a_step_goes_to_kept_graphs_alike_on_all_ranks(folder: Path, size: int) -> None:
    ranks = run(_budget, size, size, folder, "auto")
    assert len({(*seen["forwards"], *seen["first"], *seen["recomputed"]) for seen in ranks}) == 1
    for rank, seen in enumerate(ranks):
        assert seen["same"]
        assert seen["recomputed"][0] == 1 and seen["recomputed"][1] == seen["recomputed"][2] < 1
        free = 5e7 / 2 if size == 1 else 5e6 / 2 / size
        line = f"graph memory: {free / 2**30:.3g} GiB a process for kept graphs (train.graph_memory=auto)"
        assert seen["said"] == ([] if rank else [line])


@pytest.mark.parametrize("size", [1, 2])
def test_kept_graphs_that_do_not_fit_are_dropped_on_all_ranks_and_the_step_is_done_again(
    folder: Path, size: int
) -> None:
    for rank, seen in enumerate(run(_budget, size, size, folder, "full")):
        assert seen["same"]
        assert seen["recomputed"][0] == seen["recomputed"][1] < 1 and seen["recomputed"][2] == 1
        line = "step 3: out of memory with kept graphs; none is kept from here on"
        assert seen["said"] == ([] if rank else [line])


def _counted(rank: int, size: int, folder: Path) -> list[dict[str, float]]:
    made = _prepare(folder, (rank, size), model={"dropout": 0.0})
    measured: list[tuple[int, ...]] = []  # texts, length, real tokens, squared lengths of each forward

    def note(_: Any, inputs: Any) -> None:
        mask = inputs[0]["attention_mask"]
        measured.append((*mask.shape, int(mask.sum()), int(mask.sum(1).square().sum()), torch.is_grad_enabled()))

    made.trainer.model.register_forward_pre_hook(note)
    flops.device_peak = lambda *_: 1e12  # this CPU stands for a GPU that is known
    made.trainer.train()
    sums = torch.zeros(4, dtype=torch.float64)
    for texts, length, real, squares, graph in measured:
        sums += torch.tensor([0, 0, texts * length, 0] if graph else [real, texts * length, 0, squares])
    if size > 1:
        torch.distributed.all_reduce(sums)
    return [dict(zip(("real", "padded", "again", "squares"), sums.tolist(), strict=True)), made.logs[0]]


@pytest.mark.parametrize("size", [1, 2])
def test_logged_tokens_are_those_that_went_through_the_encoder(folder: Path, size: int) -> None:
    parameters = 2 * (4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32) + 2 * 32
    for counted, log in run(_counted, size, size, folder):
        assert log["padded_over_real"] == pytest.approx(counted["padded"] / counted["real"])
        assert log["recomputed_share"] == pytest.approx(counted["again"] / counted["padded"])
        done = 6 * parameters * counted["real"] + 12 * 2 * 32 * counted["squares"]
        seconds = counted["real"] / log["real_tokens_per_s"]
        assert log["mfu"] == pytest.approx(done / seconds / 1e12 / size)


def _held_out_loss(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """The loss of two held-out batches of 7 of 20 rows every second step, and cross-entropy with the same weights."""
    common = {"double": True, "model": {"dropout": 0.3}, "max_steps": 5, "logging_steps": 5}
    without = _train(folder, (rank, size), **common)
    evaluate = {"loss_every": 2, "loss_batch_size": 7, "batch_tokens": 60}
    made = _prepare(folder, (rank, size), evaluate=evaluate, **common)
    model, truths = made.trainer.model, {}

    class Truth(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            assert model.training
            by_dim = torch.zeros(2, dtype=torch.float64)
            quiet = copy.deepcopy(model).eval()
            for start in (0, 7):
                rows = _held_out()[start : start + 7]
                inputs = [quiet.preprocess(rows[column]) for column in ("anchor", "positive")]
                with torch.no_grad():
                    columns = [quiet(i)["sentence_embedding"] for i in inputs]
                for k, dim in enumerate((32, 8)):
                    a, p = (torch.nn.functional.normalize(c[:, :dim], dim=1) for c in columns)
                    by_dim[k] += torch.nn.functional.cross_entropy(20 * a @ p.T, torch.arange(7)) / 2
            truths[state.global_step] = [float(by_dim.sum()), *by_dim.tolist()]

    made.trainer.add_callback(Truth())
    made.trainer.train()
    names = ("eval_loss", "eval_loss_32", "eval_loss_8")
    logged = {log["step"]: [log[name] for name in names] for log in made.trainer.state.log_history if names[0] in log}
    lines = (folder / f"run-{rank}" / "metrics.jsonl").read_text().splitlines()[-3:] if rank == 0 else []
    return {
        "same": all(torch.equal(a, b) for a, b in zip(made.gradients, without.gradients, strict=True)),
        "logged": logged,
        "truths": truths,
        "lines": [json.loads(line) for line in lines],
    }


@pytest.mark.parametrize("size", [1, 2])
def test_the_held_out_loss_is_that_of_its_batches_and_leaves_the_training_as_it_was(folder: Path, size: int) -> None:
    for rank, seen in enumerate(run(_held_out_loss, size, size, folder)):
        assert seen["same"]
        assert {*seen["logged"]} == {2, 4}
        for step, values in seen["logged"].items():
            assert values == pytest.approx(seen["truths"][step], rel=1e-10)
        if rank == 0:
            assert [line["step"] for line in seen["lines"]] == [2, 4, 5]
            by_dim = dict(zip(("32", "8"), seen["truths"][4][1:], strict=True))
            assert seen["lines"][1]["eval_loss_by_dim"] == pytest.approx(by_dim)


def _packed(rank: int, size: int, folder: Path) -> tuple[float, dict[str, float], dict[str, float]]:
    common = {"double": True, "model": {"path": str(folder / "qwen3"), "dropout": 0.0}, "micro_batch_tokens": 400}
    padded = _train(folder, (rank, size), **common)
    flat = _train(folder, (rank, size), **common, flat=True, graph_memory=1.0)
    return _error(flat.gradients[0], padded.gradients[0]), padded.logs[0], flat.logs[0]


@pytest.mark.parametrize("size", [1, 2])
def test_texts_packed_without_padding_have_the_same_gradient(folder: Path, size: int) -> None:
    tiny_models.qwen3_embedding(folder / "qwen3")
    for error, padded, flat in run(_packed, size, size, folder):
        assert error < 1e-5  # Qwen3 turns positions in fp32, and left padding moves them
        assert flat["padded_over_real"] == 1 < padded["padded_over_real"]
        assert 0 < flat["recomputed_share"] < padded["recomputed_share"] == 1
