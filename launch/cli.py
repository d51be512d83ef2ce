"""The `nestling` command: run files, static checks, and the way to the other programs of the distribution.

Verbs of data_tools and trainer replace this process by `python -m MODULE` with their arguments untouched, so
exit codes and signals are theirs and this one answers without loading what they need.
"""

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from launch.errors import EXIT_DONE, EXIT_USER, UserError, exit_code

_STAGES = {
    "run": "sources -> clean, leak-proof shards, by a config",
    "read": "its stages one by one: read the sources",
    "pairs": "make and cut pairs",
    "filter": "leave out short, long, foreign and boilerplate texts",
    "dedup": "leave out equal and nearly equal pairs",
    "split": "hold documents out",
    "decontaminate": "leave out what evaluation sets have",
    "shards": "write the shards",
}
# Verb -> module and its first arguments, a package that it needs, the extra that brings it, help.
PROGRAMS = {
    **{f"data {verb}": (f"data_tools.pipeline {verb}", "pyarrow", "data", words) for verb, words in _STAGES.items()},
    "data mine": ("trainer.mine", "torch", "train", "add hard negatives that a model finds"),
    "data verify": ("data_tools.look verify", "pyarrow", "data", "compare shards with their manifest"),
    "data stats": ("data_tools.look stats", "pyarrow", "data", "count rows and characters of shards"),
    "data show": ("data_tools.look show", "pyarrow", "data", "print the first rows of shards"),
    "plan": ("trainer.plan", "torch", "train", "memory, time and price of a run on GPUs that are not here"),
    "embed": ("trainer.bulk", "torch", "train", "texts of a file -> vectors, with any model or bundle"),
    "eval": ("trainer.eval_cli", "torch", "train", "judge a model or bundle by retrieval"),
    "export": ("trainer.export.cli", "torch", "train", "write the ONNX bundle of a model or run"),
    "verify": ("trainer.export.verify", "onnxruntime", "", "check a bundle without torch"),
    "sign": ("trainer.export.signing sign", "model_signing", "sign", "sign a bundle with a key of your own"),
    "check-signature": ("trainer.export.signing check-signature", "model_signing", "sign", "check who signed a bundle"),
    "publish": ("trainer.export.publish", "onnxruntime", "", "bring a bundle to a folder, object store or hub"),
    "report": ("trainer.report", "jinja2", "train", "write one HTML page about a run, or several"),
}
SUPERVISE = "nestling supervise accelerate launch [...] train.py RUN.yaml [section.key=value ...]"
EPILOG = """\
training:
  accelerate launch --config_file configs/accelerate/cpu.yaml train.py RUN.yaml [section.key=value ...]
  goes on with a run that was stopped; --fresh starts anew in a new folder, --force goes on with other settings
  the same after `nestling supervise` is started again after a crash, and ends with these exit codes

embedding in many processes:
  accelerate launch [...] -m trainer.bulk MODEL TEXTS --out DIR does what `nestling embed` does in one

exit codes:
  0 done, 1 crash, 2 user error (one line each), 3 a check failed, 75 preempted and saved
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    return exit_code(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    words = list(argv)
    for verb in PROGRAMS:
        count = len(verb.split())
        if words[:count] == verb.split():
            _become(verb, words[count:])
    if words[:1] == ["supervise"] and not {"-h", "--help"}.intersection(words[1:2]):
        from launch.supervise import supervise

        return supervise(words[1:])
    if words[:1] == ["launch"]:
        from launch import targets

        return targets.main(words[1:])
    arguments = _arguments(words)
    from launch import preflight, reader

    if arguments.verb == "config" and arguments.kind == "schema":
        print(json.dumps(reader.schema(), indent=2))
        return EXIT_DONE
    config = reader.read_run(arguments.run_file, arguments.overrides)
    if arguments.verb == "config":
        sys.stdout.write(reader.resolved_yaml(config))
        return EXIT_DONE
    preflight.require_preflight(config, arguments.run_file)
    run_dir = reader.run_directory(config, arguments.run_file)
    print(f"{arguments.run_file}: no problem found; a run would write to {run_dir}")
    return EXIT_DONE


def _become(verb: str, arguments: Sequence[str]) -> None:
    """Replace this process by the program behind `verb`."""
    from launch.preflight import require_extra

    module, needed, extra, _ = PROGRAMS[verb]
    require_extra(needed, extra, f"nestling {verb}")
    environment = dict(os.environ)
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # a checkout, which need not be installed
        paths = (environment.get("PYTHONPATH"), str(root))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.stdout.flush()
    sys.stderr.flush()
    # -P: a folder named trainer where the user stands must not stand in for ours.
    os.execve(sys.executable, [sys.executable, "-P", "-m", *module.split(), *arguments], environment)


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    """Arguments of the verbs that need no other program."""
    parser = argparse.ArgumentParser(
        prog="nestling",
        description="Fine-tune text-embedding models: run files, data, checks, ONNX bundles.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nestling {version()}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    config = verbs.add_parser("config", help="show a run with every setting, or the schema for editors")
    kinds = config.add_subparsers(dest="kind", metavar="KIND", required=True)
    show = kinds.add_parser("show", help="the resolved run as YAML")
    kinds.add_parser(
        "schema",
        help="the JSON schema of run files",
        description="Print the JSON schema of run files. With it in FILE, editors complete a run file whose "
        "first line is: # yaml-language-server: $schema=FILE",
    )
    check = verbs.add_parser("check", help="find what is wrong with a run before anything is loaded")
    for command in (show, check):
        command.add_argument("run_file", type=Path, metavar="RUN.yaml")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    data = verbs.add_parser("data", help="make, look at and check training data; see nestling data --help")
    kinds = data.add_subparsers(dest="kind", metavar="KIND", required=True)
    for verb, (*_, words_of_it) in PROGRAMS.items():
        (kinds if verb.startswith("data ") else verbs).add_parser(verb.removeprefix("data "), help=words_of_it)
    verbs.add_parser("launch", help="start a run on this machine, Slurm, Kubernetes, SkyPilot or another service")
    verbs.add_parser("supervise", help="start a run, and again after a crash", usage=SUPERVISE)
    if words and not words[0].startswith("-") and words[0] not in verbs.choices:
        from launch.reader import did_you_mean

        hint = did_you_mean(words[0], verbs.choices)
        raise UserError(f"got {words[0]!r}, allowed: {', '.join(verbs.choices)}{hint}")
    if not words:
        parser.print_help(sys.stderr)
        sys.exit(EXIT_USER)
    return parser.parse_args(words)


def version() -> str:
    """The version of nestling that runs."""
    try:
        return metadata.version("nestling")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] + " (checkout)"


if __name__ == "__main__":
    sys.exit(main())
