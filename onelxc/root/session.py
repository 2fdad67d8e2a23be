"""How does the helper serve one action? JSON lines in, JSON lines out, under the VM's lock, undoing what is not kept.

The caller's end of the pipe is its life: when it closes without a `commit`, or when the helper is told to stop
(SIGTERM: a cancel's request; SIGHUP, SIGINT), all that was taken since is given back, last in, first out. A verb
under way is broken off at once. There is no thread to watch the pipe, since a process with threads can neither make
nor enter user and mount namespaces; SIGIO tells instead.

    {"do": "prepare", …}  →  {"log": "…"}* then {"ok": {…}} or {"error": "one line", "kind": "StorageError"}
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import select
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from onelxc.errors import GiveUpError, HelperError, OneLxcError
from onelxc.model import VmPaths
from onelxc.root import lock
from onelxc.root.journal import Journal
from onelxc.root.verbs import VERBS
from onelxc.root.work import Work

if TYPE_CHECKING:
    from onelxc.config import HostConfig

STDIN, STDOUT = 0, 1
LONGEST_REQUEST = 4 << 20
CALLER_LEAVES_S = 60
"""How long a caller that was told to give up may take to end what it does with libvirt."""


class Interrupted(BaseException):
    """The verb under way is to be broken off. No `except Exception` of a module may swallow it."""


class Session:
    """One helper process, one VM, one action."""

    def __init__(self, vm_id: int, verb: str, config: HostConfig, lock_timeout_s: float) -> None:
        self.vm_id = vm_id
        self.verb = verb
        self.config = config
        self.lock_timeout_s = lock_timeout_s
        self._pid = os.getpid()
        self._given_up = ""
        self._caller_gone = False
        self._interruptible = False
        self._busy = False
        self._buffer = b""

    def serve(self, started: float) -> int:
        """Serve until the caller is gone; the exit code."""
        self._listen_to_signals()
        if self.verb == "cancel":
            lock.mark_give_up(self.vm_id)
        try:
            held = self._guarded(self._open)
        except (OneLxcError, OSError) as error:
            self._answer_error(error)
            return 1
        journal = Journal(VmPaths(self.vm_id).journal, self.verb)
        work = Work(self.vm_id, self.verb, journal, self.config, self._log)
        try:
            return self._work(work, started)
        finally:
            journal.close()
            held.release()

    def _work(self, work: Work, started: float) -> int:
        from onelxc.root import release

        try:
            if self.verb in ("deploy", "restore"):
                lock.check_give_up(self.vm_id, self.verb, started)
            # the lock is ours, so whoever took these is dead
            self._shielded(lambda: release.undo(work))
            self._write({"ok": {"pid": self._pid}})
        except (OneLxcError, OSError) as error:
            self._answer_error(error)
            return 1
        try:
            self._requests(work)
        finally:
            failed = self._shielded(lambda: _first_error(lambda: release.undo(work)))
        if failed is not None:
            self._answer_error(failed)
            return 1
        return 0

    def _requests(self, work: Work) -> None:
        while True:
            try:
                request = self._guarded(self._read)
                if request is None:
                    return
                if request.get("do") == "commit":
                    # nothing breaks off a commit: kept is kept, or the caller hears that it is not
                    answer = self._shielded(lambda: self._run(work, request))  # noqa: B023
                else:
                    answer = self._guarded(lambda: self._run(work, request))  # noqa: B023
                self._write({"ok": answer})
            except GiveUpError as error:
                if not self._caller_gone:
                    self._answer_error(error)
                    self._wait_for_caller()
                return
            except (OneLxcError, OSError, ValueError) as error:
                self._answer_error(error)

    def _run(self, work: Work, request: dict[str, Any]) -> Any:
        name = str(request.pop("do", ""))
        if name not in VERBS:
            raise HelperError(f"Cannot do {name!r}: the root helper knows no such verb")
        module, function = VERBS[name]
        verb: Callable[[Work, dict[str, Any]], Any] = getattr(importlib.import_module(module), function)
        self._busy = True
        try:
            return verb(work, request)
        finally:
            self._busy = False

    def _open(self) -> lock.VmLock:
        return lock.acquire(self.vm_id, self.verb, timeout_s=self.lock_timeout_s, log=self._log)

    # the caller's pipe

    def _read(self) -> dict[str, Any] | None:
        """The next request, None when the caller has closed its end."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > LONGEST_REQUEST:
                raise HelperError("Cannot read a request: it is too long")
            piece = os.read(STDIN, 65536)
            if not piece:
                self._caller_gone = True
                return None
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            request = json.loads(line)
        except ValueError as error:
            raise HelperError(f"Cannot read a request: {error}") from error
        if not isinstance(request, dict):
            raise HelperError("Cannot read a request: not an object")
        return request

    def _wait_for_caller(self) -> None:
        """Until the caller has closed its end: it may be in the midst of starting or ending the domain."""
        deadline = time.monotonic() + CALLER_LEAVES_S
        while not self._caller_gone:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([STDIN], [], [], left)[0]:
                return
            data = os.read(STDIN, 65536)
            if not data:
                self._caller_gone = True
            for _ in range(data.count(b"\n")):
                self._answer_error(self._give_up_error())

    def _write(self, message: dict[str, Any]) -> None:
        data = (json.dumps(message, separators=(",", ":")) + "\n").encode()
        try:
            while data:
                data = data[os.write(STDOUT, data) :]
        except BrokenPipeError:
            self._caller_gone = True

    def _log(self, text: str) -> None:
        self._write({"log": " ".join(text.split())})

    def _answer_error(self, error: Exception) -> None:
        kind = type(error).__name__ if isinstance(error, OneLxcError) else "HelperError"
        self._write({"error": str(error) or type(error).__name__, "kind": kind})

    # being broken off

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGIO, self._on_pipe)
        try:
            fcntl.fcntl(STDIN, fcntl.F_SETOWN, self._pid)
            fcntl.fcntl(STDIN, fcntl.F_SETFL, fcntl.fcntl(STDIN, fcntl.F_GETFL) | os.O_ASYNC)
        except OSError:
            return  # a regular file or /dev/null has nobody behind it
        self._on_pipe(signal.SIGIO, None)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        # a cancel asks with SIGTERM (lock._ask_to_give_up)
        self._interrupt("it was cancelled meanwhile" if number == signal.SIGTERM else "it was told to stop")

    def _on_pipe(self, number: int, frame: FrameType | None) -> None:
        poll = select.poll()
        poll.register(STDIN, select.POLLIN)
        events = next(iter(poll.poll(0)), (STDIN, 0))[1]
        # a pipe that is closed but still has requests in it is a script's; a verb under way has a caller to wait for
        if events & (select.POLLHUP | select.POLLERR) and (self._busy or not events & select.POLLIN):
            self._caller_gone = True
            self._interrupt("its caller is gone")

    def _interrupt(self, reason: str) -> None:
        if os.getpid() != self._pid:  # a forked child of ours must not run our clean-up
            os._exit(143)
        self._given_up = self._given_up or reason
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def _give_up_error(self) -> GiveUpError:
        return GiveUpError(f"Cannot {self.verb} VM {self.vm_id}: {self._given_up}")

    def _guarded(self, step: Callable[[], Any]) -> Any:
        """`step`, which may be broken off: GiveUpError then."""
        try:
            self._interruptible = True
            if self._given_up:
                raise Interrupted
            result = step()
            self._interruptible = False
            return result
        except Interrupted:
            raise self._give_up_error() from None
        finally:
            self._interruptible = False

    def _shielded(self, step: Callable[[], Any]) -> Any:
        """`step`, which must not be broken off."""
        self._interruptible = False
        return step()


def _first_error(step: Callable[[], None]) -> Exception | None:
    try:
        step()
    except (OneLxcError, OSError) as error:
        return error
    return None
