"""One holder of a run's address at a time, against real stores: `python -m pytest tests/test_lease.py`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from data_tools.object_store import delete_objects, read_object, read_versioned, replace_object, write_object
from launch.config import RunConfig
from launch.errors import UserError
from launch.world import read_world
from tests.conftest import point_to
from tests.s3_faults import before
from trainer.lease import Lease
from trainer.run_folder import LEASE_NOTE, held

ROOT = Path(__file__).parents[1]
TAKE_OVER = 2.0
HOLDER = """
import sys, time
from pathlib import Path
from launch.errors import UserError
from trainer.lease import Lease
lease = Lease(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
try:
    lease.acquire()
except UserError as error:
    sys.exit(str(error))
print("held", flush=True)
for line in sys.stdin:
    if line == "release\\n":
        lease.release()
    print(lease.is_held(), lease.is_lost(), lease.problem if lease.is_lost() else "", flush=True)
"""


@pytest.fixture(params=["s3", pytest.param("file", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty place in each kind of store; the S3 server looks and writes in two steps, the one before it in one."""
    if request.param == "file":
        yield f"file://{tmp_path}/bucket/run"
        return
    with before(request.getfixturevalue("s3")) as proxy:
        point_to(proxy.address, monkeypatch)
        yield "s3://bucket/run"


@contextmanager
def _process(url: str, note: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, url, str(note), str(TAKE_OVER)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ask(process: subprocess.Popen[str], word: str = "") -> str:
    assert process.stdin and process.stdout
    process.stdin.write(word + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def _facts(url: str) -> dict[str, object]:
    return json.loads(read_object(url, "lease.json") or b"{}")


def _until(condition: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():  # pyright: ignore[reportCallIssue]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_living_holder_is_named_and_a_dead_one_taken_over(url: str, tmp_path: Path) -> None:
    mine = Lease(url, tmp_path / "mine", TAKE_OVER)
    with _process(url, tmp_path / "note") as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        assert _ask(other) == "True False"
        with pytest.raises(UserError) as caught:
            mine.acquire()
        assert f"{url} is in use by a run that is going on (host {socket.gethostname()}, process {other.pid}, sin" in (
            str(caught.value)
        )
        assert "\n" not in str(caught.value) and not mine.is_held() and not mine.is_lost()
        assert _ask(other) == "True False"
        number = _facts(url)["number"]
        other.kill()
        killed = time.monotonic()
    mine.acquire()
    # The last renewal was up to TAKE_OVER / 4 before the kill; nobody looked then.
    assert TAKE_OVER <= time.monotonic() - killed < 3 * TAKE_OVER
    assert mine.is_held() and _facts(url) | {"number": 2, "pid": os.getpid()} == _facts(url) and number == 1
    mine.release()
    assert not mine.is_lost() and _facts(url)["released"]


@pytest.mark.slow
def test_who_slept_through_the_take_over_has_lost_it(url: str, tmp_path: Path) -> None:
    mine = Lease(url, tmp_path / "mine", TAKE_OVER)
    with _process(url, tmp_path / "note") as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        other.send_signal(signal.SIGSTOP)
        mine.acquire()
        other.send_signal(signal.SIGCONT)
        # It may not write from its first moment on, before it has asked the store.
        assert _ask(other).startswith("False ")
        _until(lambda: _ask(other).startswith("False True"))
        assert (
            f"was taken over by another process of this run (host {socket.gethostname()}, process {os.getpid()}, "
            in (_ask(other))
        )
        assert _ask(other, "release").startswith("False True") and not _facts(url)["released"]
    time.sleep(TAKE_OVER)
    assert mine.is_held()
    mine.release()


def test_a_released_lease_and_the_same_folder_s_own_are_had_at_once(url: str, tmp_path: Path) -> None:
    for note, way in (("a", "release"), ("b", "kill"), ("b", "kill")):
        with _process(url, tmp_path / note) as process:
            start = time.monotonic()
            assert process.stdout and process.stdout.readline() == "held\n"
            assert time.monotonic() - start < TAKE_OVER
            if way == "release":
                assert _ask(process, way).endswith("False")
    assert _facts(url)["number"] == 3


def test_of_several_changes_from_one_version_one_is_made(url: str) -> None:
    assert replace_object(url, "n", b"0", None) and not replace_object(url, "n", b"1", None)
    assert not replace_object(url, "n", b"1", {"e_tag": '"0"'}) and read_object(url, "n") == b"0"
    assert not replace_object(url, "other", b"1", {"e_tag": '"0"'}) and read_object(url, "other") is None

    def count(_: int) -> None:
        for _ in range(5):
            done = False
            while not done:
                content, version = read_versioned(url, "n")
                done = replace_object(url, "n", b"%d" % (int(content or b"") + 1), version)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert read_object(url, "n") == b"20"


def test_a_store_that_ignores_conditions_has_one_holder_soon(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://bucket/run"
    with before(s3) as proxy:
        proxy.dropped |= {"if-match", "if-none-match"}
        point_to(proxy.address, monkeypatch)
        leases = [Lease(url, tmp_path / str(number), TAKE_OVER) for number in range(2)]
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(lease.acquire) for lease in leases]:
                with suppress(UserError):
                    done.result()
        _until(lambda: sum(lease.is_held() for lease in leases) == 1, TAKE_OVER)
        for lease in leases:
            lease.release()


def test_release_takes_nothing_from_another(url: str, tmp_path: Path) -> None:
    lease = Lease(url, tmp_path / "note")  # the next renewal is far away
    lease.acquire()
    write_object(url, "lease.json", b'{"number": 2}')
    lease.release()
    assert _facts(url) == {"number": 2}


def test_of_many_at_once_one_gets_it(url: str, tmp_path: Path) -> None:
    leases = [Lease(url, tmp_path / str(number), TAKE_OVER) for number in range(6)]

    def acquire(lease: Lease) -> bool:
        try:
            lease.acquire()
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(acquire, leases))
    assert sum(got) == 1
    assert [lease.is_held() for lease in leases] == got
    for lease in leases:
        lease.release()
    assert _facts(url)["released"]


@pytest.mark.slow
def test_a_store_that_is_away_for_a_while_takes_nothing_away(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wall clock that goes backwards all the time.
    ticks = iter(range(10**9, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    with before(s3, lambda _m, _p, number: "lost" if number % 3 == 1 else None) as proxy:
        point_to(proxy.address, monkeypatch)
        lease = Lease("s3://bucket/run", tmp_path / "note", TAKE_OVER)
        lease.acquire()
        for _ in range(20):
            time.sleep(TAKE_OVER / 10)
            assert lease.is_held(), "an answer that is lost is no loss"
        proxy.plan = lambda *_: "cut"
        _until(lambda: not lease.is_held())
        time.sleep(TAKE_OVER)
        assert not lease.is_lost() and not lease.is_held()
        proxy.plan = lambda *_: None
        _until(lease.is_held)
        # Removed by hand: nobody else has it.
        delete_objects("s3://bucket/run", ["lease.json"])
        _until(lambda: bool(_facts("s3://bucket/run")))
        assert lease.is_held()
        # Taken over while the store was away.
        write_object("s3://bucket/run", "lease.json", json.dumps({"number": 9, "host": "h", "pid": 1}).encode())
        _until(lease.is_lost)
        assert "taken over by another process of this run (host h, process 1, " in lease.problem
        lease.release()
        assert _facts("s3://bucket/run")["number"] == 9


def test_a_lease_that_cannot_be_read_is_waited_for(url: str, tmp_path: Path) -> None:
    write_object(url, "lease.json", b'{"number":')
    lease, start = Lease(url, tmp_path / "note", 0.5), time.monotonic()
    lease.acquire()
    assert time.monotonic() - start >= 0.5 and lease.is_held()
    lease.release()


def test_a_run_folder_that_has_only_a_lease_s_note_is_a_new_one(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "data": {"sources": [{"path": "a.csv"}]}, "train": {"global_batch_size": 1}}
    config, run_dir = RunConfig.model_validate(values), tmp_path / "run"
    with held(run_dir, config, read_world({})):
        Lease(f"file://{tmp_path}/bucket", run_dir / LEASE_NOTE)
    assert not run_dir.exists(), "nothing else was written"
    run_dir.mkdir()
    Lease(f"file://{tmp_path}/bucket", run_dir / LEASE_NOTE)  # and killed
    with held(run_dir, config, read_world({})):
        pass


def test_a_store_that_is_gone_is_one_line(s3: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="s3://nobucket/run: there is no such bucket"):
        Lease("s3://nobucket/run", tmp_path / "note", TAKE_OVER).acquire()
