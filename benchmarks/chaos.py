"""Runs that are killed at random moments reach their end unharmed, and damaged checkpoints are never resumed from.

python -m benchmarks.chaos [--quick] [--json FILE] [--seeds FIRST END] [--state FILE]

Each seed draws who is hit (a rank, all ranks, the launcher, the supervisor by kill -9; the supervisor by SIGTERM, one
rank by SIGUSR2), and when (after so many seconds, so many steps, during the token cache, a checkpoint, its upload, the
evaluation, the export), in a run of two processes with dropout under `nestling supervise`. The same command is given
until it is done. Some runs upload to an S3 server that fails (500, cut connections, slow and missing answers); of these
some lose their disk, of the others some find their newest checkpoint damaged. In the end a run has every step once with
the losses of a run that nobody hit, to the last digit, and the same weights; no process and no partial folder is left.

Processes are forked from one that has imported everything, but for the run that nobody hit and one seed in twenty.
Damages: files of the newest checkpoint that are missing, cut, changed in a bit, those of another step, and changed
manifests; what is found then must be the older one. `--state` keeps what each seed gave, so that an interrupted
benchmark goes on. 200 seeds, or 5 with --quick.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import Claim, finish, options, progress, table
from benchmarks.sides import made_texts, tiny_model
from launch.errors import EXIT_DONE, EXIT_PREEMPTED
from tests import forked
from tests.processes import MARK, kill, marked, ranks
from tests.s3_faults import before, moto

ROOT = Path(__file__).parents[1]
TRIES = 6
AT_ONCE = 3  # runs, which often wait
STOPPING = ("supervisor", "SIGTERM to the supervisor", "SIGUSR2 to rank 1")  # after these the command is given again
WHO = ("rank 0", "rank 1", "all ranks", "launcher", *STOPPING)
WHEN = ("seconds", "steps", "steps", "token cache", "checkpoint", "checkpoint", "evaluation", "export")
AFTER = ("nothing", "nothing", "nothing", "disk lost", "newest damaged")
STEPS = 18  # of three epochs
FAULTS = {"500": 0.04, "cut": 0.02, "lost": 0.02, "half": 0.02, "slow": 0.04, "hang": 0.005}  # share of the requests


def faults(method: str, path: str, number: int) -> str | None:
    """What happens to a request, drawn anew for each of a seed's."""
    draw = random.Random(f"{method} {path} {number}").random()
    for fault, share in FAULTS.items():
        if (draw := draw - share) < 0:
            return fault
    return None


def run_file(folder: Path, model: Path, parts: str = "", remote: str | None = None) -> Path:
    """A run of a tiny model, a checkpoint every 4 steps; with an evaluation and an export where `parts` names them."""
    texts = made_texts(200, 12)
    for name, first, end in (("rows", 0, 52), ("held", 70, 100)):
        rows = [{"anchor": a, "positive": b} for a, b in zip(texts[first:end], texts[100 + first :], strict=False)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{path: {model}, dropout: 0.1}}\n"
        f"data: {{sources: [{{path: {folder}/rows.jsonl}}], cache_dir: {folder}/cache}}\n"
        f"train: {{run_dir: {folder}/run, global_batch_size: 8, epochs: 3, micro_batch_tokens: 64, report_to: []}}\n"
        f"checkpoint: {{every: 4, remote: {remote or 'null'}}}\n"
        + f"evaluate: {{sources: [{{path: {folder}/held.jsonl}}], vectors: [float32]}}\n" * ("evaluation" in parts)
        + "export: {}\n" * ("export" in parts)
    )
    return path


def start(path: Path, mark: str, endpoint: str = "") -> "subprocess.Popen[bytes]":
    """The run under its supervisor, in a session of its own, its output in a file."""
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    launch += ["--config_file", str(ROOT / "configs/accelerate/cpu.yaml"), str(ROOT / "train.py"), str(path)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1", MARK: mark}
    environment |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_TIMEOUT": "5s"}
    with (path.parent / "out.txt").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "supervise", *launch],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait(draw: random.Random, when: str, folder: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until the moment that was drawn, or the end of the run."""
    run, at = folder / "run", draw.randrange(1, STEPS)
    begin, seconds, more = time.monotonic(), draw.uniform(0, 12), draw.uniform(0, 0.2)
    log = run / "metrics.jsonl"

    def is_late() -> bool:
        return log.exists() and log.read_text().count("\n") >= at

    reached: dict[str, Callable[[], Any]] = {
        "seconds": lambda: time.monotonic() - begin > seconds,
        "steps": is_late,
        "token cache": (folder / "cache").exists,
        "checkpoint": lambda: is_late() and [*run.glob("checkpoints/.partial-*")],
        "upload": lambda: is_late() and [*run.glob("checkpoints/step-*")],  # it begins when the folder is there
        "evaluation": lambda: "\nevaluation: " in (folder / "out.txt").read_text(),
        "export": lambda: [*run.glob(".partial-*")],
    }
    while process.poll() is None and not reached[when]():
        time.sleep(0.004)
    if when != "seconds":
        time.sleep(more)


def hit(who: str, mark: str, process: "subprocess.Popen[bytes]") -> None:
    """Do it to whoever of them is there."""
    number = signal.SIGTERM if "SIGTERM" in who else signal.SIGUSR2 if "SIGUSR2" in who else signal.SIGKILL
    try:
        if "rank" in who:
            targets = [one for rank, one in ranks(mark).items() if str(rank) in who or "all" in who]
            # Before a rank can answer a signal there is nothing to ask it for.
            targets = [t for t in targets if number == signal.SIGKILL or t.num_threads() > 2]
        elif "launcher" in who:
            targets = psutil.Process(process.pid).children()
        else:
            targets = [psutil.Process(process.pid)]
        for target in targets:
            target.send_signal(number)
    except psutil.Error:
        pass


def damage(draw: random.Random, run_dir: Path) -> tuple[str, Path] | None:
    """Damage the newest checkpoint; what was done, and the checkpoint before it. None where there are less than two."""
    from trainer import checkpoint

    steps = sorted(int(p.name.removeprefix("step-")) for p in run_dir.glob("checkpoints/step-*"))
    if len(steps) < 2:
        return None
    older, newest = (checkpoint.folder_of(run_dir, step) for step in steps[-2:])
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    other = [path for path in files if path.read_bytes() != (older / path.relative_to(newest)).read_bytes()]
    kind = draw.choice(("missing", "cut", "bit", "other step", "manifest"))
    path = draw.choice(other if kind == "other step" else files)
    if kind == "manifest":
        path = newest / checkpoint.MANIFEST
        manifest = json.loads(path.read_text())
        changes: dict[str, Any] = {"step": steps[-2], "engine": "fsdp2", "format": 2, "files": {}}
        name = draw.choice([*changes, "one file"])
        if name == "one file":
            del manifest["files"][draw.choice(list(manifest["files"]))]
        path.write_text(json.dumps(manifest | {name: changes.get(name)}))
    elif kind == "missing":
        path.unlink()
    elif kind == "other step":
        shutil.copy(older / path.relative_to(newest), path)
    else:
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        if kind == "bit":
            content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content[:place] if kind == "cut" else content)
    return f"{kind} of {path.name}", older


def afterwards(draw: random.Random, after: str, folder: Path, listing: str) -> str | None:
    """Do to a run that has ended early what comes after; the words that it must say then."""
    if after == "disk lost":
        for name in ("run", "cache"):
            shutil.rmtree(folder / name, ignore_errors=True)
        with urllib.request.urlopen(listing) as found:
            return "resuming from" if b"/manifest.json" in found.read() else None
    if after == "newest damaged" and damage(draw, folder / "run"):
        return "falling back to an older checkpoint"
    return None


def is_finished(folder: Path) -> bool:
    """Whether the run has reached its end."""
    record = folder / "run/run.json"
    return record.exists() and json.loads(record.read_text())["finished"] is not None


def curve(folder: Path) -> tuple[list[tuple[int, float]], list[bytes]]:
    """(step, loss) of every line of the log, and the model."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    files = [(folder / "run/model" / name).read_bytes() for name in ("model.safetensors", "config.json")]
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)], files


def one(seed: int, work: Path, server: str, proxy: str) -> dict[str, Any]:
    """One run that is hit once, and what came of it; its folder stays."""
    draw, begin = random.Random(seed), time.monotonic()
    after = draw.choice(AFTER)
    who = draw.choice(WHO if after == "nothing" else STOPPING)
    has_bucket = after == "disk lost" or (after == "nothing" and draw.random() < 0.2)
    when = draw.choice((*WHEN, "upload", "upload") if has_bucket else WHEN)
    folder, mark = work / f"seed-{seed}", f"{os.getpid()}-{seed}"
    folder.mkdir()
    path = run_file(folder, work / "model", when, f"s3://bucket/seed-{seed}" if has_bucket else None)
    listing = f"{server}/bucket?list-type=2&prefix=seed-{seed}/checkpoints/"
    codes: list[int] = []
    strays, said, must_say = 0, "", None
    with forked.executing() if seed % 20 == 19 else nullcontext():
        while len(codes) < TRIES and not is_finished(folder):
            process = start(path, mark, proxy)
            if not codes:
                wait(draw, when, folder, process)
                hit(who, mark, process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=400)
                # A launcher kills a rank that does not answer 70 s after it was told to stop: train.grace_seconds + 10.
                deadline = time.monotonic() + 90
                while marked(mark) and time.monotonic() < deadline:
                    time.sleep(0.2)
            strays += kill(mark)
            codes.append(process.wait())
            if len(codes) == 1 and not is_finished(folder):
                said = (folder / "out.txt").read_text()
                must_say = afterwards(draw, after, folder, listing)
    is_said = must_say is None or must_say in (folder / "out.txt").read_text()[len(said) :]
    is_whole = is_finished(folder) and not strays and not [*folder.rglob(".partial-*")] and is_said
    # A supervisor that is killed in the last moment can say nothing of a run that is done.
    is_lost = not is_whole or (codes[-1] != EXIT_DONE and codes != [-signal.SIGKILL])
    after = f"{after}, {must_say}" if must_say else after
    return {
        **{"seed": seed, "who": who, "when": when, "after": after, "bucket": has_bucket, "codes": codes},
        **{"strays": strays, "lost": is_lost, "seconds": round(time.monotonic() - begin, 1)},
    }


def killed(seeds: Sequence[int], work: Path, state: Path | None) -> tuple[list[dict[str, Any]], Path]:
    """What came of the seeds, and the folder of a run that nobody hit."""
    whole = work / "whole"
    whole.mkdir()
    results: dict[int, dict[str, Any]] = {}
    if state and state.exists():
        results = {r["seed"]: r for r in map(json.loads, state.read_text().splitlines())}
    os.environ |= forked.ROOM | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(forked.modules())
    with moto() as server, before(server, faults) as proxy:
        urllib.request.urlopen(urllib.request.Request(f"{server}/bucket", method="PUT"))
        nobody = start(run_file(whole, work / "model"), f"{os.getpid()}-whole")
        with ProcessPoolExecutor(AT_ONCE, context, forked.install) as pool:
            todo = [seed for seed in seeds if seed not in results]
            runs = [pool.submit(one, seed, work, server, proxy.address) for seed in todo]
            assert nobody.wait() == EXIT_DONE, (whole / "out.txt").read_text()
            for run in as_completed(runs):
                found = run.result()
                folder = work / f"seed-{found['seed']}"
                found["diverged"] = not found["lost"] and curve(folder) != curve(whole)
                if found["lost"] or found["diverged"]:
                    print((folder / "out.txt").read_text()[-5000:])
                shutil.rmtree(folder)
                progress(", ".join(f"{key} {value}" for key, value in found.items()))
                results[found["seed"]] = found
                if state:
                    with state.open("a") as file:
                        file.write(json.dumps(found) + "\n")
    return [results[seed] for seed in seeds], whole


def damaged(work: Path, whole: Path, seeds: range) -> int:
    """How many damaged checkpoints were taken for whole."""
    from trainer import checkpoint

    accepted = 0
    for seed in seeds:
        run_dir = work / "damaged"
        shutil.copytree(whole / "run/checkpoints", run_dir / "checkpoints")
        done = damage(random.Random(seed), run_dir)
        assert done is not None, "two checkpoints are kept at least"
        if checkpoint.find_latest(run_dir, lambda _: None) != done[1]:
            accepted += 1
            progress(f"damage {seed}: {done[0]} was taken for whole")
        shutil.rmtree(run_dir)
    return accepted


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "END"), help="seeds of the kills")
    parser.add_argument("--state", type=Path, help="file that keeps what each seed gave")
    args = parser.parse_args(argv)
    seeds = range(*(args.seeds or (0, 5 if args.quick else 200)))
    damages = range(20 if args.quick else 200)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        tiny_model(work / "model", 32, 2, 64)
        taken, whole = killed(seeds, work, args.state)
        progress("damages")
        accepted = damaged(work, whole, damages)
        progress("done")
    rows = []
    for key, values in (("who", WHO), ("when", {*WHEN, "upload"}), ("after", {r["after"] for r in taken})):
        for value in sorted(values):
            found = [r for r in taken if r[key] == value]
            again = sum(EXIT_PREEMPTED in r["codes"] for r in found)
            rows.append([value, len(found), again, *(sum(r[name] for r in found) for name in ("lost", "diverged"))])
    table(["hit, moment, what came after", "runs", "ended with 75 first", "lost", "diverged"], rows)
    lost, diverged = (sum(r[key] for r in taken) for key in ("lost", "diverged"))
    where = (
        f"{len(seeds)} runs of 2 processes, each hit once (seeds {seeds[0]} to {seeds[-1]}), {STEPS} steps with "
        f"dropout; {sum(r['bucket'] for r in taken)} of them with an S3 server that fails"
    )
    numbers = {
        "lost_runs": (lost, "runs", f"not at their end, or something left; {where}"),
        "diverged_curves": (diverged, "runs", f"another digit of a loss or weight; {where}"),
        "damaged_accepted": (accepted, "checkpoints", f"of {len(damages)} damaged ones, seeded"),
    }
    claims = [Claim(f"chaos.{name}", value, unit, "lower", "none", how) for name, (value, unit, how) in numbers.items()]
    return finish(claims, args)


if __name__ == "__main__":
    sys.exit(main())
