"""How does a test wait? For a condition, with a generous limit, never for a length of time."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

HUB_LOG = "/var/log/onelxc/hub.log"
SLOWER = 4 if os.environ.get("ONELXC_IN_VM") else 1
"""In the emulated machine (tools/vm) conditions get more time, and are asked less often: asking costs it dear."""


def wait_until(
    condition: Callable[[], T], what: str = "", *, timeout_s: float = 60, interval_s: float = 0.05 * SLOWER
) -> T:
    """The first true answer of `condition`; AssertionError with `what` and the last answer if there is none in time."""
    timeout_s *= SLOWER
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            # shown by pytest beside the failure: which process is it that does not do what is waited for?
            listing = ["ps", "-eo", "pid,ppid,stat,wchan:20,args", "--forest"]
            print(subprocess.run(listing, capture_output=True, text=True).stdout)
            if os.path.exists(HUB_LOG):
                with open(HUB_LOG, errors="replace") as log:
                    print(f"{HUB_LOG}:", *log.readlines()[-10:])
            raise AssertionError(f"not within {timeout_s:g} s: {what or condition} (last answer: {answer!r})")
        time.sleep(interval_s)


def read_until(stream: socket.socket, end: bytes) -> bytes:
    """What comes from `stream` up to and with `end`; AssertionError if the stream ends before."""
    said = b""
    while end not in said:
        data = stream.recv(65536)
        assert data, f"the stream ended before {end!r}: {said[-200:]!r}"
        said += data
    return said
