"""What OpenNebula was seen to send: every capture as argv and stdin, unchanged (tests/captures/README.md)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from onelxc.config import Generation

DIRECTORY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "captures")


@dataclass(frozen=True)
class Capture:
    """`case` is its directory, `argv` has the program first."""

    case: str
    generation: Generation
    argv: tuple[str, ...]
    stdin: bytes | None

    @property
    def action(self) -> str:
        return os.path.basename(self.argv[0])

    def read(self) -> bytes:
        assert self.stdin is not None, f"{self.case}: stdin is read although OpenNebula leaves it open"
        return self.stdin


def load() -> tuple[Capture, ...]:
    """All captures, probes too (their program is called PROBE)."""
    found = []
    for directory, _, files in sorted(os.walk(DIRECTORY)):
        if "argv.txt" not in files:
            continue
        case = os.path.relpath(directory, DIRECTORY)
        with open(os.path.join(directory, "argv.txt"), encoding="utf-8") as file:
            argv = tuple(line[1:-1] for line in file.read().splitlines())
        stdin = None
        if "stdin.xml" in files:
            with open(os.path.join(directory, "stdin.xml"), "rb") as raw:
                stdin = raw.read()
        generation = Generation.PULL if case.startswith("3.2.1") else Generation.MONITORD
        found.append(Capture(case, generation, argv, stdin))
    return tuple(found)


ALL = load()
ACTIONS = tuple(capture for capture in ALL if capture.action != "PROBE")


def named(case: str) -> Capture:
    return next(capture for capture in ALL if capture.case == case)
