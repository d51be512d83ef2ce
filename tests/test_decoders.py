"""Decoder embedding models: Qwen3-Embedding's shapes without weights, and a small one trained for real.

`python -m pytest tests/test_decoders.py`. The 0.6 B and 8 B shapes lie on the meta device, sharded by accelerate over
a process group of 8 that sends nothing. The small one has left padding, last-token pooling and gradient checkpointing;
its truth is sentence-transformers' own loss in fp64 in one process.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3Model

from tests import tiny_models
from tests.distributed import Backend, device, run
from tests.engines import BACKENDS, as_torchrun, distance, flat, prepared, ranks_of, whole
from trainer import flops
from trainer.batching import Plan, make_plan
from trainer.engines import ZeRO, engine_of
from trainer.gradcache import GradCache
from trainer.infonce import Objective
from trainer.tokens import Padder
from trainer.weights import name_layers

RANKS = 8
# config.json of Qwen/Qwen3-Embedding-0.6B and -8B, and the parameters that their model cards count.
SHAPES: dict[str, dict[str, int]] = {
    "0.6B": {
        "vocab_size": 151_669,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "8B": {
        "vocab_size": 151_665,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
HEAD, KEY_VALUE_HEADS = 128, 8
PARAMETERS = {"0.6B": 595_776_512, "8B": 7_567_295_488}
WIDTH, ROWS, LONGEST = tiny_models.HIDDEN, 13, 40
OBJECTIVE = Objective(scale=20.0, dims=[32, 16, 8], weights=[1.0, 0.7, 0.4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-Embedding."""
    return tiny_models.qwen3_embedding(tmp_path_factory.mktemp("decoder") / "model")


def _without_weights(folder: Path, size: str) -> SentenceTransformer:
    """The small model's tokenizer, pooling and normalisation around an encoder of this size on the meta device."""
    model = SentenceTransformer(str(folder), device="cpu")
    config = Qwen3Config(
        **SHAPES[size], head_dim=HEAD, num_key_value_heads=KEY_VALUE_HEADS, attn_implementation="eager"
    )
    with torch.device("meta"):
        model[0].model = Qwen3Model(config)
    pooling: Any = model[1]
    pooling.embedding_dimension = pooling.pooling_output_dimension = config.hidden_size
    return model.train()


def _written_out(size: str) -> tuple[int, int]:
    """Parameters of one layer, and of all that is outside of the layers, from the architecture."""
    shape = SHAPES[size]
    width, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    attention = 2 * width * HEAD * (heads + KEY_VALUE_HEADS) + 2 * HEAD  # query and output, key and value, two norms
    return attention + 3 * width * inner + 2 * width, shape["vocab_size"] * width + width


@contextmanager
def _fake_group(size: int) -> Iterator[None]:
    """This process as rank 0 of `size` that do not exist: collectives return at once with whatever is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fsdp2(model: SentenceTransformer) -> Any:
    """The model as accelerate shards it by configs/accelerate/fsdp2.yaml and our rule. All ranks must call."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    name_layers(plugin, model)
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=False, device=device()
    )
    return fsdp2_prepare_model(accelerator, model)


def _groups(model: Any) -> dict[str, Counter[str]]:
    """Of each FSDP group, by its module's name: parameters, and bytes of its weights on this rank."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            (group,) = module._get_fsdp_state()._fsdp_param_groups
            parts: list[Any] = [p.sharded_param for p in group.fsdp_params]
            assert all(isinstance(part, DTensor) for part in parts)
            here = sum(part.to_local().numel() * part.element_size() for part in parts)
            found[name] = Counter(parameters=sum(part.numel() for part in parts), bytes=here)
    return found


def _sharded(_: int, folder: Path, size: str) -> dict[str, Counter[str]]:
    dist.destroy_process_group()
    with _fake_group(RANKS):
        model = _without_weights(folder, size)
        groups = _groups(_fsdp2(model))
        assert all(p.is_meta for p in model.parameters())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)  # which the helper destroys
    return groups


@pytest.mark.parametrize("size", SHAPES)
def test_fsdp2_makes_a_group_of_each_decoder_layer_and_shards_every_parameter(folder: Path, size: str) -> None:
    (groups,) = run(_sharded, 1, folder, size)
    layer, outside = _written_out(size)
    layers = SHAPES[size]["num_hidden_layers"]
    # Embeddings and the last norm are the root's, which stays gathered from the forward to the backward.
    expected = {f"0.model.layers.{i}": layer for i in range(layers)} | {"": outside}
    assert {name: group["parameters"] for name, group in groups.items()} == expected
    total = sum(expected.values())
    assert total == PARAMETERS[size]
    # fp32; rank 0 has the larger part where 8 do not divide the rows of a weight.
    held = sum(group["bytes"] for group in groups.values())
    assert 0 <= held - 4 * total / RANKS <= 4 * SHAPES[size]["hidden_size"] * len(groups)


def test_an_encoder_that_names_no_layers_is_refused(folder: Path) -> None:
    from launch.errors import UserError

    model = SentenceTransformer(str(folder), device="cpu")
    model[0].auto_model._no_split_modules = None
    with pytest.raises(UserError, match="the encoder does not name its layers"):
        name_layers(SimpleNamespace(transformer_cls_names_to_wrap=None), model)


def _lengths(rows: int, longest: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, longest + 1, (rows, 2))


@pytest.mark.parametrize("size", SHAPES)
def test_every_micro_batch_of_a_plan_goes_through_the_shape(folder: Path, size: str) -> None:
    model = _without_weights(folder, size)
    padder, width = Padder(model), SHAPES[size]["hidden_size"]
    lengths, budget = _lengths(96, 512), 4096
    ids = np.arange(lengths.size).reshape(lengths.shape)
    plan = make_plan(ids, ids, lengths, world_size=RANKS, micro_batch_tokens=budget, masks=False)
    seen = Counter[int]()
    for rank in (0, RANKS - 1):
        for number, texts in enumerate(plan.micro_batches(rank)):
            seen.update(texts.tolist())
            features = padder([np.full(lengths.ravel()[text], 7, np.int32) for text in texts], "cpu")
            mask = features["attention_mask"]
            assert mask.numel() <= budget and mask[:, -1].all() and (mask.diff(dim=1) >= 0).all()
            assert (mask.sum(1).numpy() == lengths.ravel()[texts]).all()
            if number in (0, len(plan.cuts) - 2):  # the longest and the shortest; one of 8 B takes a second
                on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in features.items()}
                assert model(on_meta)["sentence_embedding"].shape == (len(texts), width)
    assert max(seen.values()) == 1 and len(plan.cuts) > 4


@pytest.mark.parametrize("length", [32, 2048])
@pytest.mark.parametrize("size", SHAPES)
def test_flops_are_those_that_torch_counts(folder: Path, size: str, length: int) -> None:
    model = _without_weights(folder, size)
    texts = 2
    ids = torch.zeros(texts, length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counted:
        model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"].sum().backward()
    known = flops.of_training(model)
    assert known is not None
    ours = known[0] * texts * length + known[1] * texts * length**2
    assert ours == pytest.approx(counted.get_total_flops(), rel=0.01)


class Texts:
    """Rows of an anchor and a positive in words, as both sides read them."""

    def __init__(self, model: SentenceTransformer) -> None:
        words = " ".join(tiny_models.SENTENCES).split()
        draw = np.random.default_rng(0)
        self.texts = [" ".join(draw.choice(words, draw.integers(1, 12))) for _ in range(2 * ROWS)]
        self._model, self._padder = model, Padder(model)
        self.tokens: list[np.ndarray] = []
        for text in self.texts:
            ids = model.preprocess([text])["input_ids"]
            self.tokens.append(ids[0].numpy().astype(np.int32))

    def plan(self, world_size: int, budget: int) -> Plan:
        ids = np.arange(2 * ROWS).reshape(ROWS, 2)
        lengths = np.array([len(tokens) for tokens in self.tokens])[ids]
        return make_plan(
            ids, ids, lengths, world_size=world_size, micro_batch_tokens=budget, overhead_tokens=1, masks=False
        )

    def features(self, numbers: np.ndarray) -> dict[str, Any]:
        """Ours."""
        return self._padder([self.tokens[number] for number in numbers], device())

    def columns(self) -> list[dict[str, Any]]:
        """Theirs: the library's own tokenizing and padding."""
        made = [self._model.preprocess(self.texts[column::2]) for column in (0, 1)]
        return [{k: v.to(device()) if isinstance(v, Tensor) else v for k, v in features.items()} for features in made]


def _truth(folder: Path) -> Tensor:
    """Gradient of ST's own loss in fp64, nothing checkpointed."""
    model = SentenceTransformer(str(folder), device=str(device())).double().train()
    cached = CachedMultipleNegativesRankingLoss(model, scale=OBJECTIVE.scale, mini_batch_size=4)
    loss = MatryoshkaLoss(model, cached, list(OBJECTIVE.dims), list(OBJECTIVE.weights))
    loss(Texts(model).columns(), torch.empty(0)).backward()
    return flat(p.grad for p in model.parameters())


def _train(rank: int, folder: Path, name: str) -> list[float]:
    """Errors of the gradient in fast and lean mode."""
    as_torchrun(rank)
    truth, errors = _truth(folder), []
    for mode in ("fast", "lean"):
        model = SentenceTransformer(str(folder), device="cpu").float().train()
        encoder: Any = model[0].auto_model
        encoder.gradient_checkpointing_enable({"use_reentrant": False})
        runs = Counter[str]()
        encoder.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.update(["layer"]))
        wrapper = _fsdp2(model) if name == "fsdp2" else prepared(name, model, (), 0.0)
        engine = engine_of(wrapper, lambda loss: loss.backward(), mode)
        seen: list[Tensor] = []
        if isinstance(engine, ZeRO):
            wrapper.step = lambda seen=seen, model=model: seen.append(whole(name, model, "grad"))
        texts = Texts(model)
        assert len({len(tokens) for tokens in texts.tokens}) > 10
        plan = texts.plan(dist.get_world_size(), LONGEST * 2)
        GradCache(engine, OBJECTIVE, seed=1).step(plan, texts.features, step=0)
        # Embedded, embedded again with a graph that keeps no layer, and each layer again in its backward.
        assert runs["layer"] == 3 * (len(plan.cuts) - 1) > 9, (runs, plan.cuts)
        errors.append(distance(seen[0] if seen else whole(name, model, "grad"), truth, truth))
    return errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_a_small_decoder_has_the_gradient_of_sentence_transformers(folder: Path, name: str, backend: Backend) -> None:
    for errors in run(_train, ranks_of(name, backend), folder, name, backend=backend):
        assert max(errors) <= 1e-5, errors
