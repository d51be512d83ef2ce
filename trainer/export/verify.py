"""Check a bundle where it is used: standard library, numpy, onnxruntime and tokenizers only.

`python -m trainer.export.verify DIR [--json]` runs in a process that cannot import torch. It checks every
hash, that nothing leaves the folder, and that stored embeddings of PyTorch come out again. Exit code 0, or 3
with one line per problem. A bundle is treated as hostile: no file of it is executed.
"""

import argparse
import base64
import json
import mmap
import os
import posixpath
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch.errors import EXIT_CHECK, EXIT_DONE, CheckFailed, UserError
from launch.files import sha256_of
from trainer.export.encoder import KINDS, MANIFEST, TOKENIZER, Encoder, first_line, read_json, read_manifest, truncate

SEAL, PARITY, SIGNATURE = "manifest.sha256", "parity.json", "model.sig"
# Absolute bound per component and precision. One CPU's fp32 kernels stay within 1e-5 of PyTorch's (the gate at export);
# other instruction sets sum in another order, which was seen to cost less than another factor of 10. The other two
# are twice what the export allows.
GOLDEN_BOUNDS = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.5}
# Built into every onnxruntime; any other domain needs a library that is loaded from somewhere.
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
# Wire format of onnx.proto: which field of which message leads to a tensor, an operator set or a string.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute", 7: "=domain"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "opset": {1: "=domain"},
    "tensor": {13: "entry"},
    "entry": {1: "=key", 2: "=value"},
}


@dataclass
class Report:
    """Outcome of a verification; `problems` is empty when the bundle holds."""

    folder: str
    problems: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    golden_texts: int = 0
    golden_max_abs: dict[str, float] = field(default_factory=dict)
    """Precision -> largest difference per component."""
    golden_bounds: dict[str, float] = field(default_factory=lambda: GOLDEN_BOUNDS)
    dims: list[int] = field(default_factory=list)
    seconds: float = 0.0


def verify(folder: str | Path) -> list[str]:
    """Every reason not to use the bundle, one line each; empty if it holds. A bad bundle never raises."""
    return inspect_bundle(folder).problems


def inspect_bundle(folder: str | Path) -> Report:
    """Verify a bundle and keep what was measured on the way."""
    started = time.monotonic()
    report = Report(folder=str(folder))
    root = Path(folder)
    try:
        manifest = read_manifest(root)
        report.problems += _seal_problems(root)
        report.problems += _file_problems(root, manifest, report)
        # Hashes that hold say only that the files are those of the manifest, which anybody can write.
        if not report.problems:
            for name in manifest["onnx"].values():
                report.problems += _graph_problems(root, name, manifest["files"])
        if not report.problems:
            report.dims = manifest["dims"]
            _check_golden(root, manifest, report)
    except (CheckFailed, UserError) as error:
        report.problems.append(str(error))
    except OSError as error:
        report.problems.append(f"{ascii(error.filename or folder)[1:-1]}: cannot be read: {error.strerror}")
    report.seconds = time.monotonic() - started
    return report


def _seal_problems(root: Path) -> list[str]:
    path = root / SEAL
    expected = f"{sha256_of(root / MANIFEST)}  {MANIFEST}\n".encode()
    if path.is_symlink() or not path.is_file() or path.stat().st_size != len(expected):
        return [f"{SEAL}: missing or malformed"]
    return [] if path.read_bytes() == expected else [f"{MANIFEST}: sha256 is not the one in {SEAL}"]


def _file_problems(root: Path, manifest: dict[str, Any], report: Report) -> list[str]:
    listed = manifest["files"]
    if needed := {*manifest["onnx"].values(), TOKENIZER, PARITY} - set(listed):
        return [f"{name}: not in {MANIFEST}, but needed" for name in sorted(needed)]
    problems = []
    inside = os.path.realpath(root) + os.sep
    for name, entry in listed.items():
        path = root / name
        if not os.path.realpath(path).startswith(inside):
            problems.append(f"{name}: leaves the folder through a link")
        elif not path.is_file():
            problems.append(f"{name}: missing" if not os.path.lexists(path) else f"{name}: not a regular file")
        elif (size := path.stat().st_size) != entry["bytes"]:
            problems.append(f"{name}: {size} bytes, {MANIFEST} says {entry['bytes']}")
        elif sha256_of(path) != entry["sha256"]:
            problems.append(f"{name}: sha256 is not the one in {MANIFEST}")
        else:
            report.files += 1
            report.bytes += size
    for folder, folders, files in os.walk(root, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            relative = Path(folder, name).relative_to(root).as_posix()
            if relative not in listed and relative not in (MANIFEST, SEAL, SIGNATURE):
                problems.append(f"{relative!r}: not in {MANIFEST}")
    return problems


def _raise(error: OSError) -> None:
    raise error


def _graph_problems(root: Path, name: str, listed: dict[str, Any]) -> list[str]:
    """Operator domains and external data of one ONNX file, read from its wire format without running it."""
    problems = []
    try:
        with (root / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for what, value in _strings(data):
                if what == "domain" and value not in _DOMAINS:
                    problems.append(f"{name}: operators of domain {value!a:.80} need a custom library")
                # Joined as onnxruntime does it: an absolute path stays one, and is in no manifest.
                if what == "location" and posixpath.join(posixpath.dirname(name), value) not in listed:
                    problems.append(f"{name}: keeps weights in {value!a:.80}, which is not in {MANIFEST}")
    except (ValueError, IndexError) as error:
        problems.append(f"{name}: not an ONNX file: {first_line(error)}")
    return sorted(set(problems))


def _strings(data: mmap.mmap) -> Iterator[tuple[str, str]]:
    """("domain", value) and ("location", value) of a serialised ModelProto; raises ValueError, IndexError."""
    waiting = [("model", 0, len(data))]
    while waiting:
        message, position, end = waiting.pop()
        texts: dict[str, str] = {}
        while position < end:
            tag, position = _varint(data, position)
            if tag >> 32:  # protobuf drops the upper bits of such a number, and reads another field than we would
                raise ValueError(f"number of a field beyond 32 bits at byte {position}")
            wire = tag & 7
            if wire == 2:
                size, position = _varint(data, position)
            elif wire == 0:
                _, position = _varint(data, position)
                continue
            else:
                size = {1: 8, 5: 4}.get(wire, -1)
            if size < 0 or position + size > end:
                raise ValueError(f"truncated or unknown field at byte {position}")
            inner = _MESSAGES[message].get(tag >> 3) if wire == 2 else None
            if inner is not None and inner.startswith("="):
                texts[inner[1:]] = data[position : position + size].decode("utf-8")
            elif inner is not None:
                waiting.append((inner, position, position + size))
            position += size
        if "domain" in texts:
            yield "domain", texts["domain"]
        if texts.get("key") == "location":
            yield "location", texts.get("value", "")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError(f"number of more than 64 bits at byte {position}")


def _check_golden(root: Path, manifest: dict[str, Any], report: Report) -> None:
    """Embed the texts of the certificate with every graph and compare with PyTorch's embeddings at every dim."""
    rows = read_golden(root, manifest["width"])
    report.golden_texts = len(rows)
    for precision in manifest["onnx"]:
        encoder, bound = Encoder(root, precision=precision), GOLDEN_BOUNDS[precision]
        report.golden_max_abs[precision] = 0.0
        try:
            for kind in KINDS:
                texts = [text for row_kind, text, _ in rows if row_kind == kind]
                if not texts:
                    continue
                expected = np.stack([vector for row_kind, _, vector in rows if row_kind == kind])
                got = encoder.encode(texts, kind=kind)
                for dim in {*encoder.dims, encoder.width}:
                    difference = float(np.abs(truncate(got, dim) - truncate(expected, dim)).max())
                    largest = np.maximum(report.golden_max_abs[precision], difference)  # keeps NaN
                    report.golden_max_abs[precision] = float(largest)
                    if not difference <= bound:
                        report.problems.append(
                            f"golden embeddings: {precision}, {kind} texts at dim {dim} differ by {difference:.1e}, "
                            f"allowed {bound:.0e}"
                        )
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # onnxruntime has a class per error code, a panic of tokenizers is no Exception
            report.problems.append(f"golden embeddings: {precision} cannot be computed: {first_line(error)}")


def read_golden(root: Path, width: int) -> list[tuple[str, str, np.ndarray]]:
    """(kind, text, float32 [width] of PyTorch) of every stored embedding; raises CheckFailed if malformed."""
    golden: Any = read_json(root, PARITY).get("golden")
    rows = []
    try:
        for row in golden:
            vector = np.frombuffer(base64.b64decode(row["embedding"], validate=True), "<f4")
            if row["kind"] not in KINDS or not isinstance(row["text"], str) or vector.shape != (width,):
                raise ValueError
            rows.append((row["kind"], row["text"], vector))
    except (TypeError, KeyError, ValueError):
        rows.clear()
    if not rows:
        raise CheckFailed(f"{PARITY}: golden embeddings are missing or malformed")
    return rows


def main(argv: Sequence[str]) -> int:
    """Verify one folder and print what was found."""
    parser = argparse.ArgumentParser(prog="nestling verify", description="Check a bundle without PyTorch.")
    parser.add_argument("folder", help="folder that holds manifest.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--seconds", type=float, default=600, help="after which it has failed (default: 600)")
    arguments = parser.parse_args(argv)

    def give_up() -> None:
        late = f"not done after {arguments.seconds:g} s; if this machine is that slow, give --seconds"
        _show(Report(arguments.folder, [late], seconds=arguments.seconds), arguments.json)
        sys.stdout.flush()
        os._exit(EXIT_CHECK)

    # A forger's graph or file may have no end: sizes and loops cannot be judged beforehand.
    timer = threading.Timer(arguments.seconds, give_up)
    timer.daemon = True
    timer.start()
    report = inspect_bundle(arguments.folder)
    timer.cancel()
    _show(report, arguments.json)
    return EXIT_CHECK if report.problems else EXIT_DONE


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"ok": not report.problems, **asdict(report)}))
        return
    for problem in report.problems:
        print(f"FAILED {problem}")
    if report.problems:
        print(f"{report.folder}: {len(report.problems)} problems in {report.seconds:.1f} s")
        return
    print(f"files       {report.files}, {report.bytes:,} bytes, every sha256 holds, none outside the manifest")
    for precision, largest in report.golden_max_abs.items():
        bound = f"max difference {largest:.1e}, bound {GOLDEN_BOUNDS[precision]:.0e}"
        print(f"embeddings  {report.golden_texts} texts, {precision}, {bound}")
    print(f"dims        {', '.join(map(str, report.dims))}")
    print(f"ok          {report.folder}, {report.seconds:.1f} s, torch not imported")


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # a bundle that needs torch fails here, not in production
    sys.exit(main(sys.argv[1:]))
