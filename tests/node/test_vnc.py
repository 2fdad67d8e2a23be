"""GRAPHICS TYPE=VNC: a viewer at the port sees the console, takes nothing away, and is let go with the VM."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc import vnc
from onelxc.model import Graphics, VmPaths
from tests.support import machine
from tests.support.vms import REMOTES, Vm
from tests.support.waiting import read_until, wait_until

NewVm = Callable[..., Vm]
STAND_IN = Path(__file__).resolve().parents[1] / "support/svncterm_server.py"
INSTALLED = "/usr/local/bin/svncterm_server"
PORT = 5917


@pytest.fixture
def server(clean: None) -> Iterator[None]:
    """The program is on the host; it is started by whoever needs it and ended after the test."""
    shutil.copy(STAND_IN, INSTALLED)
    os.chmod(INSTALLED, 0o755)
    yield
    os.unlink(INSTALLED)
    for pid in machine.pids():
        if INSTALLED in machine.command_line(pid):
            os.kill(pid, 9)
    Path(vnc.PIPE).unlink(missing_ok=True)


def view(port: int = PORT) -> socket.socket:
    def connected() -> socket.socket | None:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        except ConnectionRefusedError:
            return None

    found = wait_until(connected, f"something listens on {port}")
    assert found
    return found


def listens(port: int = PORT) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def with_vnc(vm: NewVm, **graphics: str) -> Vm:
    return vm(template={"GRAPHICS": {"TYPE": "vnc", "LISTEN": "0.0.0.0", "PORT": str(PORT), **graphics}})


def test_two_viewers_and_the_log_see_the_console(vm: NewVm, server: None) -> None:
    one = with_vnc(vm).deployed().booted()
    first, second = view(), view()
    for viewer in (first, second):
        read_until(viewer, b"leaves.")  # attached; what is said from here on all of them see
    wait_until(lambda: machine.inside(one.name, "echo SAID > /dev/console; echo x", check=False), "a word")
    for viewer in (first, second):
        read_until(viewer, b"SAID")
    wait_until(lambda: b"SAID" in Path(VmPaths(one.vm_id).console_log).read_bytes(), "the word in the log")
    assert pwd.getpwuid(os.stat(vnc.PIPE).st_uid).pw_name == "oneadmin"
    one.act("cancel").ok()
    for viewer in (first, second):
        while viewer.recv(4096):
            pass
    wait_until(lambda: not listens(), "the port is free")


def test_a_container_that_powers_itself_off_frees_the_port(vm: NewVm, server: None) -> None:
    one = with_vnc(vm).deployed().booted()
    view().close()
    one.inside("poweroff", check=False)
    wait_until(lambda: one.name not in machine.domains(), "the container has ended")
    one.act("poll").ok()
    wait_until(lambda: not listens(), "the port is free")
    one.deployed()
    view().close()


def test_two_vms_do_not_show_their_consoles_on_one_port(vm: NewVm, server: None) -> None:
    one = with_vnc(vm).deployed().booted()
    two = with_vnc(vm, LISTEN="127.0.0.1")
    outcome = two.deploy()
    assert outcome.code == 1
    assert f"VM {one.vm_id} has port {PORT}" in two.driver.message(outcome)
    two.act("cancel").ok()
    viewer = view()
    read_until(viewer, b"leaves.")
    machine.inside(one.name, "echo SAID > /dev/console")
    read_until(viewer, b"SAID")


def test_a_port_of_the_hosts_own_stays_the_hosts(vm: NewVm, server: None) -> None:
    with socket.socket() as service:
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        service.bind(("127.0.0.1", PORT))
        service.listen()
        said: list[str] = []
        vnc.start(7, Graphics(PORT), said.append)
        assert said == [f"no VNC: port {PORT}: Address already in use"]
        with_vnc(vm).deployed()


@pytest.mark.parametrize("password", ["x\n6000 - /bin/sh", "two words", "-", "ö", "x" * 300])
def test_a_password_does_not_become_a_command(server: None, password: str) -> None:
    said: list[str] = []
    vnc.start(7, Graphics(PORT, password=password), said.append)
    assert len(said) == 1
    assert said[0].startswith("no VNC: PASSWD")
    assert not os.path.exists(vnc.PIPE)


def test_a_pipe_of_another_user_gets_no_password(server: None) -> None:
    machine.command("runuser", "-u", "nobody", "--", "mkfifo", "-m", "666", vnc.PIPE)
    reader = os.open(vnc.PIPE, os.O_RDONLY | os.O_NONBLOCK)
    code = (
        f"import sys; sys.path.insert(0, '{REMOTES}'); from onelxc import vnc, model;"
        f" vnc.start(7, model.Graphics({PORT}, password='secret'), print)"
    )
    assert "of another user" in machine.command("runuser", "-u", "oneadmin", "--", "/usr/bin/python3", "-c", code)
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_without_the_server_the_vm_runs_and_the_log_says_why(vm: NewVm) -> None:
    one = with_vnc(vm)
    conf = Path(one.driver.directory, "vmm_exec_lxc.conf")
    before = conf.read_text()
    conf.write_text(before + '\nFEATURES = [ VERBOSE = "yes" ]\n')
    try:
        outcome = one.deploy().ok()
    finally:
        conf.write_text(before)
    assert outcome.out == f"{one.name}\n"
    assert "INFO: deploy: no VNC: svncterm_server of OpenNebula's node packages is not on this host" in outcome.err
