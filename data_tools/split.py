"""Copies and draws: what makes two texts or functions the same, near-copies between two sides, seeded draws.

Everything is exact and deterministic: no sampling decides what counts as a copy, no file order what is drawn.
"""

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Hashable, Iterable, Sequence
from types import CodeType

NEAR_COPY = 0.8  # Jaccard of token shingles from which two functions count as copies of each other
_SHINGLE = 5  # tokens of a shingle
# A string, a comment, a word, a number or one other character of Python code; comments are left out.
_TOKEN = re.compile(
    r"""(\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|\#[^\n]*|(\w+|[^\w\s])""", re.DOTALL
)


def normalise(text: str) -> str:
    """Text without differences of Unicode form (NFKC), case and white space: identities are made from it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def code_tokens(code: str) -> list[str]:
    """Tokens of a function without its name, comments and white space; strings without their quotes."""
    tokens = [text.strip("\"'") if text else word for text, word in _TOKEN.findall(code) if text or word]
    name = tokens.index("def") + 1
    return tokens[:name] + tokens[name + 1 :]


def code_identity(function: str) -> Hashable:
    """Equal for functions that compile to the same code: name, comments, layout, annotations, defaults of
    parameters, docstrings of inner functions and asserts do not count. For comparisons within one process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes such as "\d" in other people's strings
        module = compile(function, "function", "exec", dont_inherit=True, optimize=2)
    return next(_compiled(code) for code in reversed(module.co_consts) if isinstance(code, CodeType))


def _compiled(code: CodeType) -> Hashable:
    constants = tuple(_compiled(c) if isinstance(c, CodeType) else (type(c), c) for c in code.co_consts)
    return (code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)


def shingles(tokens: Sequence[str]) -> frozenset[int]:
    """Hashes of all runs of five tokens; a shorter text is one run."""
    runs = (tokens[i : i + _SHINGLE] for i in range(max(1, len(tokens) - _SHINGLE + 1)))
    return frozenset(hash_of("\0".join(run)) for run in runs)


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b: the same in every process, unlike Python's `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def near_copies(
    texts: Sequence[frozenset[int]], others: Sequence[frozenset[int]], threshold: float = NEAR_COPY
) -> dict[int, int]:
    """Index in `texts` -> index in `others` of a set with a Jaccard similarity of at least `threshold`.

    Exact, by prefix filtering (Chaudhuri et al., ICDE 2006): in any fixed order of the elements, two sets so
    similar share one of their first n - ceil(threshold * n) + 1 elements.
    """
    holders: dict[int, list[int]] = {}
    for j, other in enumerate(others):
        for element in _prefix(other, threshold):
            holders.setdefault(element, []).append(j)
    found = {}
    for i, text in enumerate(texts):
        candidates = {j for element in _prefix(text, threshold) for j in holders.get(element, ())}
        for j in sorted(candidates):
            shared = len(text & others[j])
            if shared >= threshold * (len(text) + len(others[j]) - shared):
                found[i] = j
                break
    return found


def _prefix(elements: frozenset[int], threshold: float) -> list[int]:
    # Rounded so that 0.8 * 5 counts as 4 whatever its last bit is; one element too many costs nothing.
    return sorted(elements)[: len(elements) - int(threshold * len(elements) - 1e-9)]


def draw_order(identities: Iterable[str], seed: int) -> list[int]:
    """Indices in an order that depends on each identity and the seed, never on the order of the input."""
    key = seed.to_bytes(8, "big")
    keys = [hashlib.blake2b(text.encode(), key=key, digest_size=16).digest() for text in identities]
    return sorted(range(len(keys)), key=keys.__getitem__)
