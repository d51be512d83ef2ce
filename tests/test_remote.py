"""Checkpoints in an object store, against a real S3 server that fails: `python -m pytest tests/test_remote.py`."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
from obstore.store import from_url

from data_tools import object_store
from launch.config import RunConfig
from launch.errors import EXIT_CRASH, UserError
from launch.files import list_files
from launch.world import World
from tests.conftest import free_port, point_to
from tests.s3_faults import before
from tests.vectors import ALONE
from trainer import checkpoint, remote
from trainer.live_checks import check_shared_folder
from trainer.run_folder import held

ROOT = Path(__file__).parents[1]
URL = "s3://bucket/runs/one"
_SLOW = pytest.mark.slow
BIG = 20 << 20  # three parts


def _write(run_dir: Path, step: int, size: int = 50_000) -> Path:
    """A published checkpoint of pseudo-random files."""
    partial = checkpoint.partial_of(run_dir, step)
    (partial / "optimizer").mkdir()
    (partial / "a.safetensors").write_bytes(np.random.default_rng(step).bytes(size))
    (partial / "optimizer" / "b.bin").write_bytes(random.Random(step + 1000).randbytes(3000))
    (partial / "c.json").write_text(json.dumps({"step": step}))
    (partial / "empty").touch()
    final = checkpoint.folder_of(run_dir, step)
    checkpoint.publish(partial, final, {"step": step, "engine": "ddp"})
    return final


def _line(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _stored(url: str) -> dict[str, str]:
    """Name -> SHA-256 of what is there, read by the client's plain calls."""
    store = from_url(url)
    names = [found["path"] for page in obstore.list(store) for found in page]
    return {name: hashlib.sha256(obstore.get(store, name).bytes()).hexdigest() for name in names}


def _warn_never(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place in each kind of store that is at hand."""
    if request.param == "file":
        return f"file://{tmp_path}/bucket/runs/one"
    request.getfixturevalue("s3")
    return URL


def test_a_checkpoint_goes_there_and_back(url: str, tmp_path: Path) -> None:
    assert remote.newest(url) is None
    for step in (5, 10, 9):
        remote.upload(url, _write(tmp_path / "run", step))
    assert remote.newest(url) == 10
    stored, local = _stored(f"{url}/checkpoints"), list_files(tmp_path / "run" / "checkpoints")
    assert stored == {name: facts["sha256"] for name, facts in local.items()}
    # Several processes of a fresh machine.
    with ThreadPoolExecutor(3) as pool:
        (came,) = set(pool.map(lambda _: remote.fetch(url, 10, tmp_path / "other", _warn_never), range(3)))
    assert came == checkpoint.find_latest(tmp_path / "other", _warn_never)
    assert list_files(came) == list_files(checkpoint.folder_of(tmp_path / "run", 10))
    assert remote.fetch(url, 4, tmp_path / "other", _warn_never) is None
    assert [p.name for p in (tmp_path / "other" / "checkpoints").iterdir() if p.is_dir()] == ["step-10"]


def test_a_checkpoint_of_this_step_that_the_run_did_not_go_on_from_is_replaced(url: str, tmp_path: Path) -> None:
    remote.upload(url, _write(tmp_path / "a", 5))
    other = _write(tmp_path / "b", 5, size=7)
    remote.upload(url, other)
    came = remote.fetch(url, 5, tmp_path / "c", _warn_never)
    assert came and list_files(came) == list_files(other)


def test_a_damaged_local_checkpoint_is_replaced_and_a_whole_one_not_fetched(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = _write(tmp_path, 5)
    before_damage = list_files(local)
    remote.upload(URL, local)
    (local / "a.safetensors").write_bytes(b"damaged")
    assert remote.fetch(URL, 5, tmp_path, _warn_never) == local
    assert list_files(local) == before_damage
    with before(s3) as proxy:
        point_to(proxy.address, monkeypatch)
        assert remote.fetch(URL, 5, tmp_path, _warn_never) == local
        assert not proxy.count("GET", "/bucket/runs/one/checkpoints/step-5/")


def test_an_upload_that_was_stopped_goes_on(url: str, tmp_path: Path) -> None:
    folder, asked = _write(tmp_path, 5, size=BIG), []

    def is_stopped() -> bool:
        asked.append(len(asked))
        return len(asked) >= 2  # within the first file

    assert "its upload was stopped" in _line(lambda: remote.upload(url, folder, is_stopped))
    assert remote.newest(url) is None and "checkpoints/step-5/a.safetensors" not in _stored(url)
    remote.upload(url, folder)
    assert remote.newest(url) == 5


KILLED = """
import sys
from pathlib import Path
from trainer import remote
remote.upload(sys.argv[1], Path(sys.argv[2]))
"""


def test_an_upload_that_was_killed_sends_only_what_is_missing(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write(tmp_path, 5, size=BIG)
    with before(s3, lambda method, path, _: "hang" if method == "PUT" and "c.json" in path else None) as proxy:
        point_to(proxy.address, monkeypatch)
        process = subprocess.Popen([sys.executable, "-c", KILLED, URL, str(folder)], cwd=ROOT)
        while not proxy.count("PUT", "c.json"):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert proxy.count("PUT", "a.safetensors") == 3, "in parts"
        assert remote.newest(URL) is None
        proxy.plan = lambda *_: None
        proxy.asked.clear()
        remote.upload(URL, folder)
        assert not proxy.count("PUT", "a.safetensors") and not proxy.count("POST", "a.safetensors")
        assert proxy.count("PUT", "c.json") == 1
        writes = [path for method, path in proxy.asked if method in ("PUT", "POST")]
        assert writes[-1].endswith("step-5/manifest.json")
        proxy.asked.clear()
        remote.upload(URL, folder)
        assert {method for method, _ in proxy.asked} == {"GET", "HEAD"}, "a whole one is looked at only"
        came = remote.fetch(URL, 5, tmp_path / "other", _warn_never)
        assert came and list_files(came) == list_files(folder)


@pytest.mark.parametrize("fault", ["500", "cut", *(pytest.param(f, marks=_SLOW) for f in ("lost", "half", "slow"))])
def test_every_kind_of_request_fails_once(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def the_first_time(_: str, path: str, number: int) -> str | None:
        return fault if not number and any(part in path for part in ("a.saf", "manifest", "list-type")) else None

    folder = _write(tmp_path, 5)
    with before(s3, the_first_time) as proxy:
        point_to(proxy.address, monkeypatch)
        remote.upload(URL, folder)
        assert remote.newest(URL) == 5
        came = remote.fetch(URL, 5, tmp_path / "other", _warn_never)
        if fault not in ("half", "slow"):
            assert proxy.count("PUT", "step-5/manifest.json") == 2 and proxy.count("GET", "a.safetensors") == 2
        assert came and list_files(came) == list_files(folder)
        proxy.plan = lambda *_: None
        assert _stored(f"{URL}/checkpoints/step-5") == {n: f["sha256"] for n, f in list_files(folder).items()}


@pytest.mark.parametrize("fault", ["lost", *(pytest.param(f, marks=_SLOW) for f in ("500", "cut"))])
def test_each_part_of_a_large_file_fails_once(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder = _write(tmp_path, 5, size=BIG)
    with before(s3, lambda method, path, n: fault if method == "PUT" and "partNumber" in path and not n else None) as p:
        point_to(p.address, monkeypatch)
        remote.upload(URL, folder)
        assert p.count("PUT", "partNumber") == 6
        assert _stored(f"{URL}/checkpoints/step-5") == {n: f["sha256"] for n, f in list_files(folder).items()}


@pytest.mark.slow
def test_a_server_that_does_not_answer_in_time_is_asked_again(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_TIMEOUT", "1s")
    folder = _write(tmp_path, 5)
    with before(s3, lambda _m, path, number: "hang" if "c.json" in path and not number else None) as proxy:
        point_to(proxy.address, monkeypatch)
        remote.upload(URL, folder)
        assert proxy.count("PUT", "c.json") == 2
        assert remote.fetch(URL, 5, tmp_path / "other", _warn_never)


@pytest.mark.slow
def test_a_store_that_is_gone_is_one_line_and_nothing_older_is_taken(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_TRIES", 1)
    for step in (5, 6):
        remote.upload(URL, _write(tmp_path, step))
    newer = _write(tmp_path, 7)
    with before(s3, lambda _m, path, _n: "500" if "step-6/a.saf" in path else None) as proxy:
        point_to(proxy.address, monkeypatch)
        assert f"{URL}/checkpoints/step-6/a.safetensors: " in _line(
            lambda: remote.fetch(URL, 6, tmp_path / "other", _warn_never)
        )
    assert not list((tmp_path / "other" / "checkpoints").glob("step-*"))
    point_to(f"http://127.0.0.1:{free_port()}", monkeypatch)
    calls: list[Callable[[], object]] = [
        lambda: remote.upload(URL, newer),
        lambda: remote.newest(URL),
        lambda: remote.fetch(URL, 6, tmp_path / "other", _warn_never),
        lambda: remote.prune(URL, 2),
    ]
    assert all("after 4 retries" in _line(call) for call in calls)
    point_to(s3, monkeypatch)
    gone = "s3://nobucket/runs"
    assert all(
        f"{gone}: there is no such bucket" in _line(call).replace("/checkpoints/step-7", "")
        for call in (lambda: remote.upload(gone, newer), lambda: remote.newest(gone), lambda: remote.prune(gone, 2))
    )


def test_a_file_that_changed_on_disk_is_not_uploaded(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_TRIES", 1)
    for size in (50_000, BIG):  # in one piece, in parts
        folder = _write(tmp_path / str(size), 5, size)
        content = bytearray((folder / "a.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "a.safetensors").write_bytes(content)
        assert "a.safetensors: changed on disk" in _line(lambda folder=folder: remote.upload(url, folder))
        (folder / "a.safetensors").unlink()
        assert "a.safetensors: cannot be uploaded: No such file" in _line(
            lambda folder=folder: remote.upload(url, folder)
        )
    assert remote.newest(url) is None and _stored(url) == {}


def test_a_fetch_that_was_cut_short_goes_on(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_TRIES", 1)
    folder = _write(tmp_path, 5)
    remote.upload(URL, folder)
    with before(s3, lambda _m, path, _n: "500" if "c.json" in path else None) as proxy:
        point_to(proxy.address, monkeypatch)
        _line(lambda: remote.fetch(URL, 5, tmp_path / "other", _warn_never))
        assert checkpoint.find_latest(tmp_path / "other", _warn_never) is None
        proxy.plan = lambda *_: None
        proxy.asked.clear()
        came = remote.fetch(URL, 5, tmp_path / "other", _warn_never)
        assert came and list_files(came) == list_files(folder)
        assert proxy.count("GET", "c.json") == 1 and not proxy.count("GET", "a.safetensors")


def _flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _damage(store: object, name: str, change: Callable[[bytes], bytes]) -> None:
    obstore.put(store, name, change(bytes(obstore.get(store, name).bytes())))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["missing", "cut", "flipped", "of another step", "edited", "broken", "all of another"])
def test_damage_in_the_store_is_named_and_the_older_one_taken(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(object_store, "_TRIES", 1)
    for step in (5, 10):
        remote.upload(url, _write(tmp_path, step))
    store = from_url(f"{url}/checkpoints")
    if kind == "missing":
        obstore.delete(store, "step-10/optimizer/b.bin")
    elif kind == "of another step":
        obstore.copy(store, "step-5/a.safetensors", "step-10/a.safetensors")
    elif kind == "all of another":
        for name in list_files(checkpoint.folder_of(tmp_path, 5)):
            obstore.copy(store, f"step-5/{name}", f"step-10/{name}")
    else:
        name, change = {
            "cut": ("step-10/a.safetensors", lambda content: content[:100]),
            "flipped": ("step-10/a.safetensors", _flip),
            "edited": ("step-10/manifest.json", lambda content: content.replace(b'"c.json"', b'"../../c.json"')),
            "broken": ("step-10/manifest.json", lambda content: content[:50]),
        }[kind]
        _damage(store, name, change)
    warnings: list[str] = []
    came = remote.fetch(url, 10, tmp_path / "other", warnings.append)
    assert came and list_files(came) == list_files(checkpoint.folder_of(tmp_path, 5))
    (warning,) = warnings
    assert f"{url}/checkpoints/step-10" in warning and warning.endswith("; falling back to an older checkpoint")
    assert sorted(p.name for p in (tmp_path / "other").rglob("c.json")) == ["c.json"]
    assert {p.name for p in (tmp_path / "other" / "checkpoints").glob("step-*")} == {"step-5"}
    # The run goes on from 5 and uploads its own 10.
    remote.upload(url, checkpoint.folder_of(tmp_path, 10))
    assert remote.fetch(url, 10, tmp_path / "other", _warn_never)


def test_pruning_keeps_the_newest_the_best_and_at_least_two(url: str, tmp_path: Path) -> None:
    def stored() -> set[str]:
        return {name.split("/")[1] for name in _stored(url)}

    for step in range(1, 7):
        remote.upload(url, _write(tmp_path, step))
    store = from_url(f"{url}/checkpoints")
    obstore.delete(store, "step-3/manifest.json")
    obstore.put(store, "step-9/a.safetensors", b"of an upload under way")
    remote.prune(url, keep=3, best=1)
    assert stored() == {"step-1", "step-4", "step-5", "step-6", "step-9"}
    remote.prune(url, keep=1)
    assert stored() == {"step-5", "step-6", "step-9"}
    remote.prune(url, keep=1)
    assert remote.newest(url) == 6 and remote.fetch(url, 6, tmp_path / "other", _warn_never)


def test_a_checkpoint_removed_in_part_is_not_whole(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        remote.upload(URL, _write(tmp_path, step))
    deletes: Callable[[str, str, int], str | None] = lambda method, path, n: (  # noqa: E731
        "500" if method == "POST" and path.endswith("?delete") and n >= 1 else None
    )
    with before(s3, deletes) as proxy:
        point_to(proxy.address, monkeypatch)
        _line(lambda: remote.prune(URL, 2))
    point_to(s3, monkeypatch)
    assert "checkpoints/step-1/a.safetensors" in _stored(URL)
    warnings: list[str] = []
    assert remote.fetch(URL, 1, tmp_path / "other", warnings.append) is None and not warnings
    remote.prune(URL, 2)
    assert {name.split("/")[1] for name in _stored(URL)} == {"step-2", "step-3"}


def test_a_full_or_forbidden_disk_is_one_line(s3: str, tmp_path: Path) -> None:
    remote.upload(URL, _write(tmp_path, 1))
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file/checkpoints: cannot be written: Not a directory" in _line(
        lambda: remote.fetch(URL, 1, tmp_path / "file", _warn_never)
    )
    if Path("/dev/full").exists():
        other = tmp_path / "other"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", _opens_full(Path.open))
            assert "cannot be written: No space left on device" in _line(
                lambda: remote.fetch(URL, 1, other, _warn_never)
            )
        assert remote.fetch(URL, 1, other, _warn_never)


def _opens_full(real: Callable[..., object]) -> Callable[..., object]:
    def opens(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        return real(Path("/dev/full") if mode == "wb" else path, mode, *args, **kwargs)

    return opens


def test_no_error_says_a_credential(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_TRIES", 1)
    folder, secrets = _write(tmp_path, 1), ["AKIDSECRET", "WORDSECRET", "TOKENSECRET", "U0lHU0VDUkVU"]
    point_to(f"http://127.0.0.1:{free_port()}", monkeypatch)
    for name, secret in zip(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"), secrets, strict=False):
        monkeypatch.setenv(f"AWS_{name}", secret)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", f"sv=2021&sig={secrets[3]}")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    told = []
    for url in (URL, "az://container/runs"):
        told += [_line(lambda url=url: remote.upload(url, folder)), _line(lambda url=url: remote.newest(url))]
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no base64 " + secrets[1])
    monkeypatch.delenv("AZURE_STORAGE_SAS_KEY")
    told.append(_line(lambda: remote.newest("az://container/runs")))
    for text in told:
        assert not [secret for secret in secrets if secret in text], text


@pytest.fixture
def auth(s3: str) -> Iterator[None]:
    """The server checks credentials, and knows none."""

    def check(actions: bytes) -> None:
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{s3}/moto-api/reset-auth", actions, headers, method="POST"))

    check(b"0")
    yield
    check(b"inf")


@pytest.mark.usefixtures("auth")
def test_refused_access_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_TRIES", 1)
    folder = _write(tmp_path, 1)
    for call in (lambda: remote.upload(URL, folder), lambda: remote.newest(URL)):
        assert "access refused; check the credentials in the environment" in _line(call)


@pytest.mark.slow
def test_an_upload_takes_little_memory(s3: str, tmp_path: Path) -> None:
    # 400 MB in a process of its own; the rest of it takes as much as an upload of nothing.
    peak = "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    peaks = []
    for step, size in ((1, 10), (2, 400 << 20)):
        folder = _write(tmp_path, step, size)
        command = [sys.executable, "-c", KILLED + peak, URL, str(folder)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 100, "MiB"
    assert remote.newest(URL) == 2
    shutil.rmtree(tmp_path / "checkpoints")


class _Held:
    """A lease that is held."""

    problem = None

    def is_held(self) -> bool:
        return True


def test_the_best_one_waits_on_while_newer_ones_take_each_other_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, gate = f"file://{tmp_path}/bucket", threading.Event()
    whole = remote.upload
    monkeypatch.setattr(remote, "upload", lambda *words: gate.wait(20) and whole(*words))
    lease: Any = _Held()
    uploads = remote.Remote(url, tmp_path / "run", lease)
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 20)):
        uploads.add(_write(tmp_path / "run", step), 9, best)
        while uploads.uploading != 10:
            time.sleep(0.01)
    gate.set()
    uploads.finish(20)
    assert {int(Path(name).parent.name[5:]) for name in _stored(url) if name.endswith(checkpoint.MANIFEST)} == {
        10,
        20,
        40,
    }


def test_an_older_one_of_the_store_is_not_taken_for_a_newer_one_of_the_disk(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    for step in (10, 30):
        remote.upload(url, _write(tmp_path / "run", step))
    (tmp_path / "bucket/checkpoints/step-30/c.json").write_text("damaged")
    (tmp_path / "run/checkpoints/step-30/c.json").write_text("damaged")
    mine = _write(tmp_path / "run", 20)
    assert remote.newest_checkpoint(tmp_path / "run", url) == mine
    # What is damaged would stand where the next checkpoint of its step goes.
    assert {path.name for path in (tmp_path / "run/checkpoints").glob("step-*")} == {"step-10", "step-20"}


@pytest.mark.parametrize("has_bucket", [False, True])
def test_a_run_of_which_no_checkpoint_is_whole_does_not_begin_anew_by_itself(tmp_path: Path, has_bucket: bool) -> None:
    url = f"file://{tmp_path}/bucket" if has_bucket else None
    for step in (10, 20):
        made = _write(tmp_path / "run", step)
        if url:
            remote.upload(url, made)
            (tmp_path / f"bucket/checkpoints/step-{step}/c.json").write_text("damaged")
        (made / "c.json").write_text("damaged")
    with pytest.raises(
        UserError, match="no checkpoint is whole, see the lines above; begin anew in another folder"
    ) as e:
        remote.newest_checkpoint(tmp_path / "run", url)
    assert ("another checkpoint.remote" in str(e.value)) is has_bucket
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 2, "what is left of them stays"


def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    """An older one must not be taken, nor this one removed, because a shared disk is away for a moment."""
    _write(tmp_path / "run", 10)
    file = _write(tmp_path / "run", 20) / checkpoint.MANIFEST
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(UserError, match=rf"step-20/{checkpoint.MANIFEST}: cannot be read: ") as error:
        remote.newest_checkpoint(tmp_path / "run", None)
    assert error.value.code == EXIT_CRASH, "which is tried again"


def _alone(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        remote.newest_checkpoint(folder / f"node{rank}/run", None)
    except UserError as error:
        (folder / f"found{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_all_ranks_say_that_one_has_only_damaged_ones(tmp_path: Path) -> None:
    (_write(tmp_path / "node0/run", 20) / "c.json").write_text("damaged")
    torch.multiprocessing.spawn(_alone, (tmp_path,), nprocs=2)
    assert all("no checkpoint is whole" in (tmp_path / f"found{rank}").read_text() for rank in (0, 1))


def _on_own_disk(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    world = World(rank=rank, local_rank=0, world_size=2, local_world_size=1, nodes=2)
    check_shared_folder(folder / "shared", world)
    try:
        check_shared_folder(folder / f"node{rank}", world)
    except UserError as error:
        (folder / f"said{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_checkpoints_of_every_rank_need_a_folder_that_all_see(tmp_path: Path) -> None:
    for name in ("shared", "node0", "node1"):
        (tmp_path / name).mkdir()
    torch.multiprocessing.spawn(_on_own_disk, (tmp_path,), nprocs=2)
    assert all("rank 1 does not see what rank 0 writes" in (tmp_path / f"said{rank}").read_text() for rank in (0, 1))
    assert not list((tmp_path / "shared").iterdir())


def _node(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = remote.newest_checkpoint(folder / f"node{rank}/run", f"file://{folder}/bucket")
    (folder / f"found{rank}").write_text(str(found))
    torch.distributed.destroy_process_group()


def test_nodes_with_disks_of_their_own_go_on_from_the_newest_that_all_have(tmp_path: Path) -> None:
    remote.upload(f"file://{tmp_path}/bucket", _write(tmp_path / "node0/run", 20))
    _write(tmp_path / "node0/run", 30)  # node 0 was killed before its upload came to an end
    (tmp_path / "node0/run/run.json").touch()
    for rank, step in ((0, 8), (0, 10), (1, 5), (1, 8), (1, 10)):
        _write(tmp_path / f"node{rank}/run", step)
    torch.multiprocessing.spawn(_node, (tmp_path,), nprocs=2)
    for rank in (0, 1):
        folder = tmp_path / f"node{rank}/run/checkpoints"
        assert (tmp_path / f"found{rank}").read_text() == str(folder / "step-20")
        kept = {0: {"step-8", "step-10", "step-20"}, 1: {"step-10", "step-20"}}  # each start fetches one more on node 1
        assert {path.name for path in folder.glob("step-*")} == kept[rank]


@pytest.mark.parametrize("finished", [None, "2026-01-01"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_run_that_the_address_brings_is_compared_also_in_an_empty_folder(
    tmp_path: Path, is_there: bool, finished: str | None
) -> None:
    url, run_dir = f"file://{tmp_path}/bucket", tmp_path / "run"
    settings = {"model": {"path": "m"}, "data": {"sources": [{"path": "x.jsonl"}]}, "checkpoint": {"remote": url}}
    was, now = (
        RunConfig.model_validate({**settings, "train": {"global_batch_size": 2, "learning_rate": rate}})
        for rate in (1e-5, 1e-3)
    )
    record = {"folder": "run", "run_id": "a", "finished": finished, "config": was.model_dump(mode="json"), "data": []}
    for name, content in (("run.json", json.dumps(record)), ("metrics.jsonl", '{"step": 1}\n')):
        object_store.write_object(url, name, content.encode())
    if is_there:
        run_dir.mkdir()

    def enter(folder: Path, config: RunConfig) -> None:
        with held(folder, config, ALONE):
            pass

    assert "finished at 2026" in (said := _line(lambda: enter(run_dir, now))) or "train.learning_rate" in said
    # With the address of another run nothing of it is left in this one's folder.
    other = tmp_path / "other"
    assert "has the run of a folder run" in _line(lambda: enter(other, was))
    assert not other.exists()
