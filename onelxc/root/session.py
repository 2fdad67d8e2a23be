"""How does the helper serve one action? JSON lines in, JSON lines out, under the VM's lock, undoing what is not kept.

    {"do": "prepare", …}  →  {"log": "…"}* then {"ok": {…}} or {"error": "one line", "kind": "StorageError"}

The caller's end of the pipe is its life: when it closes without a `commit`, or when the helper is told to stop
(SIGTERM: a cancel's request; SIGHUP, SIGINT), whatever is under way is broken off at once and all that was taken since
is given back, last in, first out. So there are two processes: a worker, in a process group of its own, which does what
is asked and can be killed at any instant, and the helper itself, which watches, kills it, and undoes by the journal.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from onelxc import errors
from onelxc.errors import GiveUpError, HelperError, OneLxcError
from onelxc.model import VmPaths
from onelxc.root import durable, lock, requests
from onelxc.root.journal import Journal
from onelxc.root.verbs import VERBS
from onelxc.root.work import Work

if TYPE_CHECKING:
    from onelxc.config import HostConfig

STDIN, STDOUT = 0, 1
CALLER_LEAVES_S = 60
"""How long a caller that was told to give up may take to end what it does with libvirt."""
ENDING = ("cancel", "shutdown")
"""Actions that are never refused for what could not be undone or written before: they give everything back."""
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Session:
    """One helper process, one VM, one action."""

    def __init__(self, vm_id: int, verb: str, config: HostConfig, lock_timeout_s: float) -> None:
        self.vm_id = vm_id
        self.verb = verb
        self.config = config
        self.lock_timeout_s = lock_timeout_s
        self._name = f"{os.getpid()}.{lock.started_of(os.getpid())}"
        self._told_to_stop = ""
        self._wake = -1

    def serve(self, started: float) -> int:
        """Serve until the caller is gone; the exit code. `started` is when the caller began, in seconds since boot."""
        self._listen_to_signals()
        if self.verb == "cancel":
            try:
                lock.mark_give_up(self.vm_id)
            except OSError as error:
                self._log(f"deploys that have only begun may go on: {lock.MARKS}: {error.strerror}")
        try:
            held = lock.acquire(
                self.vm_id, self.verb, timeout_s=self.lock_timeout_s, log=self._log, check=self._check_wanted
            )
        except (OneLxcError, OSError) as error:
            _answer_error(error)
            return 1
        try:
            return self._work(started)
        finally:
            held.release()

    def _work(self, started: float) -> int:
        try:
            if self.verb in ("deploy", "restore"):
                lock.check_give_up(self.vm_id, self.verb, started)
            # the lock is ours, so whoever took these is dead
            self._undo()
        except (OneLxcError, OSError) as error:
            if self.verb not in ENDING:
                _answer_error(error)
                return 1
            self._log(str(error))
        worker = self._start_worker()
        broken_off = self._watch(worker)
        _kill_group(worker)
        if broken_off and not _caller_is_gone():
            # after whatever half of a line the worker had written
            _write(b"\n")
            _answer_error(self._give_up_error())
            self._wait_for_caller()
        try:
            self._undo()
        except (OneLxcError, OSError) as error:
            _answer_error(error)
            return 1
        return 0

    def _undo(self) -> None:
        from onelxc.root import release

        paths = VmPaths(self.vm_id)
        if not os.path.exists(paths.state) and not os.path.exists(paths.mounts):
            return
        work = self._new_work()
        try:
            release.undo(work)
            work.journal.compact()
        finally:
            work.journal.close()

    def _new_work(self) -> Work:
        journal = Journal(VmPaths(self.vm_id).journal, self.verb, self._name)
        return Work(self.vm_id, self.verb, journal, self.config, self._log)

    # watching

    def _listen_to_signals(self) -> None:
        self._wake, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        # a cancel asks with SIGTERM (lock._ask_to_give_up)
        self._told_to_stop = self._told_to_stop or (
            "it was cancelled meanwhile" if number == signal.SIGTERM else "it was told to stop"
        )

    def _check_wanted(self) -> None:
        if self._told_to_stop or _caller_is_gone():
            raise self._give_up_error()

    def _give_up_error(self) -> GiveUpError:
        return GiveUpError(f"Cannot {self.verb} VM {self.vm_id}: {self._told_to_stop or 'its caller is gone'}")

    def _watch(self, worker: int) -> bool:
        """Wait until the worker has ended by itself (False), or has to be broken off (True)."""
        ended = os.pidfd_open(worker)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        poll.register(STDIN, 0)
        try:
            while True:
                if self._told_to_stop:
                    return True
                events = dict(poll.poll())
                if ended in events:
                    return False
                if STDIN in events:
                    return True
                os.read(self._wake, 512)
        finally:
            os.close(ended)

    def _wait_for_caller(self) -> None:
        """Until the caller has closed its end: it may be in the midst of starting or ending the domain."""
        deadline = time.monotonic() + CALLER_LEAVES_S
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([STDIN], [], [], left)[0]:
                return
            data = os.read(STDIN, 65536)
            if not data:
                return
            for _ in range(data.count(b"\n")):
                _answer_error(self._give_up_error())

    # the worker

    def _start_worker(self) -> int:
        pid = os.fork()
        if pid == 0:
            self._be_worker()
        try:
            os.setpgid(pid, pid)
        except OSError:
            pass  # it has done so itself
        return pid

    def _be_worker(self) -> NoReturn:
        """Everything that is asked happens here. Its end releases nothing: that is the other process's part."""
        status = 1
        try:
            from onelxc.root import syscalls

            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            parent = os.getppid()
            os.setpgid(0, 0)
            syscalls.die_with_parent()
            if os.getppid() == parent:
                _write_message({"ok": {"pid": parent, "session": self._name}})
                self._requests()
                status = 0
        except BaseException as error:
            # what no further request can follow: a line without an end, or an interrupt
            _answer_error(error)
        finally:
            os._exit(status)

    def _requests(self) -> None:
        work = self._new_work()
        lines = requests.Lines(STDIN)
        while (line := lines.next()) is not None:
            try:
                _write_message({"ok": _run(work, line)})
            except Exception as error:
                _answer_error(error)

    def _log(self, text: str) -> None:
        _write_message({"log": errors.line(text)})


def _run(work: Work, line: bytes) -> Any:
    request = requests.parse(line)
    name = str(request.pop("do", ""))
    if name not in VERBS:
        raise HelperError(f"Cannot do {name!r}: the root helper knows no such verb")
    module, function = VERBS[name]
    verb: Callable[[Work, dict[str, Any]], Any] = getattr(importlib.import_module(module), function)
    return verb(work, request)


def _kill_group(worker: int) -> None:
    """End the worker and all the programs it has started, and wait until they are gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(worker, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            break
        try:
            os.waitpid(worker, os.WNOHANG)
        except ChildProcessError:
            pass
        time.sleep(0.002)
    try:
        os.waitpid(worker, 0)
    except ChildProcessError:
        pass


def _caller_is_gone() -> bool:
    poll = select.poll()
    poll.register(STDIN, 0)
    return any(events & _GONE for _, events in poll.poll(0))


def _answer_error(error: BaseException) -> None:
    kind = type(error).__name__ if isinstance(error, OneLxcError) else "HelperError"
    _write_message({"error": errors.told(error) or kind, "kind": kind})


def _write_message(message: dict[str, Any]) -> None:
    _write((json.dumps(message, separators=(",", ":")) + "\n").encode())


def _write(data: bytes) -> None:
    try:
        durable.write_all(STDOUT, data)
    except BrokenPipeError:
        pass  # nobody listens any more; the watch has seen that, or will
