"""What makes two texts copies of each other: identities, runs of words, near-copies between two sides.

Everything is exact and deterministic: no sampling decides what counts as a copy.
"""

import ast
import contextlib
import hashlib
import re
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

NO_PYTHON = SyntaxError, ValueError, RecursionError, MemoryError  # the last where brackets are nested too deep
_RUN = 5  # words of a run


def normalise(text: str) -> str:
    """Text without differences of Unicode form (NFKC), case and white space: identities are made from it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def forms(text: str) -> tuple[str, str]:
    """A text normalised, and as copies are looked for: that, or of a Python function its tokens without its name,
    comments, layout, docstrings and annotations, words apart."""
    plain = normalise(text)
    if text.startswith(("def ", "async def ")):
        with contextlib.suppress(*NO_PYTHON), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes such as "\d" in other people's strings
            tree = ast.parse(text)
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    node.returns = None
                    node.body = node.body[ast.get_docstring(node) is not None :] or [ast.Pass()]
                elif isinstance(node, ast.arg):
                    node.annotation = None
            tree.body[0].name = "f"  # pyright: ignore[reportAttributeAccessIssue]
            return plain, normalise(" ".join(re.findall(r"\w+|[^\w\s]", ast.unparse(tree))))
    return plain, plain


def word_runs(words: Sequence[str], length: int = _RUN) -> frozenset[str]:
    """All runs of `length` words, joined; a shorter text is one run."""
    return frozenset(" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1)))


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b: the same in every process, unlike Python's `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class NearCopies:
    """Finds a set among `others` with a Jaccard similarity of at least `threshold`.

    Exact, by prefix filtering (Chaudhuri et al., ICDE 2006): in any fixed order of the elements, two sets so
    similar share one of their first n - ceil(threshold * n) + 1 elements.
    """

    def __init__(self, others: Sequence[frozenset[Any]], threshold: float):
        self._others, self._threshold = others, threshold
        self._holders: dict[Any, list[int]] = {}
        for j, other in enumerate(others):
            for element in self._prefix(other):
                self._holders.setdefault(element, []).append(j)

    def find(self, text: frozenset[Any]) -> int | None:
        """The first of `others` that is so similar to `text`, or None."""
        for j in sorted({j for element in self._prefix(text) for j in self._holders.get(element, ())}):
            shared = len(text & self._others[j])
            if shared >= self._threshold * (len(text) + len(self._others[j]) - shared):
                return j
        return None

    def _prefix(self, elements: frozenset[Any]) -> list[Any]:
        # Rounded so that 0.8 * 5 counts as 4 whatever its last bit is; one element too many costs nothing.
        return sorted(elements)[: len(elements) - int(self._threshold * len(elements) - 1e-9)]
