"""The int8 file of a bundle: of several ways the fastest that keeps retrieval on one half of the queries, judged on
the other.

Activations are quantised where they are used, to 8 bits by one scale a text batch ("tensor"), by constants that were
seen on the run's own texts ("static") or by one scale a token ("row"); weights by one scale a column, the embedding
table by one a row. Smoothed ones (Xiao et al., 2022, arXiv:2211.10438) move the spread of channels into the weights.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from launch.config_evaluate import BATCH_TOKENS
from launch.errors import CheckFailed
from launch.world import read_world
from trainer import metrics
from trainer.embedder import BundleEmbedder
from trainer.evaluation import MAIN_METRIC, Scored, score
from trainer.export.encoder import Encoder
from trainer.export.onnx import OUTPUTS
from trainer.export.parity import cpu
from trainer.export.precisions import ancestors, save
from trainer.retrieval import RetrievalSet

LENGTHS = (8, 32, 128, 512)
RECIPES: dict[str, dict[str, Any]] = {
    "tensor": {"activations": "tensor"},
    "static": {"activations": "static"},
    "row": {"activations": "row"},
    "row, narrowing layers in fp32": {"activations": "row", "keeps_narrowing": True},
    "blocks of 32": {"activations": None},
}
_UNSEEN = 3.0  # of the rule of three
_TEXTS = 64  # of each kind whose activations are looked at
_Tokens = list[tuple[np.ndarray, np.ndarray]]


def write_int8(
    source: Path, target: Path, ranges: dict[str, np.ndarray], activations: str | None, keeps_narrowing: bool = False
) -> None:
    """Write the graph `source` with int8 weights; `ranges` are those of `activation_ranges`, of this graph.

    `keeps_narrowing` leaves layers with more inputs than outputs, of which transformers have one a block, in fp32;
    activations None makes MatMulNBits, whose blocks have a scale each on both sides.
    """
    model = onnx.load(source)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    layers = _layers(graph)
    nodes, constants, quantised = [], {}, {}

    def add(operator: str, inputs: list[str], output: Any, **attributes: Any) -> Any:
        outputs = [output] if isinstance(output, str) else output
        nodes.append(helper.make_node(operator, inputs, outputs, name=f"quantised {outputs[0]}", **attributes))
        return output

    def constant(name: str, value: Any) -> str:
        constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    for node in graph.node:
        table = weights.get(node.input[0]) if node.op_type == "Gather" and node.input[1] == "input_ids" else None
        if table is not None:
            _looked_up(table, node.output[0], add, constant)
            continue
        weight = weights[node.input[1]] if node.name in layers else None
        if weight is None or activations is None or (keeps_narrowing and weight.dims[0] > weight.dims[1]):
            nodes.append(node)
            continue
        x = node.input[0]
        if x not in quantised:
            smooth, given = np.ones(weight.dims[0]), x
            if activations != "tensor":
                smooth = _smoothing(ranges[x], [weights[name] for layer, name in layers.values() if layer == x])
                given = add("Mul", [x, constant(f"{x}.smooth", (1 / smooth).astype(np.float32))], f"{x}.smoothed")
            largest = float((ranges[x] / smooth).max()) if activations == "static" else 0.0
            quantised[x] = (smooth, *_quantised(given, x, activations, largest, add, constant))
        smooth, q, a_scale, zero, row_scale = quantised[x]
        integers, scale = int8_columns(_values(weight).astype(np.float64) * smooth[:, None])
        parts = [constant(f"{node.name}.int8", integers), a_scale, constant(f"{node.name}.scale", scale), zero]
        out = f"{node.output[0]}.unscaled" if row_scale else node.output[0]
        add("MatMulIntegerToFloat", [q, *parts], out, domain="com.microsoft")
        if row_scale:
            add("Mul", [out, row_scale], node.output[0])
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *constants.values()])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    if activations is None:
        from onnxruntime.quantization import matmul_nbits_quantizer as library

        library.logger.setLevel(logging.WARNING)  # it tells two lines about every node

        blocks = library.MatMulNBitsQuantizer(model, bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
        blocks.process()
        model = blocks.model.model  # pyright: ignore
    save(model, target)


def _looked_up(table: onnx.TensorProto, out: str, add: Callable[..., str], constant: Callable[..., str]) -> None:
    """Add the nodes that look `out` up in an int8 table whose rows have a scale each."""
    values = _values(table)
    scale = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-12) / 127
    rows = constant(f"{table.name}.int8", np.round(values / scale).astype(np.int8))
    scales = constant(f"{table.name}.scale", scale.astype(np.float32))
    found = [add("Gather", [name, "input_ids"], f"{out}.{i}") for i, name in enumerate((rows, scales))]
    add("Mul", [add("Cast", [found[0]], f"{out}.float", to=TensorProto.FLOAT), found[1]], out)


def _layers(graph: onnx.GraphProto) -> dict[str, tuple[str, str]]:
    """Node -> names of input and weight [in, out] of each linear layer of the encoder."""
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    encoder = ancestors(graph, OUTPUTS[0])
    found = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in matrices]
    return {node.name: (node.input[0], node.input[1]) for node in found if node.name in encoder}


def _values(tensor: onnx.TensorProto) -> np.ndarray:
    return np.asarray(numpy_helper.to_array(tensor))


def _smoothing(largest: np.ndarray, weights: list[onnx.TensorProto]) -> np.ndarray:
    """What inputs are divided by, [in]: half of their channels' spread, as a power, goes into the weights."""
    rows = np.max([np.abs(_values(weight)).max(axis=1) for weight in weights], axis=0)
    return np.sqrt(np.maximum(largest, 1e-5) / np.maximum(rows, 1e-5))


def activation_ranges(source: Path, tokens: _Tokens, encoder: Encoder) -> dict[str, np.ndarray]:
    """Largest absolute value of each channel, [in], that each linear layer of the graph is given by these texts."""
    import onnxruntime

    model = onnx.load(source)
    inputs = list(dict.fromkeys(x for x, _ in _layers(model.graph).values()))
    known = {output.name for output in model.graph.output}
    new = [helper.make_tensor_value_info(x, TensorProto.FLOAT, None) for x in inputs if x not in known]
    model.graph.output.extend(new)
    ranges: dict[str, np.ndarray] = {}
    with TemporaryDirectory() as folder:
        save(model, Path(folder) / "watched.onnx")
        session = onnxruntime.InferenceSession(Path(folder) / "watched.onnx", providers=["CPUExecutionProvider"])
        for row in tokens:
            for x, values in zip(inputs, session.run(inputs, encoder.pad([row])), strict=True):
                rows: Any = values
                seen = np.abs(rows).reshape(-1, rows.shape[-1]).max(axis=0)
                ranges[x] = np.maximum(ranges.get(x, 0), seen)
    return ranges


def _quantised(
    given: str, x: str, how: str, most: float, add: Callable[..., str], constant: Callable[[str, Any], str]
) -> tuple[str, str, str, str | None]:
    """Add nodes that make uint8 of `given`; names of result, scale, zero point and scale of rows, if there is one."""
    if how == "tensor":
        names = [f"{x}.{part}" for part in ("uint8", "scale", "zero")]
        add("DynamicQuantizeLinear", [given], names)
        return names[0], names[1], names[2], None
    zero = constant("middle", np.uint8(128))
    if how == "static":
        scale = constant(f"{x}.scale", np.float32(max(most, 1e-12) / 127))
        return add("QuantizeLinear", [given, scale, zero], f"{x}.uint8"), scale, zero, None
    largest = add("ReduceMax", [add("Abs", [given], f"{x}.abs"), constant("last axis", np.array([-1]))], f"{x}.max")
    scaled = add("Mul", [largest, constant("1/127", np.float32(1 / 127))], f"{x}.scaled")
    row_scale = add("Add", [scaled, constant("not 0", np.float32(1e-12))], f"{x}.row_scale")
    # A cast cuts off what follows the point: with a half it rounds.
    shifted = add("Add", [add("Div", [given, row_scale], f"{x}.div"), constant("128.5", np.float32(128.5))], f"{x}.add")
    return add("Cast", [shifted], f"{x}.uint8", to=TensorProto.UINT8), constant("one", np.float32(1)), zero, row_scale


def int8_columns(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [in, out] and the float32 scale [out] of weights [in, out].

    CPUs without VNNI add the products of two neighbouring inputs (up to 255 each) in 16 bits and cut off what is more:
    weights of one sign in such a pair stay below 129 together, so that every CPU computes the same.
    """
    pairs = len(values) // 2
    even, odd = values[0::2][:pairs], values[1::2]
    together = np.where(even * odd > 0, np.abs(even + odd), 0.0).max(axis=0, initial=0.0)
    scale = np.maximum(np.maximum(np.abs(values).max(axis=0), together), 1e-12) / 127
    return np.round(values / scale).astype(np.int8), scale.astype(np.float32)


def choose_int8(
    folder: Path,
    onnx_files: dict[str, str],
    whole: Encoder,
    scored: Scored,
    retrieval: RetrievalSet,
    most: float,
    check: Callable[[Encoder], Any],
) -> tuple[dict[str, Any], tuple[Any, Scored] | None]:
    """Write `onnx_files["int8"]` if a recipe loses at most the share `most` of fp32's nDCG@10.

    Returns what was found and, where the file is written, what `check` returned for it and what it reached.

    `whole` embeds with the fp32 file, `scored` is what that reached on `retrieval`. Queries are split in the order of
    the set. On the even ones the fastest recipe within `most` is chosen, on the odd ones its paired 95 % interval is
    judged: outcome is passed, failed or not decidable. A recipe for which `check` raises CheckFailed is not chosen.
    """
    source, target = folder / onnx_files["fp32"], folder / onnx_files["int8"]
    texts = {"query": retrieval.queries, "document": retrieval.documents}
    shown = [row for kind in texts for row in whole.tokenize(texts[kind][:_TEXTS], kind)]
    ranges = activation_ranges(source, [row for row in shown if len(row[0])], whole)
    odd = np.arange(len(retrieval.queries)) % 2 == 1
    full = "float32", whole.width
    reference = scored.by_metric[full][MAIN_METRIC]
    found = [_entry("fp32", source, _milliseconds(folder, "fp32"), scored, ~odd)]
    tried: dict[str, tuple[Any, Scored]] = {}
    for name, recipe in RECIPES.items():
        write_int8(source, target, ranges, **recipe)
        quantised, part, why = BundleEmbedder(folder, "int8"), None, None
        try:
            part = check(quantised.encoder)
        except CheckFailed as error:
            why = str(error).rpartition(";")[0]
        scores = score(quantised, retrieval, scored.dims, batch_tokens=BATCH_TOKENS, world=read_world({}))
        tried[name] = part, scores
        entry = _entry(name, target, _milliseconds(folder, "int8"), scores, ~odd)
        loss = _loss(reference, scores.by_metric[full][MAIN_METRIC], ~odd)
        if why is None and loss["share"] > most:
            why = f"loses {loss['share']:.2%}, allowed {most:.2%}"
        found.append(entry | {"loss": loss, "why": why})
    target.unlink()
    facts: dict[str, Any] = {
        "metric": MAIN_METRIC,
        "most": most,
        "queries": {"chosen on": int((~odd).sum()), "judged on": int(odd.sum())},
        "documents": len(retrieval.documents),
        "set": retrieval.fingerprint,
        "cpu": cpu(),
        "tried": found,
        "chosen": None,
        "outcome": "failed",
        "judged": None,
    }
    written = None
    within = [entry for entry in found[1:] if entry["why"] is None]
    if within and odd.any():
        # By the geometric mean: a length counts as much as any other, however long its texts take.
        name = min(within, key=lambda entry: np.log([*entry["milliseconds"].values()]).mean())["recipe"]
        for entry in within:
            entry["why"] = "chosen" if entry["recipe"] == name else f"slower than {name}"
        judged = _loss(reference, tried[name][1].by_metric[full][MAIN_METRIC], odd)
        low, high = judged["ci95"]
        outcome = outcome_of(low, high, int(odd.sum()), most)
        facts |= {"chosen": name, "outcome": outcome, "judged": judged}
        if outcome == "passed":
            write_int8(source, target, ranges, **RECIPES[name])
            written = tried[name]
    return facts | {"told": told(facts)}, written


def outcome_of(low: float, high: float, queries: int, most: float) -> str:
    """passed, failed or not decidable: whether a loss of [low, high] on so many queries is within `most`.

    Where no query changed, the interval is a point, however few they are: with 95 % confidence up to 3 / queries of all
    are of a kind that is not among them (rule of three, Hanley and Lippman-Hand 1983), and each may lose everything.
    """
    if low > most:
        return "failed"
    return "passed" if max(high, _UNSEEN / queries) <= most else "not decidable"


def told(facts: dict[str, Any]) -> str:
    """The findings of `choose_int8` as one line."""
    most, judged = facts["most"], facts["judged"]
    if judged is None:
        reasons = "; ".join(f"{entry['recipe']} {entry['why'] or 'needs two queries'}" for entry in facts["tried"][1:])
        return f"int8: not written, no recipe is within {most:.2%} of {facts['metric']}: {reasons}"
    low, high = judged["ci95"]
    count = facts["queries"]["judged on"]
    loss = f"{facts['metric']} loss {judged['share']:.2%} [{low:.2%}, {high:.2%}]"
    text = f"{facts['chosen']}: {loss} on {count:,} queries that did not choose it, allowed {most:.2%}"
    if facts["outcome"] != "not decidable":
        return f"int8: {'' if facts['outcome'] == 'passed' else 'not written, '}{text}"
    gap = most - judged["share"]
    enough = max(2 * count * ((high - judged["share"]) / gap) ** 2, 2 * _UNSEEN / most) if gap > 0 else 0
    enough = f"some {enough:,.0f} queries in all would do" if enough else ""
    return f"int8: not written, not decidable: {text}; {enough or 'more queries may tell'}"


def _loss(whole: np.ndarray, scores: np.ndarray, which: np.ndarray) -> dict[str, Any]:
    """Share of the mean of `whole` that is lost, with its paired 95 % interval."""
    outcome = metrics.compare(scores[which], whole[which])
    mean = max(float(whole[which].mean()), 1e-12)
    share, low, high = (round(float(v[0]) / mean, 6) for v in (outcome.difference, outcome.low, outcome.high))
    return {"share": share, "ci95": [low, high]}


def _entry(name: str, path: Path, times: dict[str, float], scored: Scored, which: np.ndarray) -> Any:
    ndcg = {str(d): round(float(v[MAIN_METRIC][which].mean()), 6) for (_, d), v in scored.by_metric.items()}
    return {"recipe": name, "bytes": path.stat().st_size, "milliseconds": times, "ndcg_by_dim": ndcg}


def _milliseconds(folder: Path, precision: str) -> dict[str, float]:
    """Of one text on one thread, by its tokens: the best of some runs."""
    timed, found = Encoder(folder, threads=1, precision=precision), {}
    for length in [length for length in LENGTHS if length <= max(timed.max_length.values())]:
        ids = np.arange(length) % 7 + 1
        runs = []
        while sum(runs) < 0.3 or len(runs) < 3:
            began = time.perf_counter()
            timed.run([(ids, np.zeros_like(ids))])
            runs.append(time.perf_counter() - began)
        found[str(length)] = round(min(runs) * 1000, 3)
    return found
