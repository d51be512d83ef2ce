"""The data card of `nestling data run` as JSON and Markdown: no times in it, so that equal data gives an equal card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.config import Pipeline
from data_tools.corpus import title_and_license
from data_tools.runner import Done
from launch.files import read_json, write_json, write_text

_INNER = ("sign", "match", "resolve", "evaluation")  # stages that pass no rows on
_REASONS = 10  # lines of one stage in the text
_SAME = {"out", "workers", "executor", "sources"}  # settings that decide no byte, or stand elsewhere in the card


def write_card(config: Pipeline, out: Path, done: Mapping[str, Done]) -> dict[str, Any]:
    """Write card.json and card.md to `out`; returns the card."""
    sides = [task["facts"] for task in done["shards"].tasks]
    stages, before = [], None
    for name, stage in done.items():
        if name in _INNER or name == "shards":
            continue
        lost = dict(stage.dropped.most_common())
        entered = before if before is not None else stage.rows + sum(lost.values())
        stages.append({"stage": name, "in": entered, "out": stage.rows, "dropped": lost})
        before = stage.rows
    read = done["read"]
    units = read_json(read.folder / "units.json")
    sources = []
    for number, source in enumerate(config.sources):
        rows = sum(
            rows
            for task, unit in zip(read.tasks, units, strict=True)
            if unit["source"] == number
            for _, rows in task["parts"]
        )
        kept = {side: facts["kept"][number] for side, facts in zip(("train", "held_out"), sides, strict=True)}
        title, spdx = title_and_license(source)
        sources.append({"name": title, "pairs": source.pairs, "license": spdx or "unknown", "read": rows, **kept})
    settings = config.model_dump(mode="json", exclude=_SAME)
    settings["decontaminate"]["against"] = [source.name for source in config.decontaminate.against]
    card = {
        "settings": settings,
        "sources": sources,
        "stages": stages,
        "train": {key: sides[0][key] for key in ("rows", "fingerprint")},
        "held_out": {key: sides[1][key] for key in ("rows", "fingerprint")},
        "leaks": done["decontaminate"].dropped.total(),
    }
    write_json(out / "card.json", card)
    write_text(out / "card.md", card_text(card))
    return card


def share_of(card: dict[str, Any]) -> float:
    """The share of the pairs that is held out; above `split.held_out` where documents that copy each other go too."""
    return card["held_out"]["rows"] / max(card["train"]["rows"] + card["held_out"]["rows"], 1)


def card_text(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    lines = ["# Data card", ""]
    for side in ("train", "held_out"):
        rows, fingerprint = card[side]["rows"], card[side]["fingerprint"]
        share = f", {share_of(card):.1%} of all" if side == "held_out" else ""
        lines.append(f"- {side}: {rows:,} pairs{share}" + (f", fingerprint `{fingerprint}`" if fingerprint else ""))
    lines += ["", "## Sources", "", "| source | pairs | licence | documents read | train | held out |"]
    lines.append("|---|---|---|--:|--:|--:|")
    for s in card["sources"]:
        counts = " | ".join(f"{s[key]:,}" for key in ("read", "train", "held_out"))
        lines.append(f"| {s['name']} | {s['pairs']} | {s['license']} | {counts} |")
    lines += ["", "## Stages", "", "| stage | in | out | left out | reason |", "|---|--:|--:|--:|---|"]
    for s in card["stages"]:
        reasons = list(s["dropped"].items()) or [("", 0)]
        if len(reasons) > _REASONS:
            others = reasons[_REASONS - 1 :]
            rest = (f"{len(others)} other reasons, see card.json", sum(count for _, count in others))
            reasons = [*reasons[: _REASONS - 1], rest]
        for number, (reason, count) in enumerate(reasons):
            head = f"{s['stage']} | {s['in']:,} | {s['out']:,}" if number == 0 else " | | "
            lines.append(f"| {head} | {count:,} | {reason} |".replace("|  |", "| |"))
    lines += [
        "",
        "`read` takes rows and files in and gives documents; `pairs` makes one or several pairs of a document.",
        "What `read` left out stands in rejects.jsonl, what `decontaminate` left out in leaks.jsonl.",
        "",
        "## Settings",
        "",
    ]
    for section, values in card["settings"].items():
        shown = ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, dict) else values
        lines.append(f"- {section}: {shown}")
    return "\n".join(lines) + "\n"
