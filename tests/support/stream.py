"""How does OpenNebula run an action? It feeds `bash -s` on the host through ssh; here the same bytes go through a pipe.

The bytes are those of SshStream and OpenNebulaDriver#do_action (src/mad/ruby at each tag): the command in a subshell,
its exit code on stderr, a mark on stdout; the deployment file or the action's XML in a here-document, unquoted in 3.2.1
and quoted in 7.4.0. Without one the action's stdin is the stream itself, which stays open: who reads it hangs.
"""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import threading
from dataclasses import dataclass
from typing import Any

from tests.support.breaking import Breaker

USER = "oneadmin"
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/games"
EXIT_CODE = re.compile(rb"^ExitCode: (\d*) EOF_ERR\n", re.MULTILINE)
FRAME = re.compile(r"^ERROR MESSAGE --8<------\n(.*?)ERROR MESSAGE ------>8--$", re.MULTILINE | re.DOTALL)
LOG_LINE = re.compile(r"^(ERROR|INFO|WARN|DEBUG):\s+(\d+)?\s*(.*)$")


def remote_command(command: str) -> str:
    """What ssh's other end is given for one command; 42 asks OpenNebula to copy the remotes."""
    return f'if [ -x "{command.split(" ", maxsplit=1)[0]}" ]; then {command}; else exit 42; fi'


@dataclass(frozen=True)
class Outcome:
    """What OpenNebula got from an action."""

    out: str
    err: str
    code: int

    @property
    def message(self) -> str:
        """What the user of 7.4.0 reads (DriverExecHelper.rb): lines that are no log lines, joined with nothing."""
        return "".join(line.strip() for line in self.err.splitlines() if not LOG_LINE.match(line.strip())) or "-"

    @property
    def framed_message(self) -> str:
        """What the user of 3.2.1 reads (CommandManager.rb): the first frame's text; "-" without a frame."""
        found = FRAME.search(self.err)
        return found.group(1).strip() if found else "-"

    def ok(self) -> Outcome:
        """Itself, when the action succeeded; else the test fails with what it said."""
        assert self.code == 0, f"exit code {self.code}\nstdout: {self.out}\nstderr: {self.err}"
        return self


class Running:
    """An action that was started; `wait` for its outcome, or `hang_up` as when the connection is lost."""

    def __init__(
        self, command: str, stdin: str | None, *, quoted: bool, streamed: bool = True, under: Breaker | None = None
    ) -> None:
        """`streamed` as above; else as RemotesCommand (CommandManager.rb): a shell for one command, its stdin ends."""
        account = pwd.getpwnam(USER)
        environment = {"PATH": PATH, "HOME": account.pw_dir, "USER": USER, "LOGNAME": USER, "SHELL": "/bin/bash"}
        identity: dict[str, Any] = {
            "user": account.pw_uid,
            "group": account.pw_gid,
            "extra_groups": os.getgrouplist(USER, account.pw_gid),
        }
        argv = ["bash", "-s"] if streamed else ["bash", "-c", remote_command(command)]
        if under is not None:
            become = ["setpriv", f"--reuid={USER}", f"--regid={account.pw_gid}", "--init-groups", "--"]
            argv, identity = [*under.launcher, *become, *argv], {"pass_fds": [under.descriptor]}
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=account.pw_dir,
            env={**environment, "LANG": "C.UTF-8"},
            start_new_session=True,
            **identity,
        )
        self.streamed = streamed
        if streamed and stdin is not None:
            command = f"cat << {chr(39) + 'EOT' + chr(39) if quoted else 'EOT'} | {command}"
        if streamed:
            line = f'({command}); echo "ExitCode: $? EOF_ERR" 1>&2; echo "EOF_OUT"'
            text = line.replace("\n", "") + "\n" + ("" if stdin is None else f"{stdin}\nEOT\n")
        else:
            text = stdin or ""
        self.out = bytearray()
        self.err = bytearray()
        self._changed = threading.Condition()
        self._open = 2
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.out), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.err), daemon=True),
            threading.Thread(target=self._write, args=(text.encode(),), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _write(self, data: bytes) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
            if not self.streamed:
                self.process.stdin.close()
        except (BrokenPipeError, ValueError):
            pass

    def _read(self, pipe: object, into: bytearray) -> None:
        descriptor = pipe.fileno()  # type: ignore[attr-defined]
        while True:
            data = os.read(descriptor, 65536)
            with self._changed:
                into.extend(data)
                self._open -= not data
                self._changed.notify_all()
            if not data:
                return

    def _answered(self) -> bool:
        if not self.streamed:
            return self._open == 0
        return b"EOF_OUT\n" in self.out and EXIT_CODE.search(bytes(self.err)) is not None

    @property
    def ended(self) -> bool:
        with self._changed:
            return self._answered() or self._open == 0

    def wait(self, timeout_s: float = 90) -> Outcome:
        """The outcome; the test fails (and the action is killed) when there is none in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._answered() or self._open == 0, timeout_s)
            answered, out, err = self._answered(), bytes(self.out), bytes(self.err)
        self._end(answered)
        assert answered, f"no answer within {timeout_s:g} s\nstdout: {out!r}\nstderr: {err!r}"
        if not self.streamed:
            return Outcome(out.decode(), err.decode(), self.process.returncode)
        found = EXIT_CODE.search(err)
        assert found
        err = err[: found.start()] + err[found.end() :]
        return Outcome(out.replace(b"EOF_OUT\n", b"", 1).decode(), err.decode(), int(found.group(1)))

    def hang_up(self, number: int = signal.SIGHUP) -> None:
        """The connection is lost: every process of the stream gets the signal, and its pipes close."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass
        self._end(False)

    def _end(self, answered: bool) -> None:
        assert self.process.stdin
        try:
            if answered and self.streamed:
                self.process.stdin.write(b"\nexit\n")
                self.process.stdin.flush()
            self.process.stdin.close()
        except (BrokenPipeError, ValueError):
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        # a child that outlives its action must not hold its pipes: OpenNebula would read its words as another's
        for thread in self._threads[:2]:
            thread.join(10)
        held = any(thread.is_alive() for thread in self._threads[:2])
        if answered:
            assert not held, "a process that outlived the action still holds its stdout or stderr"
        if not held:
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe
                pipe.close()
