"""The Python programs of a process tree, started by fork where `subprocess` would execute them: no imports to wait for.

The ranks of a run import for ten seconds before they work for one. In a process that has imported it all, `install` has
`subprocess.Popen` fork for every program of this environment, with what an exec would do besides: open files, signals,
session and environment, also as /proc shows it. Parents, sessions and exit codes are those of real processes, of which
the first seconds alone are left out. Threads do not survive a fork: none may be there that a run needs.
"""

import ctypes
import gc
import importlib
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from launch.errors import EXIT_CODES
from tests.processes import MARK

SHOWN = "NESTLING_SHOWN"  # the place in the environment as /proc shows it, which a fork inherits, for these:
_NAMES = (MARK, EXIT_CODES, "RANK")
ROOM = {SHOWN: " " * 1000}  # what a process that is to `install` must be started with
_LAZY = ("deepspeed", "matplotlib.figure", "matplotlib.backends.backend_agg", "datasets.io.parquet")
_executes: list[bool] = []
_BIN = Path(sys.executable).parent

_execute: Any = getattr(subprocess.Popen, "_execute_child")  # noqa: B009  (private to the type checker)


def modules() -> list[str]:
    """What a run imports. Not the bundle: onnxruntime has threads."""
    import trainer

    ours = [module.name for module in pkgutil.iter_modules(trainer.__path__, "trainer.")]
    return [*ours, "launch.supervise", "accelerate.commands.accelerate_cli", "torch.distributed.run", *_LAZY]


def install() -> None:
    """Fork from here on in this process and those that it starts, until `executes`."""
    for name in modules():
        importlib.import_module(name)
    gc.freeze()  # else each collection in a fork copies the memory that it shares
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    place = libc.getenv(SHOWN.encode())
    # Beside this thread there is pyarrow's of jemalloc, which knows about forks.
    assert place and len(os.listdir("/proc/self/task")) <= 2

    def start(process: "subprocess.Popen[Any]", args: Any, *more: Any) -> None:
        words = [args] if isinstance(args, str) else [os.fspath(word) for word in args]
        # What a rank starts itself, `python -c`, is executed: a rank has threads.
        if Path(words[0]).parent == _BIN and "-c" not in words[:2] and not _executes:
            _fork(process, words, place, *more)
        else:
            _execute(process, args, *more)

    setattr(subprocess.Popen, "_execute_child", start)  # noqa: B010


@contextmanager
def executing() -> Iterator[None]:
    """Inside, programs are executed after all."""
    _executes.append(True)
    yield
    _executes.pop()


def _fork(process: Any, words: list[str], place: int, *more: Any) -> None:
    """What `Popen._execute_child` does, for these of its arguments; the others are not used by a run."""
    _, before, _, _, cwd, env, _, _, _, *pipes = more[:15]
    is_session = more[20]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    process.pid = os.fork()
    if not process.pid:
        code = 1
        try:
            _become(pipes, cwd, env, is_session, place)
            if before:
                before()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            code = _run(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    process._child_created = True
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    process._close_pipe_fds(*pipes)


def _become(pipes: list[int], cwd: str | None, env: Any, is_session: bool, place: int) -> None:
    """Have this fork be as a process that was executed is."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    if is_session:
        os.setsid()
    for source, target in ((pipes[0], 0), (pipes[3], 1), (pipes[5], 2)):
        if source != -1:
            os.dup2(source, target)
    os.closerange(3, 4096)
    getattr(weakref.finalize, "_registry").clear()  # noqa: B009  (else temporary folders of the parent end with this)
    vars(resource_tracker._resource_tracker).update(_fd=None, _pid=None)  # its pipe is closed
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    shown = "\0".join(["", *(f"{name}={os.environ[name]}" for name in _NAMES if name in os.environ), ""]).encode()
    ctypes.memmove(place, shown.ljust(len(ROOM[SHOWN])), len(ROOM[SHOWN]))
    if cwd:
        os.chdir(cwd)


def _run(words: list[str]) -> int:
    """Run a Python command in this process, which ends with the code that this returns."""
    if Path(words[0]).name.startswith("python"):
        words = [word for word in words[1:] if word != "-u"]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
