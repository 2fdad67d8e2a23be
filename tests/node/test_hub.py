"""The hub on real containers: nothing hangs on its console, nobody steals bytes, and it survives what it meets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc.model import VmPaths
from onelxc.root import consolelog, hub
from onelxc.root.consoles import socket_path
from tests.support import machine
from tests.support.plain_container import WAIT_S, Container, eventually
from tests.support.waiting import read_until

REPOSITORY = Path(__file__).resolve().parents[2]


def log(vm_id: int) -> bytes:
    path = Path(VmPaths(vm_id).console_log)
    parts = [part for part in (Path(f"{path}.1"), path) if part.exists()]
    return b"".join(part.read_bytes() for part in parts)


@pytest.fixture
def container() -> Iterator[Callable[..., Container]]:
    made: list[Container] = []

    def make(vm_id: int, script: str, *, ours: bool = True) -> Container:
        made.append(Container(vm_id, script, ours=ours))
        return made[-1]

    hub.ensure_running()
    yield make
    for one in made:
        one.end()


def test_a_chatty_container_does_not_hang_and_its_log_is_bounded(container: Callable[..., Container]) -> None:
    one = container(801, "seq 1 1000000\necho THE-END\n> /done\nsleep 1000\n")
    eventually("the script's end", (one.root / "done").exists)
    eventually("the last words in the log", lambda: consolelog.tail(801, 1) == ("THE-END",))
    sizes = [os.path.getsize(VmPaths(801).console_log + suffix) for suffix in ("", ".1")]
    assert max(sizes) <= consolelog.LIMIT
    assert sum(sizes) > consolelog.LIMIT, "less was kept than there is room for"
    numbers = [int(line) for line in log(801).split(b"\r\n")[1:-2]]
    assert numbers == list(range(1000000 - len(numbers) + 1, 1000001))


def test_two_readers_see_the_same_bytes_and_typing_arrives(container: Callable[..., Container]) -> None:
    one = container(802, "stty -echo\necho READY\nread word\nseq 1 20000\necho $word-AND-OUT\nsleep 1000\n")
    first, second = one.attach(), one.attach()
    read_until(first, b"READY\r\n")
    read_until(second, b"READY\r\n")
    first.sendall(b"OVER\n")
    said = [read_until(stream, b"OVER-AND-OUT\r\n") for stream in (first, second)]
    assert said[0] == said[1] == b"".join(b"%d\r\n" % n for n in range(1, 20001)) + b"OVER-AND-OUT\r\n"
    late = one.attach()
    assert read_until(late, b"OVER-AND-OUT\r\n").endswith(b"20000\r\nOVER-AND-OUT\r\n")


def test_a_reader_who_does_not_read_stops_nobody(container: Callable[..., Container]) -> None:
    one = container(803, "stty -echo\necho READY\nread word\nseq 1 600000\n> /done\nsleep 1000\n")
    asleep = one.attach()
    asleep.sendall(b"go\n")
    eventually("the script's end", (one.root / "done").exists)
    asleep.close()


def test_killed_and_started_again_it_goes_on_where_it_was(container: Callable[..., Container]) -> None:
    one = container(804, "echo BEFORE\nwhile ! [ -e /go ]; do sleep 0.05; done\necho MEANWHILE\n> /said\nsleep 1000\n")
    eventually("the first word", lambda: log(804) == b"BEFORE\r\n")
    killed = hub.pid()
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    eventually("its death", lambda: not hub.is_running())
    (one.root / "go").touch()
    eventually("the second word", (one.root / "said").exists)
    hub.ensure_running()
    assert hub.pid() != killed
    eventually("what was said meanwhile", lambda: log(804) == b"BEFORE\r\nMEANWHILE\r\n")


def test_only_one_runs_however_many_start_it() -> None:
    started = hub.pid()
    if started is not None:
        os.kill(started, signal.SIGTERM)
        eventually("its end", lambda: not hub.is_running())
    code = "import sys; sys.path.insert(0, sys.argv[1]); from onelxc.root import hub; hub.ensure_running()"
    code += "; print(hub.pid())"
    many = [
        subprocess.Popen([sys.executable, "-c", code, str(REPOSITORY)], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = {process.communicate(timeout=WAIT_S)[0] for process in many}
    assert said == {f"{hub.pid()}\n"}


def test_libvirtd_restarted(container: Callable[..., Container]) -> None:
    one = container(805, "echo FIRST\nwhile ! [ -e /go ]; do sleep 0.05; done\necho SECOND\nsleep 1000\n")
    eventually("the first word", lambda: log(805) == b"FIRST\r\n")
    with machine.libvirtd_away():
        (one.root / "go").touch()
        eventually("what is said without libvirtd", lambda: log(805) == b"FIRST\r\nSECOND\r\n")
    container(806, "echo A NEW ONE\nsleep 1000\n")
    eventually("a console opened after the restart", lambda: log(806) == b"A NEW ONE\r\n")


def test_a_reboot_from_inside_is_followed(container: Callable[..., Container]) -> None:
    script = "if [ -e /booted ]; then echo SECOND BOOT; sleep 1000; fi\n> /booted\necho FIRST BOOT\nread x\nreboot -f\n"
    one = container(807, script)
    attached = one.attach()
    read_until(attached, b"FIRST BOOT\r\n")
    attached.sendall(b"\n")
    read_until(attached, b"SECOND BOOT\r\n")
    eventually("both boots in the log", lambda: consolelog.tail(807, 2) == ("FIRST BOOT", "SECOND BOOT"))


def test_people_are_told_when_the_container_is_gone(container: Callable[..., Container]) -> None:
    one = container(808, "stty -echo\necho READY\nread x\n")
    attached = one.attach()
    read_until(attached, b"READY\r\n")
    attached.sendall(b"\n")
    while attached.recv(100):
        pass  # one that libvirt lost was started twice, and said so twice; then comes the end, or the socket's time-out
    eventually("no socket", lambda: not os.path.exists(socket_path(808)))


def test_a_container_that_is_not_ours_is_not_touched(container: Callable[..., Container]) -> None:
    container(809, "echo FOREIGN\nsleep 1000\n", ours=False)
    container(810, "echo OURS\nsleep 1000\n")
    eventually("ours", lambda: log(810) == b"OURS\r\n")
    assert not os.path.exists(socket_path(809))
    assert log(809) == b""


def test_it_ends_when_there_is_nothing_to_watch(container: Callable[..., Container]) -> None:
    started = hub.pid()
    assert started is not None
    os.kill(started, signal.SIGTERM)
    eventually("its end", lambda: not hub.is_running())
    one = container(811, "sleep 1000\n")
    process = subprocess.Popen([REPOSITORY / "libexec/onelxc-hub", "--idle-s", "0.5"])
    try:
        eventually("the console", lambda: os.path.exists(socket_path(811)))
        assert process.poll() is None
        one.end()
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
    assert hub.pid() is None
    assert not os.path.exists(socket_path(811))
