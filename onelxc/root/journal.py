"""What has been taken for a VM? A file of JSON lines, each written and flushed *before* the thing is taken.

So whatever kills the helper, or the host, the next session for the VM knows what may be there. "May be": the journal
says what was intended, the kernel (mountinfo, the loop devices' backing files) what is, and the kernel's word wins.
A line is one of

    {"n": 7, "take": "mount", "by": "deploy", "path": "/var/lib/onelxc/mnt/5/root"}
    {"n": 7, "gone": true}
    {"commit": 7, "in": "…"}     all up to number 7 belongs to the VM now, not to the action that took it; which session
                                 did that

A line that cannot be written whole is an error and leaves nothing. That something is *gone* need not be written: who
reads that it may be there finds that it is not. It does not know how anything is given back; `release` does.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from onelxc import jsontext
from onelxc.errors import StorageError
from onelxc.root import durable

LONG = 64
"""Lines from which on it is written anew, without what is past."""


@dataclass(frozen=True)
class Entry:
    """One thing taken. `kind` is a key of `release.GIVE_BACK`, `what` its data."""

    number: int
    kind: str
    verb: str
    what: dict[str, Any]
    committed: bool


class Journal:
    """The journal of one VM. To be used under the VM's lock only.

    One that cannot be read (an I/O error) holds nothing, and takes nothing: a VM is ended by what the kernel knows.
    """

    def __init__(self, path: str, verb: str, session: str = "") -> None:
        self.path = path
        self.verb = verb
        self._session = session
        self._problem: OSError | None = None
        try:
            self._lines = _read(path)
        except OSError as error:
            self._lines, self._problem = [], error
        self._next = max([int(line.get("n") or line.get("commit") or 0) for line in self._lines], default=0) + 1
        self._fd = -1

    def take(self, kind: str, **what: Any) -> int:
        """Write down that `what` is about to be taken; give the number to say `gave_back` with."""
        number = self._next
        self._next += 1
        self._append({"n": number, "take": kind, "by": self.verb, **what})
        return number

    def gave_back(self, number: int) -> None:
        """Entry `number` is no longer held. Never an error: it is gone, whether or not that can be written down."""
        line = {"n": number, "gone": True}
        try:
            self._append(line)
        except StorageError:
            self._lines.append(line)

    def commit(self) -> None:
        """Everything taken so far is the VM's own from now on."""
        self._append({"commit": self._next - 1, "in": self._session})

    def kept(self, session: str) -> bool:
        """Whether the last commit was made in that session."""
        last = next((line for line in reversed(self._lines) if "commit" in line), {})
        return bool(session) and last.get("in") == session

    def held(self) -> list[Entry]:
        """What has not been given back, last taken first."""
        gone = {line["n"] for line in self._lines if line.get("gone")}
        committed = max([int(line["commit"]) for line in self._lines if "commit" in line], default=0)
        return [
            Entry(
                number=line["n"],
                kind=line["take"],
                verb=line.get("by", ""),
                what={key: value for key, value in line.items() if key not in ("n", "take", "by")},
                committed=line["n"] <= committed,
            )
            for line in reversed(self._lines)
            if "take" in line and line["n"] not in gone
        ]

    def compact(self) -> None:
        """Write it anew with what is held, where most of it is past. Not done where it cannot be written."""
        held = {entry.number for entry in self.held()}
        if len(self._lines) < LONG or len(self._lines) < 4 * len(held):
            return
        lines = [line for line in self._lines if "take" in line and line["n"] in held]
        lines += [line for line in self._lines if "commit" in line][-1:]
        try:
            durable.replace(self.path, b"".join(map(_text, lines)))
        except OSError:
            return
        self.close()
        self._lines = lines

    def clear(self) -> None:
        """Nothing is held any more: remove the file."""
        self.close()
        self._lines = []
        durable.remove(self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, line: dict[str, Any]) -> None:
        size = -1
        try:
            if self._problem is not None:
                raise self._problem
            if self._fd < 0:
                make_state_directory(os.path.dirname(self.path))
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd = os.open(self.path, flags, 0o600)
            size = os.fstat(self._fd).st_size
            text = _text(line)
            # a power cut may have left half a line, which must not swallow the first of ours
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                text = b"\n" + text
            durable.write_all(self._fd, text)
            os.fdatasync(self._fd)
            if not size:
                durable.sync_directory(os.path.dirname(self.path))
        except OSError as error:
            self._cut(size)
            raise StorageError(f"Cannot write the journal {self.path}: {error.strerror}") from error
        self._lines.append(line)

    def _cut(self, size: int) -> None:
        """Take back a line that may not be on the disk: it must not be read as if it were."""
        try:
            if size >= 0:
                os.ftruncate(self._fd, size)
                os.fdatasync(self._fd)
        except OSError:
            pass


def make_state_directory(path: str) -> None:
    """A VM's state directory, and those above it: root's alone, but that mounts are passed to below the topmost."""
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        os.makedirs(parent, exist_ok=True)
        os.chmod(parent, 0o700)
        os.chmod(os.path.dirname(parent), 0o711)
    os.makedirs(path, 0o700, exist_ok=True)


def _text(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, separators=(",", ":")) + "\n").encode()


def _read(path: str) -> list[dict[str, Any]]:
    """The journal's lines. A torn one was never followed by what it announces: skipped."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        return []
    lines = []
    for text in raw.split(b"\n"):
        try:
            line = jsontext.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and _is_one(line):
            lines.append(line)
    return lines


def _is_one(line: dict[str, Any]) -> bool:
    """Whether it says what a line of ours says, of the kinds above."""
    numbers = [line[name] for name in ("n", "commit") if name in line]
    words = [line[name] for name in ("take", "by") if name in line]
    right = all(type(number) is int for number in numbers) and all(isinstance(word, str) for word in words)
    return right and ("commit" in line or ("n" in line and ("take" in line or "gone" in line)))
