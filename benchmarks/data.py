"""`nestling data run` on a generated corpus: documents/s by stage, and whether memory and time grow with the corpus.

Documents of 20 to 120 words, drawn from 20,000 words by a seed, of which one in ten is a near-copy of an earlier one.
Each size runs in a fresh process with one worker: 100 thousand and 1 million documents, together some six minutes.
"""

import contextlib
import io
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import Claim, finish, options, peak, progress, table

_WORDS = 20_000
_FILE_ROWS = 50_000


def documents(count: int) -> Iterator[dict[str, str]]:
    """Rows with id, anchor and positive; the same for the same count."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(_WORDS)]
    # Words as frequent as in real text, by Zipf's law.
    weights = [1 / rank for rank in range(10, _WORDS + 10)]
    pool = rng.choices(words, weights, k=1 << 20)
    recent: list[list[str]] = []
    for number in range(count):
        if recent and number % 10 == 0:
            text = list(rng.choice(recent))
            text[rng.randrange(len(text))] = "changed"
        else:
            start = rng.randrange(len(pool) - 200)
            text = rng.sample(pool[start : start + 200], rng.randint(20, 120))
            recent = [*recent[-999:], text]
        yield {"id": str(number), "anchor": " ".join(rng.sample(pool[:1000], 8)), "positive": " ".join(text)}


def _alone(count: int) -> dict[str, Any]:
    """Seconds of each stage and the peak of memory for so many documents, in this process."""
    from data_tools import pipeline, runner
    from data_tools.config import Pipeline

    seconds: dict[str, float] = {}
    inner = runner.run_stage

    def timed_stage(folder: Path, *arguments: Any, **settings: Any) -> Any:
        begin = time.process_time()
        done = inner(folder, *arguments, **settings)
        seconds[folder.name] = time.process_time() - begin
        return done

    with tempfile.TemporaryDirectory() as folder:
        sources = []
        rows = documents(count)
        for start in range(0, count, _FILE_ROWS):
            path = Path(folder) / f"{start}.jsonl"
            with path.open("w") as file:
                file.writelines(json.dumps(next(rows)) + "\n" for _ in range(min(_FILE_ROWS, count - start)))
            sources.append({"path": str(path)})
        settings: dict[str, Any] = {"out": f"{folder}/out", "sources": sources, "workers": 1}
        # As many documents are held out at every size: memory grows with them by design.
        settings["split"] = {"held_out": 1000 / count}
        pipeline.run_stage = timed_stage
        with contextlib.redirect_stdout(io.StringIO()):
            card = pipeline.run(Pipeline.model_validate(settings))
    assert card is not None
    return {"seconds": seconds, "peak": peak(), "card": card}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = options(__doc__).parse_args(argv)
    sizes = (2_000, 6_000) if args.quick else (100_000, 1_000_000)
    results = {}
    for size in sizes:
        context = multiprocessing.get_context("spawn")  # without torch, as the command runs
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results[size] = pool.submit(_alone, size).result()
        progress(f"{size:,} documents done, peak {results[size]['peak'] / 2**20:,.0f} MiB")
    small, large = (results[size] for size in sizes)
    print()
    names = list(large["seconds"])
    table(
        ["stage", *(f"documents/s at {size:,}" for size in sizes)],
        [[name, *(size / max(results[size]["seconds"][name], 1e-3) for size in sizes)] for name in names],
    )
    spent = {size: sum(results[size]["seconds"].values()) for size in sizes}
    where = (
        f"{sizes[1]:,} against {sizes[0]:,} generated documents of 20 to 120 words, all stages, one worker, "
        f"{large['card']['train']['rows']:,} rows of train kept"
    )
    claims = [
        Claim("data.documents_per_s", sizes[1] / spent[sizes[1]], "1/s", "higher", None, f"CPU time, {where}"),
        Claim("data.memory_growth", large["peak"] / small["peak"], "times", "lower", None, f"peak memory, {where}"),
        Claim(
            "data.time_linearity",
            spent[sizes[1]] / sizes[1] / (spent[sizes[0]] / sizes[0]),
            "times",
            "lower",
            None,
            f"CPU time a document, {where}",
        ),
    ]
    return finish(claims, args)


if __name__ == "__main__":
    sys.exit(main())
