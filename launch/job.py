"""A run on its way to a platform, and what the files for all of them are made with."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.compat import StringIO
from ruamel.yaml.scalarstring import LiteralScalarString

from launch.config import RunConfig
from launch.config_launch import PORT, Target
from launch.reader import run_name


@dataclass(frozen=True)
class Job:
    """A run on its way to a target."""

    config: RunConfig
    run_file: Path
    overrides: list[str]
    command: str  # that made the file, for its first line

    @property
    def name(self) -> str:
        """A name that every platform takes: small letters, digits and -, at most 40."""
        return re.sub(r"[^a-z0-9]+", "-", run_name(self.run_file).lower()).strip("-")[:40].strip("-") or "run"

    @property
    def grace(self) -> int:
        """Seconds from a platform's signal until it kills: the run's, and some to tell and to end."""
        return round(self.config.train.grace_seconds) + 30

    def node_command(self, target: Target, run_file: str | None = None) -> list[str]:
        """What every node runs."""
        words = [target.python, "-m", "launch.node", "--nodes", str(target.nodes)]
        words += ["--gpus-per-node", str(target.gpus_per_node)] if target.gpus_per_node is not None else []
        words += ["--accelerate", target.accelerate] if target.accelerate else []
        words += ["--port", str(target.port)] if target.port != PORT else []
        return [*words, run_file or str(self.run_file), *self.overrides]


def script(job: Job, comment: Sequence[str], body: Sequence[str]) -> str:
    """A bash script with its comment and its body."""
    return "\n".join(["#!/bin/bash", *(f"# {line}".rstrip() for line in (job.command, *comment)), *body]) + "\n"


def exports(target: Target) -> list[str]:
    """The shell lines of a target's environment."""
    return [f"export {name}={shlex.quote(value)}" for name, value in target.environment.items()]


def wrapped(words: Sequence[str]) -> str:
    """A command of the shell, its overrides on lines of their own where it is long."""
    line = shlex.join(words)
    if len(line) <= 100:
        return line
    place = next(
        i for i, word in enumerate(words) if word.endswith((".yaml", ".yml")) and words[i - 1] != "--accelerate"
    )
    return " \\\n  ".join([shlex.join(words[:place]), *(shlex.quote(word) for word in words[place:])])


def yaml_text(*documents: dict[str, Any]) -> str:
    """Documents of YAML, lines of text as blocks."""
    writer = YAML()
    writer.width = 120
    writer.indent(mapping=2, sequence=4, offset=2)
    stream = StringIO()
    writer.dump_all([_blocks(document) for document in documents], stream)
    return stream.getvalue()


def _blocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _blocks(inner) for key, inner in value.items()}
    if isinstance(value, list):
        blocks = CommentedSeq(_blocks(inner) for inner in value)
        if not any(isinstance(inner, dict) for inner in value):
            blocks.fa.set_flow_style()
        return blocks
    return LiteralScalarString(value) if isinstance(value, str) and "\n" in value else value
