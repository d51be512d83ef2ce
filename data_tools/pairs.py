"""Docstring -> function pairs of one Python file, by parsing: nothing is imported or run.

The anchor is the summary of a docstring, the positive the function's source without its docstring and
decorators. Every function of the file gives a pair or a reason why it gives none.
"""

import ast
import inspect
import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from data_tools.split import normalise

_MIN_WORDS = 3
_LONG_SUMMARY = 300  # characters from which a summary is cut at the end of a sentence
# A line of a docstring that ends its summary: a doctest, a field list, a section title, an underline, a list.
_END = re.compile(
    r">>>|\.\. |:[a-z]+( [^:]+)?: |@[a-z]+ |[-=~^*#]{3,}$|[-*+] |\d+[.)] |[|+]"
    r"|(parameters?|params|arg(ument)?s|returns?|raises|yields|examples?|notes?|see also|usage|input|output)"
    r" *(:.*)?$",
    re.IGNORECASE,
)
_SIGNATURE = re.compile(r"[\w.]+ ?\(.*\)( *-> *.*)?|[\w., ]+ = [\w.]+\(.*\)")
_TEMPLATE = re.compile(r"%\(\w+\)s|(?<![\w\\^_}$])\{\w*\}")
_ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)( *<[^`>]*>)?`")
_GENERIC = re.compile(
    r"see |same as |(re)?turns? (self|none|true|false|itself)\b.{0,3}$|inherit|override|overrid"
    r"|initiali[sz]e self|todo|fixme|deprecated|undocumented|dummy|placeholder|not implemented|internal use"
    r"|(this|the) (method|function) (is|was|has been) (deprecated|not implemented)|alias (for|of|to) "
    r"|helper (function|method)? ?(for|of|to) \S+$"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Summary and code of a function, and where it stands."""

    anchor: str
    positive: str
    line: int
    name: str


def summary_of(docstring: str) -> str:
    """First paragraph of a docstring in one line without markup, field lists, doctests; "" if it has none."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines: list[str] = []
        for line in map(str.strip, paragraph.splitlines()):
            if _END.match(line):
                break
            lines.append(line)
        if not lines and not paragraph.lstrip().startswith(".. "):
            return ""  # starts with a section or a doctest: what follows it describes no function
        if lines and _SIGNATURE.fullmatch(lines[0]):
            lines = lines[1:]
        text = _ROLE.sub(r"\1", " ".join(" ".join(lines).split())).replace("`", "")
        if text:
            return _cut(text)
    return ""


def _cut(text: str) -> str:
    end = -1
    for stop in re.finditer(r"[.!?](?= )", text):
        if end >= 0 and stop.end() > _LONG_SUMMARY:
            break
        end = stop.end()
    return text if len(text) <= _LONG_SUMMARY or end < 0 else text[:end]


def pairs_of(source: str) -> Iterator[Pair | str]:
    """A pair, or the reason for none, for every function of a Python source.

    Raises one of NO_PYTHON (data_tools/split.py) if the source does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes such as "\d" in other people's strings
        tree = ast.parse(source)
    lines = re.split(r"\r\n|\r|\n", source)  # str.splitlines would also cut at form feeds, unlike the parser
    waiting: list[tuple[ast.AST, str, bool]] = [(tree, "", False)]
    while waiting:
        node, prefix, nested = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                texts = _texts(child, nested, lines)
                yield texts if isinstance(texts, str) else Pair(*texts, child.lineno, name)
                waiting.append((child, f"{name}.", True))
            elif isinstance(child, ast.ClassDef):
                waiting.append((child, f"{prefix}{child.name}.", nested))
            elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                waiting.append((child, prefix, nested))


def _texts(  # noqa: PLR0911 (a list of reasons reads best in this form)
    node: ast.FunctionDef | ast.AsyncFunctionDef, nested: bool, lines: list[str]
) -> tuple[str, str] | str:
    """Anchor and positive of a function, or why it gives none."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None:
        return "no docstring"
    if nested:
        return "nested in another function"
    if node.name.startswith("__") and node.name.endswith("__"):
        return "dunder method"
    if re.match(r"test(_|[A-Z]|$)", node.name):
        return "test function"
    if any(_last_name(decorator) == "overload" for decorator in node.decorator_list):
        return "overload"
    if all(_is_trivial(statement) for statement in node.body[1:]):
        return "trivial body"
    anchor = summary_of(docstring)
    if reason := _no_anchor(anchor):
        return reason
    positive = _without_docstring(node, lines)
    return "docstring on a line with code" if positive is None else (anchor, positive)


def _no_anchor(summary: str) -> str | None:
    if not summary:
        return "no summary"
    if _TEMPLATE.search(summary):
        return "docstring is a template"
    if len(re.findall(r"[^\W\d_]{2,}", summary)) < _MIN_WORDS:
        return f"summary of fewer than {_MIN_WORDS} words"
    return "generic summary" if _GENERIC.match(normalise(summary)) else None


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_trivial(statement: ast.stmt) -> bool:
    match statement:
        case ast.Raise(exc=ast.Call(func=error)) | ast.Raise(exc=ast.expr() as error):
            return _last_name(error) == "NotImplementedError"
        case ast.Pass() | ast.Expr(value=ast.Constant()) | ast.Return(value=None | ast.Constant()):
            return True
        case ast.Return(value=ast.expr() as value):
            return _last_name(value) in ("NotImplemented", "self")
    return False


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """Signature and body, dedented by the indent of `def`; None where a line mixes docstring and code."""
    first, second = node.body[0], node.body[1]
    assert first.end_lineno is not None and node.end_lineno is not None
    before = lines[first.lineno - 1].encode()[: first.col_offset]  # ast counts columns in UTF-8 bytes
    if second.lineno == first.end_lineno or before.strip():
        return None
    body = itertools.dropwhile(lambda line: not line.strip(), lines[first.end_lineno : node.end_lineno])
    kept = [*lines[node.lineno - 1 : first.lineno - 1], *body]
    margin = len(kept[0]) - len(kept[0].lstrip())
    kept = [line[margin:] if not line[:margin].strip() else line for line in kept]
    return "\n".join(line.rstrip() for line in kept).strip("\n")
