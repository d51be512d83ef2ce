"""Documents -> training pairs by their structure, cut by the model's own tokenizer; offsets say where each text stood.

Structure is Markdown's: headings, paragraphs, fenced code blocks. A cut falls between blocks where they fit, else
between tokens. Offsets are characters of the document's text as the stage `read` wrote it.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.config import CorpusSource
from data_tools.pairs import Pair, pairs_of
from data_tools.runner import Output
from data_tools.split import NO_PYTHON
from launch.errors import UserError
from launch.preflight import resolve_model_path

PAIR = {
    "source": "int64",
    "document": "string",
    "place": "string",
    "anchor": "string",
    "positive": "string",
    "start": "int64",
    "end": "int64",
}
_AHEAD = 16  # characters a token that are tokenised to find where a chunk ends, twice as many where that is too few
_HEADING = re.compile(r"(#{1,6}) +(.*?)[ #]*$")
_QUESTION = re.compile(r"(?:\*\*|#+ +)?(?:Q(?:uestion)?\s*\d*\s*[:.)] *)?(.{8,300}\?)(?:\*\*)?\s*$", re.IGNORECASE)
_ANSWER = re.compile(r"\s*(?:\*\*)?A(?:nswer)?\s*\d*\s*[:.)](?:\*\*)? *", re.IGNORECASE)

Span = tuple[int, int]


def tokenizer_file(name: str) -> Path:
    """The tokenizer.json that `chunk.tokenizer` names. Raises UserError."""
    path = Path(name)
    if not path.is_file():
        try:
            path = Path(resolve_model_path(name)) / "tokenizer.json"
        except UserError as error:
            raise UserError(str(error).replace("model.path", "chunk.tokenizer")) from None
    if not path.is_file():
        raise UserError(f"chunk.tokenizer: {path}: no such file; allowed: a model folder with tokenizer.json")
    return path


class Chunker:
    """Cuts spans of a text so that each has at most `most` tokens with the special ones."""

    def __init__(self, file: Path, most: int):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"chunk.tokenizer: {file}: cannot be read as tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._most = most - self._tokenizer.num_special_tokens_to_add(False)
        if self._most < 1:
            raise UserError(f"chunk.max_tokens: got {most}, allowed: more than the tokenizer's special tokens")

    def cut(self, text: str, span: Span) -> list[Span]:
        """Spans in order that fit; white space at their ends is left out."""
        open_spans, done = [s for s in (_stripped(text, span),) if s], list[Span]()
        while open_spans:
            start, end = open_spans.pop()
            ahead, tokens = start, list[Span]()
            while len(tokens) <= self._most and ahead < end:  # all of the text for each chunk would be quadratic
                ahead = min(end, start + max(_AHEAD * self._most, 2 * (ahead - start)))
                tokens = self._offsets(text[start:ahead])
            if len(tokens) <= self._most or end - start == 1:
                done.append((start, end))
                continue
            cut = start + self._place(text[start:ahead], tokens)
            # What follows is looked at after the first part: a stack in reverse order.
            open_spans += [s for s in (_stripped(text, (cut, end)), _stripped(text, (start, cut))) if s]
        return done

    def _offsets(self, text: str) -> list[Span]:
        return self._tokenizer.encode(text, add_special_tokens=False).offsets

    def _place(self, text: str, tokens: list[Span]) -> int:
        """Characters of the longest beginning that fits, at the best kind of cut in its second half."""
        # Another cut can tokenise to a little more; the loop in `cut` then cuts again.
        limit = max(tokens[self._most][0], 1)
        for breaks in (blocks(text), [(m.end(), 0) for m in re.finditer(r"\n|[.!?] |\s", text[:limit])]):
            fitting = [start for start, _ in breaks if 0 < start <= limit]
            if fitting and max(fitting) >= limit // 2:
                return max(fitting)
        return limit


def _stripped(text: str, span: Span) -> Span | None:
    inner = text[span[0] : span[1]]
    start = span[0] + len(inner) - len(inner.lstrip())
    end = span[0] + len(inner.rstrip())
    return (start, end) if start < end else None


def blocks(text: str) -> list[Span]:
    """Paragraphs, headings and fenced code blocks as spans."""
    found, start, place, fence = list[Span](), 0, 0, False
    for line in text.splitlines(keepends=True):
        is_fence = line.lstrip().startswith(("```", "~~~"))
        if not fence and (not line.strip() or is_fence or _HEADING.match(line)) and place > start:
            found.append((start, place))
            start = place
        place += len(line)
        fence ^= is_fence
        if not fence and (is_fence or not line.strip()):
            if text[start:place].strip():
                found.append((start, place))
            start = place
    return [*found, (start, place)] if place > start else found


def sections(text: str) -> Iterator[tuple[list[str], Span]]:
    """(headings from the outermost in, span of what stands below them before the next heading)."""
    path: list[tuple[int, str]] = []
    begin = place = 0
    fence = False
    for line in text.splitlines(keepends=True):
        fence ^= line.lstrip().startswith(("```", "~~~"))
        if not fence and (heading := _HEADING.match(line.rstrip("\n"))):
            if text[begin:place].strip():
                yield [name for _, name in path], (begin, place)
            path = [(depth, name) for depth, name in path if depth < len(heading[1])]
            path.append((len(heading[1]), heading[2]))
            begin = place + len(line)
        place += len(line)
    if text[begin:].strip():
        yield [name for _, name in path], (begin, len(text))


def questions(text: str) -> Iterator[tuple[str, Span]]:
    """(question, span of its answer): a line that ends in a question mark against what follows up to the next one."""
    asked: str | None = None
    begin = place = 0
    for line in text.splitlines(keepends=True):
        if (found := _QUESTION.match(line)) or (asked and _HEADING.match(line.rstrip("\n"))):
            if asked and text[begin:place].strip():
                yield asked, (begin, place)
            asked, begin = (found[1].strip("*# ") if found else None), place + len(line)
        elif asked and not text[begin:place].strip() and (answer := _ANSWER.match(line)):
            begin = place + answer.end()
        place += len(line)
    if asked and text[begin:].strip():
        yield asked, (begin, len(text))


def _made(row: dict[str, Any], kind: str, drop: Callable[[str], None]) -> Iterator[tuple[str, str, str, Span]]:
    """(place, anchor, text that the offsets are of, span of the positive) of one document."""
    place, title, text = row["place"], row["title"], row["text"]
    if kind in ("given", "title-body"):
        yield place, title, text, (0, len(text))
    elif kind == "docstring-function":
        try:
            pairs = list(pairs_of(text))
        except NO_PYTHON:
            return drop("file does not parse")
        for pair in pairs:
            if isinstance(pair, Pair):
                yield f"{place}:{pair.line}", pair.anchor, pair.positive, (0, len(pair.positive))
            else:
                drop(pair)
    else:
        found = list(questions(text)) if kind == "question-answer" else list(_headed(text, title))
        for anchor, span in found:
            yield place, anchor, text, span
        if not found:
            drop("document without questions" if kind == "question-answer" else "document without headings and title")


def _headed(text: str, title: str) -> Iterator[tuple[str, Span]]:
    """(title and headings, span) of each section; the title "-" stands for none."""
    for headings, span in sections(text):
        path = headings if title == "-" or title in headings else [title, *headings]
        if path:
            yield " > ".join(path), span


def pairs_stage(output: Output, part: str, sources: list[CorpusSource], tokenizer: str | None, max_tokens: int) -> None:
    """The stage `pairs`: documents of one part -> rows of PAIR."""
    import pyarrow.parquet as pq

    chunker = Chunker(Path(tokenizer), max_tokens) if tokenizer else None

    def drop(reason: str) -> None:
        output.counts[reason] += 1

    def rows() -> Iterator[dict[str, Any]]:
        for row in pq.read_table(part).to_pylist():
            # The function's own text is what its offsets count in; where it stood is in `place`.
            for place, anchor, text, span in _made(row, sources[row["source"]].pairs, drop):
                spans = chunker.cut(text, span) if chunker else [s for s in (_stripped(text, span),) if s]
                for start, end in spans:
                    kept = {"source": row["source"], "document": row["document"], "place": place}
                    yield {**kept, "anchor": anchor, "positive": text[start:end], "start": start, "end": end}

    output.write(rows(), PAIR)
