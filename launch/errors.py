"""Errors that a user can cause, and the exit codes of every command of nestling.

0 done, 1 crash, 2 user error (one line, no traceback), 3 a check failed (parity, gate, verify),
75 preempted and saved (EX_TEMPFAIL of sysexits.h: every launch target maps it to "run again").
"""

import atexit
import ctypes
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER = 2
EXIT_CHECK = 3
EXIT_PREEMPTED = 75
SPEAKING = 3.0  # seconds: torchrun ends all ranks as soon as one has ended, which must not be before one has spoken
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # each asks a run to save and end
EXIT_CODES = "NESTLING_EXIT_CODES"  # names the folder where `nestling supervise` reads its workers' codes


class UserError(Exception):
    """Something the user can mend. Each line of the message says what, what was got, what is allowed.

    One that may succeed when it is tried again has the `code` of a crash, after which `nestling supervise` does.
    """

    code = EXIT_USER


class CheckFailed(Exception):
    """A check that the user asked for did not hold: parity, a gate, a bundle that is not what it was."""


class Preempted(BaseException):
    """This process was told to stop where there was nothing to save; the others do not know. No Exception, so that
    nothing on the way handles it."""


def exit_code(main: Callable[[Sequence[str]], int | None], argv: Sequence[str], speaks: bool = True) -> int:
    """Run `main(argv)` and turn its outcome into an exit code, printing one line to stderr for an error.

    `speaks` is false on every rank but 0, so that a run of many processes says a thing once.
    """
    try:
        code = main(argv) or EXIT_DONE
        sys.stdout.flush()
        return code
    except UserError as error:
        code, message = error.code, str(error)
    except CheckFailed as error:
        code, message = EXIT_CHECK, str(error)
    except BrokenPipeError:  # the reader of a pipe, for example `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        code, message = 130, "stopped by Ctrl-C"
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        code, message = EXIT_USER, f"{error.filename}: {error.strerror}; allowed: a path that this disk can have"
    if speaks:
        print("\n".join(f"nestling: {line}" for line in message.splitlines()), file=sys.stderr, flush=True)
    return code


def end_process(main: Callable[[Sequence[str]], int | None], argv: Sequence[str], speaks: bool = True) -> NoReturn:
    """Run `main(argv)` as `exit_code` does, then end this process without taking the interpreter down.

    For processes of a group: threads of gloo and NCCL may ask for the interpreter's lock while it is being taken down,
    which turns the end of a finished process into a hang or into std::terminate (seen as exit code -6).
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # which a launcher under the supervisor ignores
        signal.signal(number, signal.SIG_DFL)
    leave_word("pid.", str(os.getpid()))
    if _is_launched():
        signal_at_parents_end(signal.SIGUSR2)
    is_agreed, waits = True, not speaks
    try:
        code = exit_code(main, argv, speaks)
    except Preempted as error:
        code, is_agreed = EXIT_PREEMPTED, False
        if speaks:
            print(f"nestling: {error}", file=sys.stderr, flush=True)
    except Exception:
        traceback.print_exc()
        code, waits = EXIT_CRASH, False
    if waits and code in (EXIT_USER, EXIT_CHECK, EXIT_CRASH):
        ignore_stops()  # the launcher sends one as soon as the rank that speaks has ended
        time.sleep(SPEAKING)
    leave(code, is_agreed)


def leave(code: int, is_agreed: bool = True) -> NoReturn:
    """End this process after its exit functions, as `end_process` does.

    Where all ranks have agreed to stop it ends with 0 under a launcher, which would take another code for a crash.
    """
    ignore_stops()
    atexit._run_exitfuncs()  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.flush()
    sys.stderr.flush()
    leave_word("", str(code))
    os._exit(EXIT_DONE if code == EXIT_PREEMPTED and is_agreed and _is_launched() else code)


def leave_word(name: str, word: str) -> None:
    """Tell the supervisor, if there is one, something of this rank: "pid.", "memory." or "", its exit code."""
    if folder := os.environ.get(EXIT_CODES):
        with suppress(FileNotFoundError):  # the supervisor has ended
            Path(folder, f"{name}{os.environ.get('RANK', '0')}").write_text(word)


def ignore_stops() -> None:
    """Have this process, in its main thread, answer no signal to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def signal_at_parents_end(number: int) -> None:
    """Have the kernel send this process a signal when the one that started it ends, however that does; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def _is_launched() -> bool:
    """Whether torchrun or accelerate, which sets the other for one process, started this process."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
