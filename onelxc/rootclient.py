"""How do the executables, which run as oneadmin, have done what needs root? By one helper process per action.

`open_session` starts it through sudo and waits until it holds the VM's lock; leaving the `with` block closes the pipe,
on which the helper gives back whatever was not committed. Errors of the helper arrive as the classes of `errors`.
This side decides nothing and checks nothing: the helper trusts it with nothing.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from types import TracebackType
from typing import IO, Any

from onelxc import __version__, errors, jsontext, model, wire
from onelxc.command import ENVIRONMENT
from onelxc.errors import GiveUpError, HelperError, OneLxcError
from onelxc.model import HELPER, Prepared, Vm
from onelxc.report import Report

ONE_SHOT_LIMIT_S = 120
"""A probe that waits for ever would end the monitoring of its kind."""
UNDO_LIMIT_S = 180
"""How long the helper may take to give everything back once its caller has left."""


class Session:
    """The action's side of one session. A GiveUpError, once heard, is the answer to everything after."""

    def __init__(self, vm_id: int, verb: str, report: Report, wait_s: float) -> None:
        self.vm_id = vm_id
        self.verb = verb
        self._report = report
        self._given_up: GiveUpError | None = None
        times = ["--started", f"{_started():.2f}", "--wait", f"{wait_s:g}"]
        self._process, self._stderr = _start(["session", str(vm_id), verb, *times])
        self._buffer = b""
        self._wait_s = wait_s
        self._name = ""
        try:
            self._name = str(self._answer().get("session", ""))
        except BaseException:
            self.close()
            raise

    def release(self) -> None:
        """Give back everything that this VM has on this host: container, devices, mounts, files, record."""
        self.call("release")

    def prepare(self, vm: Vm) -> Prepared:
        """Make the VM's disks ready, and write down what it is deployed with."""
        return wire.decode(Prepared, self.call("prepare", vm=model.to_json(vm)))

    def commit(self) -> None:
        """Keep what was taken. Until here, leaving gives it back."""
        self.call("commit")

    def record(self) -> dict[str, Any]:
        """`{"ours": bool, "vm": {…} or null, "prepared": {…} or null, "paused": "" or why}` (see `root.record`)."""
        answer = self.call("record")
        assert isinstance(answer, dict)
        return answer

    def console(self) -> str:
        """The last lines that the container said on its console in this run, as plain text."""
        return "\n".join(str(line) for line in self.call("console")["lines"])

    def call(self, verb: str, **request: Any) -> Any:
        """One verb of the helper with its JSON arguments; gives its JSON answer."""
        if self._given_up:
            raise self._given_up
        data = (json.dumps({**request, "do": verb}) + "\n").encode()
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(data)
            stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # why it went is in its answer
        try:
            return self._answer()
        except _NoAnswerError:
            if verb != "kept" and self._kept():
                return {}
            raise

    def _kept(self) -> bool:
        """Whether the helper, killed before it could answer, had kept everything already. If not, it is undone then."""
        try:
            with Session(self.vm_id, self.verb, self._report, self._wait_s) as again:
                return bool(again.call("kept", session=self._name)["kept"])
        except OneLxcError:
            return False

    def check(self) -> None:
        """GiveUpError if the helper was asked to stop meanwhile. For loops that wait without calling it."""
        if self._given_up:
            raise self._given_up
        stdout = self._process.stdout
        assert stdout is not None
        if b"\n" in self._buffer or select.select([stdout], [], [], 0)[0]:
            self._answer()

    def close(self) -> None:
        """Leave: the helper undoes what was not committed, and ends. Returns when it has."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        deadline = time.monotonic() + UNDO_LIMIT_S
        while select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                process.wait()
                break
            self._buffer += data
        for line in self._buffer.splitlines():
            message = _parse(line)
            if "log" in message or "error" in message:
                self._report.info(str(message.get("log") or message.get("error")))
        self._buffer = b""
        process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        while True:
            line = self._line()
            if line is None:
                raise _NoAnswerError(_why_no_answer(self._process, self._stderr))
            if not line:
                continue  # what a worker that was broken off had begun to say ends here
            message = _parse(line)
            if "log" in message:
                self._report.info(str(message["log"]))
            elif "error" in message:
                problem = _error(message)
                if isinstance(problem, GiveUpError):
                    self._given_up = problem
                raise problem
            else:
                return message.get("ok")

    def _line(self) -> bytes | None:
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


class _NoAnswerError(HelperError):
    """The helper has ended in the midst of something."""


def open_session(vm_id: int, verb: str, report: Report, *, wait_s: float = 120) -> Session:
    """A session for one VM. HelperError if the helper is missing, of another version, or the VM's lock is not free
    within `wait_s`."""
    return Session(vm_id, verb, report, wait_s)


def one_shot(verb: str, request: dict[str, Any] | None = None, report: Report | None = None) -> Any:
    """A verb that concerns the host and no single VM: `reap`, `check` …"""
    process, stderr = _start([verb])
    try:
        out, _ = process.communicate((json.dumps(request or {}) + "\n").encode(), ONE_SHOT_LIMIT_S)
    except subprocess.TimeoutExpired:
        # it is root's, and cannot be killed from here; what it has begun it ends without us
        stderr.close()
        raise HelperError(f"Cannot ask the root helper to {verb}: no answer within {ONE_SHOT_LIMIT_S} s") from None
    with stderr:
        for line in out.splitlines():
            message = _parse(line)
            if "log" in message:
                if report:
                    report.info(str(message["log"]))
            elif "error" in message:
                raise _error(message)
            else:
                return message.get("ok")
        raise HelperError(_why_no_answer(process, stderr))


def _start(words: list[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    argv = [HELPER, *words, "--version", __version__]
    if os.geteuid() != 0:
        argv = ["sudo", "-n", *argv]
    stderr: IO[bytes] = os.fdopen(os.memfd_create("onelxc-root"), "w+b")
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=dict(ENVIRONMENT), cwd="/"
        )
    except OSError as error:
        stderr.close()
        raise HelperError(f"Cannot start the root helper: {argv[0]}: {error.strerror}; {_ADVICE}") from error
    return process, stderr


_ADVICE = "run `install.sh node` on this host"


def _why_no_answer(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> str:
    status = process.wait()
    stderr.seek(0)
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    if lines and lines[-1].startswith("sudo:"):
        return f"Cannot start the root helper: {lines[-1]}; {_ADVICE}"
    if status < 0:
        return f"Cannot go on: the root helper was killed by signal {-status}"
    return f"Cannot go on: the root helper ended without an answer: {lines[-1] if lines else f'exit code {status}'}"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = jsontext.loads(line)
    except ValueError:
        return {"log": line.decode(errors="replace")}
    return message if isinstance(message, dict) else {"log": str(message)}


def _error(message: dict[str, Any]) -> OneLxcError:
    kind = getattr(errors, str(message.get("kind")), HelperError)
    if not (isinstance(kind, type) and issubclass(kind, OneLxcError)):
        kind = HelperError
    problem: OneLxcError = kind(str(message["error"]))
    return problem


def _started() -> float:
    """When this process began, in seconds since boot: a cancel that came later makes a deploy give up."""
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")
