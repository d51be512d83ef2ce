"""A server before an S3 server that fails as networks and servers do: `with before(address, plan) as proxy`."""

import http.server
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.conftest import Silent, free_port, serving

# What to do with the n-th request of a method and path, n from 0; None = pass it on.
# "500", "cut" (not passed on, no answer), "lost" (passed on, no answer), "half" (half of the answer), "slow" (0.2 s),
# "hang" (no answer until the end).
Plan = Callable[[str, str, int], str | None]


class Proxy:
    """The requests that came, and the plan, which may be replaced at any time."""

    def __init__(self, target: str, plan: Plan) -> None:
        self.target, self.plan = target, plan
        self.address = ""
        self.asked: list[tuple[str, str]] = []
        self.dropped = {"host", "connection"}  # headers that are not passed on
        self.done = threading.Event()
        self.writing = threading.Lock()  # the server behind looks and writes in two steps

    def count(self, method: str, part: str) -> int:
        """How many requests of a method had `part` in their path."""
        return sum(m == method and part in path for m, path in self.asked)


@contextmanager
def moto() -> Iterator[str]:
    """Address of a local S3 server in a process of its own."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/moto-api/")
                break
            except urllib.error.URLError:
                assert server.poll() is None, "the S3 server does not start"
                time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


@contextmanager
def before(target: str, plan: Plan = lambda *_: None) -> Iterator[Proxy]:
    """Start it; its address is that of a server on 127.0.0.1."""
    proxy = Proxy(target, plan)

    class Handler(Silent):
        def handle_one(self) -> None:
            sent = self.rfile.read(int(self.headers.get("content-length", 0))) or None
            self.close_connection = True
            number = proxy.asked.count((self.command, self.path))
            proxy.asked.append((self.command, self.path))
            fault = proxy.plan(self.command, self.path, number)
            if fault == "500":
                return self.send_error(500)
            if fault == "hang":
                proxy.done.wait()
            if fault in ("cut", "hang"):
                return None
            if fault == "slow":
                time.sleep(0.2)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in proxy.dropped}
            headers.setdefault("Content-Type", "application/octet-stream")  # urllib would say that it is a form
            request = urllib.request.Request(f"{proxy.target}{self.path}", sent, headers, method=self.command)
            with proxy.writing:
                status, names, body = _answer(request)
            if fault == "lost":
                return None
            self.send_response(status)
            for name, value in names.items():
                if name.lower() not in ("connection", "server", "date"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == "half" else body)
            return None

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that was killed

    with serving(Handler, Server) as proxy.address:
        try:
            yield proxy
        finally:
            proxy.done.set()


def _answer(request: urllib.request.Request) -> tuple[int, Any, bytes]:
    try:
        with urllib.request.urlopen(request) as found:
            return found.status, found.headers, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()
