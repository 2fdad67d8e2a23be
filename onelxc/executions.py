"""Is there anything to tell of commands in containers? A look at two kinds of files, for root and for the probe.

    /run/onelxc/exec/N.run     "<pid> <start time>" of the process that attends the VM's command, while it lives
    /run/onelxc/exec/N.done    the result, root's, until it was told; its time of modification is when it may be, in
                               seconds since boot, which nobody sets back

Reads only; who writes and removes them is `root.execution`.
"""

from __future__ import annotations

import os

from onelxc import names, samples

DIRECTORY = f"{names.RUN}/exec"


def path(vm_id: int, kind: str) -> str:
    """`kind` is "run" or "done"."""
    return f"{DIRECTORY}/{vm_id}.{kind}"


def pending() -> list[tuple[int, str]]:
    """(VM id, file) of what may be told now: results, and commands whose attendant was killed."""
    try:
        entries = sorted(os.listdir(DIRECTORY))
    except OSError:
        return []
    found = []
    for entry in entries:
        number, _, kind = entry.partition(".")
        if not names.is_number(number):
            continue
        vm_id = int(number)
        lost = kind == "run" and f"{number}.done" not in entries and not running(vm_id)
        if lost or (kind == "done" and _modified(path(vm_id, kind)) <= samples.now_s()):
            found.append((vm_id, path(vm_id, kind)))
    return found


def running(vm_id: int) -> int:
    """The pid of the process that attends the VM's command, 0 if there is none."""
    try:
        with open(path(vm_id, "run")) as file:
            pid, _, started = file.read().partition(" ")
    except OSError:
        return 0
    return int(pid) if names.is_number(pid) and started and start_time(int(pid)) == started else 0


def start_time(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if it is gone. With the pid it names a process for ever."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return ""


def _modified(file: str) -> float:
    try:
        return os.stat(file).st_mtime
    except OSError:
        return float("inf")
