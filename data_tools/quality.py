"""The stage `filter`: pairs left out one by one, each under one reason."""

import re
from collections.abc import Iterator
from typing import Any

from data_tools.chunk import PAIR
from data_tools.config import Filter
from data_tools.runner import Output
from data_tools.split import normalise
from launch.errors import UserError

_SURE = 40  # characters from which a text's language can be told
_CERTAIN = 0.99  # probability from which another language is believed
_SHOWN_TO_DETECTOR = 1000  # characters; more costs time and tells nothing
_NOTICE = re.compile(
    r"lorem ipsum|enable javascript|javascript is (disabled|required)|(accept|use) (all )?cookies"
    r"|cookie (policy|settings)"
    r"|all rights reserved|terms (of|and) (service|use|conditions)|privacy policy|skip to (main )?content"
    r"|page not found|table of contents|this page (was )?(intentionally )?(left )?blank",
    re.IGNORECASE,
)
_NOTICE_SHARE = 0.3  # of the characters, in lines with such a notice
_REPEATED_SHARE = (
    0.5  # of the lines of a text with several: the thresholds of Gopher (Rae et al. 2021) are 0.3 for prose
)
_LETTERS_SHARE = 0.25  # of the characters; code and tables have more


def boilerplate(text: str) -> str | None:
    """Why a text is boilerplate, or None."""
    letters = sum(map(str.isalnum, text))
    if letters < _LETTERS_SHARE * len(text):
        return "mostly symbols"
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if len(lines) >= 4 and len(set(lines)) < (1 - _REPEATED_SHARE) * len(lines):
        return "mostly repeated lines"
    if sum(len(line) for line in lines if _NOTICE.search(line)) > _NOTICE_SHARE * len(text):
        return "mostly notices"
    return None


class _Languages:
    def __init__(self, kept: list[str]):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = set(map(str, self._identifier.labels))
        if strange := sorted(set(kept) - known):
            raise UserError(f"filter.languages: got {strange[0]!r}, allowed: {', '.join(sorted(known))}")
        self._kept = set(kept) | {"zxx"}  # no language: numbers, commands

    def other(self, text: str) -> str | None:
        """The language of a text if it surely is none of those kept: code looks a little like many languages."""
        if len(text) < _SURE:
            return None
        found, probability = self._identifier.classify(text[:_SHOWN_TO_DETECTOR])
        return None if str(found) in self._kept or probability < _CERTAIN else str(found)


def filter_stage(output: Output, part: str, settings: Filter) -> None:
    """Rows of PAIR that pass; the others are counted."""
    import pyarrow.parquet as pq

    languages = _Languages(settings.languages) if settings.languages else None

    def reason(row: dict[str, Any]) -> str | None:
        anchor, positive = row["anchor"], row["positive"]
        if len(positive) < settings.min_chars:
            return f"positive shorter than {settings.min_chars} characters"
        if len(positive) > settings.max_chars:
            return f"positive longer than {settings.max_chars} characters"
        if normalise(anchor) == normalise(positive):
            return "anchor and positive are the same"
        if settings.boilerplate and (why := boilerplate(positive)):
            return why
        if languages and (other := languages.other(positive)):
            return f"language {other}"
        return None

    def rows() -> Iterator[dict[str, Any]]:
        for row in pq.read_table(part).to_pylist():
            if why := reason(row):
                output.counts[why] += 1
            else:
                yield row

    output.write(rows(), PAIR)
