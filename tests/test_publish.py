"""Publishing of bundles: a folder, a real S3 server, a stand-in for the hub; nothing half, nothing replaced."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from sentence_transformers import SentenceTransformer

from launch.errors import CheckFailed, UserError, exit_code
from launch.files import list_files
from tests.conftest import Silent, free_port, point_to, server_before, serving
from tests.test_consumers import snippet
from tests.test_verify import reseal
from trainer.export.publish import main, publish
from trainer.export.verify import verify

ROOT = Path(__file__).parents[1]
URL = "s3://bucket/models/faq-1"


@pytest.fixture
def bundle(prompted_bundle: tuple[SentenceTransformer, Path]) -> Path:
    return prompted_bundle[1]


@pytest.fixture
def other(bundle: Path, tmp_path: Path) -> Path:
    """A whole bundle with another content."""
    folder = Path(shutil.copytree(bundle, tmp_path / "other"))
    (folder / "README.md").write_text("another card\n")
    reseal(folder)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`nestling publish` in this process: exit code, what it prints, what it says to stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        return exit_code(main, [str(word) for word in words]), *capsys.readouterr()

    return call


def bucket(s3: str) -> Any:
    return boto3.resource("s3", endpoint_url=s3).Bucket("bucket")


def keys(s3: str) -> set[str]:
    """Names of all objects below models/faq-1, asked from Amazon's own client."""
    return {item.key.removeprefix("models/faq-1/") for item in bucket(s3).objects.filter(Prefix="models/faq-1/")}


def downloaded(s3: str, folder: Path) -> Path:
    for name in keys(s3):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        bucket(s3).download_file(f"models/faq-1/{name}", str(folder / name))
    return folder


def refused(bundle: Path, target: object) -> str:
    with pytest.raises(UserError) as caught:
        publish(bundle, str(target))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_page_s_commands_are_those_tested_here() -> None:
    targets = ("/models/faq-1", URL, "hf://owner/faq-1")
    lines = [f"nestling publish runs/demo/bundle {target}" for target in targets]
    assert snippet("Publishing", "sh").splitlines() == lines


def test_to_a_folder(bundle: Path, other: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    target = tmp_path / "deep" / "faq 1"
    words = [sys.executable, "-m", "launch.cli", "publish", str(bundle), str(target)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"published: {target}\n", "")
    assert list_files(target) == list_files(bundle) and verify(target) == []
    assert command(bundle, target) == (0, f"already published: {target}\n", "")
    assert not publish(bundle, target.as_uri()), "file:// is the same folder"
    assert "faq 1: holds another bundle, which is never changed" in refused(other, target)
    assert "faq 1: holds another bundle, which is never changed" in refused(other, target.as_uri())
    assert list_files(target) == list_files(bundle)
    (tmp_path / "mine").mkdir()
    assert "mine: exists and holds no bundle, allowed: a new folder" in refused(bundle, tmp_path / "mine")
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in refused(bundle, tmp_path / "file" / "faq")
    assert list((tmp_path / "deep").iterdir()) == [target]


def test_a_copy_that_was_killed_is_no_bundle_and_the_next_one_completes(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "faq"
    program = (
        "import os, launch.files as files, trainer.export.publish as p\n"
        "files.publish_folder = lambda *_: os.kill(os.getpid(), 9)\n"
        f"p.main([{str(bundle)!r}, {str(target)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and not target.exists() and list(tmp_path.iterdir())
    assert publish(bundle, str(target))
    assert [path.name for path in tmp_path.iterdir()] == ["faq"] and verify(target) == []


def test_to_an_object_store_and_back(
    bundle: Path, other: Path, s3: str, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    assert command(bundle, URL) == (0, f"published: {URL}\n", "")
    copy = downloaded(s3, tmp_path / "copy")
    assert list_files(copy) == list_files(bundle) and verify(copy) == []
    before = {item.key: item.last_modified for item in bucket(s3).objects.all()}
    assert command(bundle, f"{URL}/") == (0, f"already published: {URL}/\n", "")
    assert f"{URL}: holds another bundle, which is never changed; choose another address" in refused(other, URL)
    assert {item.key: item.last_modified for item in bucket(s3).objects.all()} == before
    assert publish(other, "s3://bucket/models/faq-2")


def test_what_lies_there_is_not_written_over(bundle: Path, s3: str) -> None:
    bucket(s3).put_object(Key="models/faq-1/README.md", Body=b"mine")
    assert f"{URL}: holds README.md, which is not of this bundle" in refused(bundle, URL)
    assert keys(s3) == {"README.md"}
    assert "s3://bucket/models: holds faq-1/README.md, which is not" in refused(bundle, "s3://bucket/models")
    assert publish(bundle, "s3://bucket/models/faq-2")


def test_an_upload_that_is_killed_has_no_manifest_and_the_next_one_completes(
    bundle: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, gone = threading.Event(), threading.Event()

    def hold_the_graph(path: str, body: bytes) -> bytes | None:
        if not path.endswith("onnx/model.onnx"):
            return body
        reached.set()
        gone.wait(60)
        return None

    with server_before(s3, hold_the_graph) as (address, _):
        point_to(address, monkeypatch)
        process = subprocess.Popen([sys.executable, "-m", "launch.cli", "publish", str(bundle), URL], cwd=ROOT)
        assert reached.wait(60)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        gone.set()
    assert 0 < len(keys(s3)) < len(list_files(bundle)) and "manifest.json" not in keys(s3)
    assert verify(downloaded(s3, tmp_path / "half")) != []
    point_to(s3, monkeypatch)
    assert publish(bundle, URL)
    assert verify(downloaded(s3, tmp_path / "whole")) == []


def test_the_manifest_comes_last(bundle: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    with server_before(s3, lambda path, body: sent.append(path) or body) as (address, asked):
        point_to(address, monkeypatch)
        assert publish(bundle, URL)
    assert asked[-1].endswith("/manifest.json") and len(asked) > len(list_files(bundle))


def test_two_at_once_do_not_both_publish(bundle: Path, other: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def somebody_else_first(path: str, body: bytes) -> bytes:
        if path.endswith("manifest.json") and body == b"":
            content = (other / "manifest.json").read_bytes()
            bucket(s3).put_object(Key="models/faq-1/manifest.json", Body=content)
        return body

    with server_before(s3, somebody_else_first) as (address, _):
        point_to(address, monkeypatch)
        assert "manifest.json" in refused(bundle, URL)
    body = bucket(s3).Object("models/faq-1/manifest.json").get()["Body"].read()
    assert body == (other / "manifest.json").read_bytes()


def test_a_bundle_that_does_not_verify_is_not_published(
    bundle: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    bad = Path(shutil.copytree(bundle, tmp_path / "bad"))
    (bad / "notes.txt").write_text("x")
    assert command(bad, tmp_path / "out") == (3, "", f"nestling: {bad}: 'notes.txt': not in manifest.json\n")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckFailed, match="not a folder"):
        publish(tmp_path / "nothing", str(tmp_path / "out"))


def test_errors_are_one_line_without_credentials(bundle: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "s3://nobucket/x: there is no such bucket" in refused(bundle, "s3://nobucket/x")
    assert "ftp://host/x: allowed: a folder, file://, s3://, gs://, az:// or hf://" in refused(bundle, "ftp://host/x")
    for target in ("s3://AKIA:hidden@bucket/x", "s3://AKIA:hid/den@bucket/x", "az://box/x?sig=hidden"):
        told = refused(bundle, target)
        assert "credentials belong in the environment" in told and "AKIA" not in told and "hid" not in told
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-nobody-sees")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert "a-secret-that-nobody-sees" not in refused(bundle, URL)


@contextmanager
def hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """The few answers of the Hugging Face hub that an upload needs: its address, and repository -> files."""
    repositories = {"owner/faq-1": {".gitattributes": b"*.onnx filter=lfs\n"}, "owner/full": {"README.md": b"mine"}}
    heads = dict.fromkeys(repositories, "0" * 40)

    class Handler(Silent):
        def _send(self, content: Any, status: int = 200, **headers: str) -> None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        def do_GET(self) -> None:
            if self.headers["authorization"] != "Bearer hf_right":
                return self._send({"error": "Invalid user token."}, 401)
            repo = next(name for name in repositories if name in self.path)
            files = repositories[repo]
            if self.path.startswith("/api/models/"):
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                return self._send({"id": repo, "sha": heads[repo], "siblings": siblings})
            name = self.path.partition(f"/resolve/{heads[repo]}/")[2]
            self._send(files[name], ETag=f'"{heads[repo]}-{name}"', X_Repo_Commit=heads[repo])

        do_HEAD = do_GET

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            *lines, body = (json.loads(line) for line in raw.splitlines())
            if self.headers["authorization"] != "Bearer hf_right":
                return self._send({"error": "Invalid user token."}, 401)
            if self.path == "/api/repos/create":
                assert body.get("private") or body.get("visibility") == "private"
                repo = f"{body['organization']}/{body['name']}"
                return self._send({"url": f"http://{self.headers['host']}/{repo}", "id": repo})
            if self.path == "/api/validate-yaml":
                assert body["content"].startswith("---")
                return self._send({"errors": [], "warnings": []})
            repo = next(name for name in repositories if name in self.path)
            if "/preupload/" in self.path:
                known = {"uploadMode": "regular", "shouldIgnore": False}
                return self._send({"files": [{"path": file["path"], **known} for file in body["files"]]})
            assert "/commit/" in self.path
            head, *files = (*lines, body)
            assert head["value"]["parentCommit"] == heads[repo]
            heads[repo] = f"{int(heads[repo]) + 1:040}"
            for file in files:
                repositories[repo][file["value"]["path"]] = base64.b64decode(file["value"]["content"])
            url = f"http://{self.headers['host']}/{repo}/commit/{heads[repo]}"
            self._send({"commitUrl": url, "commitOid": heads[repo], "pullRequestUrl": None})

    with serving(Handler) as address:
        yield address, repositories


def test_to_the_hub(bundle: Path, other: Path, tmp_path: Path) -> None:
    program = """
import os, sys
from launch.errors import exit_code
from trainer.export.publish import main
bundle, other, name, full = *sys.argv[1:], "hf://owner/faq-1", "hf://owner/full"
for words in ([bundle, name], [bundle, name], [other, name], [bundle, full]):
    print(exit_code(main, words))
for os.environ["HF_TOKEN"] in ("hf_wrong", "hf_wr\\tong"):
    print(exit_code(main, [bundle, name]))
"""
    with hub() as (address, repositories):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        words = [sys.executable, "-c", program, str(bundle), str(other)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = ["published: hf://owner/faq-1", "0", "already published: hf://owner/faq-1", "0", "2", "2", "2", "2"]
    assert done.stdout.splitlines() == lines, done.stderr
    another, rest, wrong, malformed = done.stderr.splitlines()
    assert "hf://owner/faq-1: holds another bundle, which is never changed" in another
    assert "hf://owner/full: holds README.md, which is not of this bundle" in rest
    for told in (wrong, malformed):
        assert told.startswith("nestling: hf://owner/faq-1: ") and "hf_wr" not in told
    assert repositories["owner/full"] == {"README.md": b"mine"}
    del repositories["owner/faq-1"][".gitattributes"]
    for name, content in repositories["owner/faq-1"].items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert list_files(tmp_path / "copy") == list_files(bundle) and verify(tmp_path / "copy") == []
