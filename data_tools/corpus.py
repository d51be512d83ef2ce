"""Documents and given pairs of every kind of source, tolerantly: what cannot be read is told with file and line.

A document or pair is a row with the columns of `DOCUMENT`. `units_of` lists what there is to read, cut into tasks;
`read_unit` streams one of them.
"""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from data_tools import object_store, readers
from data_tools.config import ROLES, CorpusSource
from data_tools.markup import html_to_text, man_to_text, metadata_to_text, rst_to_text
from data_tools.packages import PACKAGE, Package, find_package, python_files
from data_tools.runner import Output
from data_tools.shards import MANIFEST, verify_shards
from data_tools.split import hash_of, normalise
from launch.errors import UserError
from launch.files import sha256_of
from launch.reader import did_you_mean, near_file
from launch.rows import SAVED, kind_of, read_json_lines, read_table

DOCUMENT = {"source": "int64", "document": "string", "place": "string", "title": "string", "text": "string"}
TREES = (".txt", ".md", ".markdown", ".html", ".htm", ".rst")
_MAN = re.compile(r"man[1-9]\w*/.+\.[1-9]\w*")
_FILES_A_TASK = 500
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".tsv")

_MARKUP: dict[str, Callable[[str], tuple[str, str]]] = {
    ".html": html_to_text,
    ".htm": html_to_text,
    ".rst": lambda text: ("", rst_to_text(text)),
    "man": man_to_text,
    "METADATA": metadata_to_text,
}

Reject = Callable[[str, str], None]  # place, reason


def locate(source: CorpusSource, cache_dir: Path) -> CorpusSource:
    """The source with a local path: what lies in an object store is fetched, an installed package found."""
    if package := package_of(source):
        return source.model_copy(update={"path": str(package.root)})
    if not source.url:
        return source
    return source.model_copy(update={"path": str(object_store.fetch_source(source.url, cache_dir, sha256_of))})


def package_of(source: CorpusSource) -> Package | None:
    """The installed package that `package:NAME` names. Raises UserError if there is none."""
    return find_package(source.name.removeprefix(PACKAGE)) if source.name.startswith(PACKAGE) else None


def title_and_license(source: CorpusSource) -> tuple[str, str | None]:
    """What the card calls a source, an installed package with its version, and its licence."""
    package = package_of(source)
    if not package:
        return source.name, source.license
    return f"{source.name} {package.version}", source.license or package.license


def beir_split(source: CorpusSource) -> str:
    """Which qrels of a BEIR folder are meant: `test` where the config names no split."""
    return source.split if "split" in source.model_fields_set else "test"


def units_of(source: CorpusSource, number: int) -> list[dict[str, Any]]:
    """The tasks that read a source: its files, and what fingerprints their content. Raises UserError if it is none."""
    if source.path is None:
        # A hub data set is what its name and revision say; without a revision, what is there now.
        rows = readers.open_hub(str(source.hub), source.split, source.revision)
        return [{"source": number, "kind": "hub", "root": "", "files": [], "content": rows._fingerprint}]
    path = Path(source.path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder{near_file(path)}")
    if (path / "corpus.jsonl").is_file():
        judged = ["queries.jsonl", f"qrels/{beir_split(source)}.tsv"] if source.pairs == "given" else []
        files = [path / name for name in ("corpus.jsonl", *judged)]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]}: no such file; a BEIR folder needs it for pairs: given")
        return [_unit(number, "beir", path, files)]
    if path.is_dir() and not any((path / name).is_file() for name in (MANIFEST, "dataset_dict.json", "state.json")):
        if source.pairs == "docstring-function":
            found, wanted = python_files(path), (".py",)
        else:
            found, wanted = sorted(f for f in path.rglob("*") if _kind_of_page(f) and f.is_file()), TREES
        if not found:
            raise UserError(f"{path}: no file below it ends in {', '.join(wanted)}")
        groups = [found[i : i + _FILES_A_TASK] for i in range(0, len(found), _FILES_A_TASK)]
        return [_unit(number, "tree", path, group) for group in groups]
    kind = ".jsonl.zst" if path.name.endswith(".jsonl.zst") else kind_of(path)
    if path.is_dir():
        if kind != SAVED:
            verify_shards(path)
        return [_unit(number, kind, path, sorted(file for file in path.rglob("*") if file.is_file()))]
    return [_unit(number, kind, path, [path])]


def _unit(number: int, kind: str, root: Path, files: list[Path]) -> dict[str, Any]:
    names = [file.relative_to(root).as_posix() if file != root else "" for file in files]
    content = [[name, sha256_of(file)] for name, file in zip(names, files, strict=True)]
    return {"source": number, "kind": kind, "root": str(root), "files": names, "content": content}


def read_stage(output: Output, unit: dict[str, Any], sources: list[CorpusSource], most: int) -> None:
    """The stage `read`: rows of DOCUMENT of one unit, rejects with their place. `most` bounds a row's bytes."""
    rejects: list[dict[str, str]] = []

    def reject(place: str, reason: str) -> None:
        rejects.append({"place": place, "reason": reason})
        output.counts[reason.partition(":")[0]] += 1

    output.write(read_unit(unit, sources[unit["source"]], most, reject), DOCUMENT)
    output.note("rejects.jsonl", rejects)


def read_unit(unit: Mapping[str, Any], source: CorpusSource, most: int, reject: Reject) -> Iterator[dict[str, Any]]:
    """Rows of DOCUMENT, values checked; what is bad goes to `reject`."""
    root = Path(unit["root"])
    if unit["kind"] == "tree":
        rows = _tree(source.name, root, unit["files"], most, reject)
    elif unit["kind"] == "beir":
        rows = _beir(root, source, most, reject)
    else:
        rows = _columns(root, unit["kind"], source, most, reject)
    for place, document, title, text in rows:
        for value in (document, title, text):
            if not isinstance(value, str) or not value.strip():
                reject(place, f"empty or no text: got {str(value)[:40]!r}")
                break
            if len(value) > most or len(value.encode("utf-8", "surrogatepass")) > most:
                reject(place, f"longer than {most:,} bytes")
                break
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                reject(place, "not UTF-8")
                break
        else:
            yield {"source": unit["source"], "document": document, "place": place, "title": title, "text": text}


def _columns(root: Path, kind: str, source: CorpusSource, most: int, reject: Reject) -> Iterator[tuple[Any, ...]]:
    """(place, document, title or anchor, text or positive) of files with columns."""
    roles: dict[str, str] = {}
    wanted = ("anchor", "positive") if source.pairs == "given" else ("title", "text")
    needed = wanted[1:] if source.pairs in ("heading-section", "question-answer", "docstring-function") else wanted

    def choose(columns: Any) -> Any:
        roles.update(source.columns or {name: name for name in columns if name in ROLES})
        for role in needed:
            if role not in roles:
                raise UserError(
                    f"{source.name}: pairs: {source.pairs} needs a column {role}; its columns are "
                    f"{', '.join(columns)}; write columns: {{{role}: NAME}}"
                )
        for role, column in roles.items():
            if column not in columns:
                hint = did_you_mean(column, columns)
                raise UserError(
                    f"{source.name} has no column {column!r} (for {role}), allowed: {', '.join(columns)}{hint}"
                )
        return list(dict.fromkeys(roles.values()))

    if kind in _LINES:
        lines = _tolerant_lines(root, most, reject)
        rows = read_table(root, lines, choose, strict=False) if kind in (".csv", ".tsv") else None
        rows = rows or read_json_lines(root, lines, choose)
    elif kind == "hub":
        rows = readers.read_dataset(
            readers.open_hub(str(source.hub), source.split, source.revision), source.name, choose
        )
    elif kind == SAVED:
        rows = readers.read_dataset(readers.open_saved(root, source.split), source.name, choose)
    else:
        files = [root] if root.is_file() else sorted(root.glob("shard-*.parquet"))
        rows = readers.read_parquet(files, choose, speaks=False)
    for place, row in rows:
        where = f"{source.name}:{place}"
        if isinstance(row, str):
            reject(where, row)
            continue
        first, second = (row.get(roles.get(role, "")) for role in wanted)
        identity = row.get(roles["id"]) if "id" in roles else None
        if identity is None and source.pairs == "given":
            # Rows with one positive belong to one document: a question about it must not be held out alone.
            identity = f"{hash_of(normalise(second)):016x}" if isinstance(second, str) else ""
        if source.pairs not in ("given", "title-body"):
            first = first or "-"
        yield where, where if identity is None else f"{source.name}#{identity}", first, second


def _tolerant_lines(path: Path, most: int, reject: Reject) -> Iterator[tuple[int, str]]:
    """Lines of a packed or plain file; a byte that is no UTF-8 becomes half a surrogate pair: refused later."""
    number = 0
    with path.open("rb") as file:
        stream: BinaryIO = file
        if path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=file)  # pyright: ignore[reportAssignmentType]
        elif path.suffix == ".zst":
            import pyarrow as pa

            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))
        try:
            while line := stream.readline(most + 1):
                number += 1
                if len(line) > most and not line.endswith(b"\n"):
                    reject(f"{path}:{number}", f"longer than {most:,} bytes")
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(1 << 20)
                    continue
                yield (
                    number,
                    line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode(errors="surrogateescape"),
                )
        except (EOFError, zlib.error, OSError) as error:
            # How many rows are missing nobody knows, so it is no share of rejected ones.
            raise UserError(f"{path}: packed file is damaged after line {number:,}: {error}; copy it again") from None


def _kind_of_page(path: Path) -> str:
    """The ending of a document's file, "man" or "METADATA"; empty for what is none. Any but METADATA may be packed."""
    if path.name == "METADATA":
        return path.name
    name = path.name.removesuffix(".gz")
    if _MAN.fullmatch(f"{path.parent.name}/{name}"):
        return "man"
    suffix = Path(name).suffix.lower()
    return suffix if suffix in TREES else ""


def _tree(source: str, root: Path, names: list[str], most: int, reject: Reject) -> Iterator[tuple[str, str, str, str]]:
    """One document a file; its title is that of the page, the first heading, else the name."""
    for name in names:
        path = root / name
        if path.stat().st_size > most:
            reject(str(path), f"longer than {most:,} bytes")
            continue
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                data = file.read(most + 1)
        except (EOFError, zlib.error, OSError) as error:
            reject(str(path), f"cannot be read: {error}")
            continue
        text = data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape").replace("\r\n", "\n")
        title, kind = "", _kind_of_page(path)
        if kind in _MARKUP:
            title, text = _MARKUP[kind](text)
        if not title and path.suffix != ".py":
            title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "")
        yield str(path), f"{source}#{name}", title or path.stem, text


def _beir(root: Path, source: CorpusSource, most: int, reject: Reject) -> Iterator[tuple[Any, ...]]:
    """Judged pairs (query, relevant document), or, where pairs are made from documents, its documents."""

    def rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        path = root / name
        read = read_json_lines if name.endswith(".jsonl") else read_table
        for line, row in read(path, _tolerant_lines(path, most, reject), lambda columns: columns):
            if isinstance(row, str):
                reject(f"{path}:{line}", row)
            else:
                yield f"{path}:{line}", row

    if source.pairs != "given":
        for place, row in rows("corpus.jsonl"):
            yield place, f"{source.name}#{row.get('_id')}", row.get("title") or "-", row.get("text")
        return
    judged = [
        (at, row) for at, row in rows(f"qrels/{beir_split(source)}.tsv") if str(row.get("score", "")).strip() != "0"
    ]
    texts = {}
    for name, column in (("queries.jsonl", "query-id"), ("corpus.jsonl", "corpus-id")):
        asked = {row.get(column) for _, row in judged}
        for _, row in rows(name):
            if row.get("_id") in asked:
                texts[column, row["_id"]] = f"{row.get('title') or ''} {row.get('text') or ''}".strip()
    for place, row in judged:
        query, document = (texts.get((column, row.get(column))) for column in ("query-id", "corpus-id"))
        yield place, f"{source.name}#{row.get('corpus-id')}", query, document
