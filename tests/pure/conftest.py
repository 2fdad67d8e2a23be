"""The pure tier: no process, no libvirt, no root. Text in, data out."""

from __future__ import annotations

import subprocess
from typing import Any, NoReturn

import pytest


class ProcessStartedError(BaseException):
    """Not an Exception, so that nothing which is being tested swallows it."""


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pure test that starts a process is in the wrong tier."""

    def refuse(*arguments: Any, **_: Any) -> NoReturn:
        raise ProcessStartedError(f"a pure test started a process: {arguments[:1]}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr("os.fork", refuse)
    monkeypatch.setattr("os.system", refuse)
