"""Commands in containers: what they are, what they can reach, and how they end."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onelxc import containers, executions
from onelxc.config import HostConfig
from onelxc.errors import HypervisorError, NoSuchDomainError
from onelxc.root import execution
from onelxc.root.journal import Journal
from onelxc.root.work import Work
from tests.support import hostconf, installation
from tests.support.plain_container import Container, eventually
from tests.support.stream import PATH, Outcome
from tests.support.vms import MONITORD, REMOTES, Vm
from tests.support.waiting import SLOWER, wait_until

BASE = 1879048192
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def container() -> Iterator[Callable[..., Container]]:
    made: list[Container] = []

    def make(vm_id: int, script: str = "exec sleep 1000", **options: Any) -> Container:
        made.append(Container(vm_id, script, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()
        eventually("the end of the command", lambda: not executions.running(one.vm_id))  # noqa: B023
        execution.forget(one.vm_id)


@pytest.fixture(params=["unprivileged", "privileged"])
def one(container: Callable[..., Container], request: pytest.FixtureRequest) -> Container:
    return container(820, id_base=BASE if request.param == "unprivileged" else 0)


def work(vm_id: int, **policy: Any) -> Work:
    return Work(vm_id, "exec", Journal("/nonexistent", "exec"), HostConfig(**policy), print)


def start(vm_id: int, command: str, stdin: bytes = b"", **policy: Any) -> None:
    execution.start(work(vm_id, **policy), {"command": command, "stdin": base64.b64encode(stdin).decode()})


def result(vm_id: int) -> dict[str, Any]:
    """The one thing that is told, with its output decoded."""
    eventually("the end of the command", lambda: not executions.running(vm_id))
    eventually("a result", executions.pending)
    told = execution.finished(HostConfig(), {}, print)["vms"]
    assert [each["id"] for each in told] == [vm_id]
    assert execution.finished(HostConfig(), {}, print)["vms"] == [], "told twice"
    return {**told[0], **{name: base64.b64decode(told[0][name]) for name in ("stdout", "stderr")}}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "HOLD_S", 0.0)


def run(vm_id: int, command: str, stdin: bytes = b"") -> dict[str, Any]:
    start(vm_id, command, stdin)
    return result(vm_id)


def test_output_exit_code_and_stdin(one: Container) -> None:
    told = run(one.vm_id, "cat; echo to stderr >&2; exit 7", b"given on\nstdin")
    assert told["status"] == "DONE"
    assert (told["code"], told["stdout"], told["stderr"]) == (7, b"given on\nstdin", b"to stderr\n")


def test_it_is_root_of_the_container_in_all_its_namespaces(one: Container) -> None:
    spaces = "for n in user mnt pid net ipc uts; do readlink /proc/self/ns/$n; done"
    (one.root / "spaces").write_text(spaces)
    told = run(one.vm_id, f"id -u; id -g; id -G; hostname; {spaces}; for n in user mnt pid net ipc uts;"
               " do readlink /proc/1/ns/$n; done")  # fmt: skip
    lines = told["stdout"].decode().split()
    assert lines[:4] == ["0", "0", "0", "one-820"]
    assert lines[4:10] == lines[10:]
    assert len(lines) == 16
    host = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "pid", "net", "ipc", "uts")]
    assert not set(host) & set(lines)


def test_it_is_no_more_than_init(one: Container) -> None:
    names = "Cap|Groups|NoNewPrivs|Seccomp:"
    told = run(one.vm_id, f"grep -E '{names}' /proc/1/status | grep -v CapEff; echo; cat /proc/1/limits; echo;"
               f" cat /proc/1/cgroup; echo =; grep -E '{names}' /proc/self/status | grep -v CapEff; echo;"
               " cat /proc/self/limits; echo; cat /proc/self/cgroup")  # fmt: skip
    init, own = told["stdout"].decode().split("=\n")
    assert init == own.rstrip("=")
    assert "CapBnd" in own
    (one.root / "bin/sh").unlink()  # ash ignores SIGQUIT by itself
    signals = run(one.vm_id, "grep -E 'SigBlk|SigIgn' /proc/self/status")["stdout"].split()
    assert signals == [b"SigBlk:", b"0" * 16, b"SigIgn:", b"0" * 16]


def test_nothing_of_the_host_comes_along(one: Container) -> None:
    told = run(one.vm_id, "ls -l /proc/self/fd | grep -v 'self/fd$' | wc -l; ls /proc/$$/fd; env | sort; pwd; umask;"
               " ps -o pid,ppid,args; cat /proc/keys | wc -l")  # fmt: skip
    text = told["stdout"].decode()
    assert "0\n1\n2\nHOME=/root\n" in text, "a descriptor more than the three pipes"
    assert "SUDO" not in text
    assert "python" not in text
    assert "\n/\n0022\n" in text
    environment = [line.split("=")[0] for line in text.splitlines() if "=" in line]
    assert environment == ["HOME", "LANG", "LOGNAME", "PATH", "PWD", "SHELL", "SHLVL", "USER", "container"]


def test_its_output_can_be_opened_by_name(one: Container) -> None:
    assert run(one.vm_id, "echo by name > /dev/stdout || echo refused")["stdout"] == b"by name\n"


def test_much_output_is_cut_in_the_middle(one: Container) -> None:
    told = run(one.vm_id, "seq 1 200000; seq 1 200000 >&2")
    for stream in ("stdout", "stderr"):
        assert told[stream].startswith(b"1\n2\n3\n")
        assert told[stream].endswith(b"199999\n200000\n")
        assert b"bytes left out" in told[stream]
        assert len(told[stream]) < 20000
    assert told["code"] == 0


def test_a_daemon_that_it_starts_lives_on_and_holds_nobody_up(one: Container) -> None:
    began = time.monotonic()
    told = run(one.vm_id, "sleep 999 & echo started")
    assert time.monotonic() - began < 30
    assert (told["code"], told["stdout"]) == (0, b"started\n")
    assert run(one.vm_id, "ps -o args | grep -c '[s]leep 999'")["stdout"] == b"1\n"


def test_time_limit(one: Container) -> None:
    limit_s = 0.5 * SLOWER
    start(one.vm_id, "echo begun; sleep 888 & sleep 888", exec_timeout_s=limit_s)
    told = result(one.vm_id)
    assert (told["status"], told["stdout"]) == ("ERROR", b"begun\n")
    assert told["stderr"] == f"onelxc: killed after {limit_s:g} s\n".encode()
    assert run(one.vm_id, "ps -o args | grep -c '[s]leep 888'")["stdout"] == b"0\n"


def test_cancel(one: Container) -> None:
    start(one.vm_id, "trap '' TERM INT HUP; (trap '' TERM; sleep 777) & sleep 777")
    eventually("the command", lambda: executions.running(one.vm_id))
    with pytest.raises(HypervisorError, match="still being executed"):
        start(one.vm_id, "true")
    execution.cancel(work(one.vm_id), {})
    assert not executions.running(one.vm_id)
    assert execution.finished(HostConfig(), {}, print)["vms"] == []
    assert run(one.vm_id, "ps -o args | grep -c '[s]leep 777'")["stdout"] == b"0\n"
    execution.cancel(work(one.vm_id), {})


def test_a_result_is_held_back_until_oned_has_set_executing(one: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "HOLD_S", 1000.0)
    start(one.vm_id, "true")
    eventually("the end of the command", lambda: not executions.running(one.vm_id))
    eventually("its result", lambda: os.path.exists(executions.path(one.vm_id, "done")))
    assert executions.pending() == []
    os.utime(executions.path(one.vm_id, "done"), (0, 0))
    assert result(one.vm_id)["code"] == 0


def test_the_attendant_is_killed(one: Container) -> None:
    start(one.vm_id, "sleep 666")
    attendant = executions.running(one.vm_id)
    os.kill(attendant, signal.SIGKILL)
    told = result(one.vm_id)
    assert told["status"] == "ERROR"
    assert b"was killed" in told["stderr"]
    assert run(one.vm_id, "ps -o args | grep -c '[s]leep 666'")["stdout"] == b"0\n"


def test_without_a_shell_the_words_are_executed(one: Container) -> None:
    run(one.vm_id, "true")  # init, which is a shell, runs
    (one.root / "bin/sh").unlink()
    assert run(one.vm_id, "echo 'two words'")["stdout"] == b"two words\n"
    told = run(one.vm_id, "nonesuch")
    assert (told["status"], told["code"]) == ("ERROR", 126)
    assert b"nonesuch" in told["stderr"]


def test_the_container_ends_under_it(container: Callable[..., Container]) -> None:
    one = container(821, "while ! [ -e /go ]; do sleep 0.05; done")
    start(821, "sleep 555")
    (one.root / "go").touch()
    eventually("the end of the container", lambda: 821 not in [one.vm_id for one in containers.running()])
    eventually("the end of the command", lambda: not executions.running(821))
    assert execution.finished(HostConfig(), {}, print)["vms"] == [], (
        "a VM that is off was told CANCELLED by oned itself"
    )
    with pytest.raises(NoSuchDomainError):
        start(821, "true")


def test_right_after_create_it_waits_for_init(container: Callable[..., Container]) -> None:
    one = container(822, id_base=BASE)
    told = run(one.vm_id, "cat /proc/1/cmdline | tr '\\0' ' '; readlink /proc/1/exe")
    assert b"libvirt" not in told["stdout"]


# The tenant's side of the window between fork and exec: look at every new process as fast as one can, and take hold of
# what can be had: its executable, its descriptors, its memory. Says what it got of a process that is neither init, nor
# itself, nor something executed from the container's own files.
SPY = """
import os
import re
own = {os.stat("/bin/busybox").st_ino, os.stat("/proc/self/exe").st_ino}
mine = os.getpid()
refused = 0
while not os.path.exists("/stop"):
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in (1, mine):
            continue
        for what in ("exe", "mem", "environ", "root", "cwd", "fd", "map_files"):
            path = f"/proc/{entry}/{what}"
            try:
                if what in ("fd", "map_files"):
                    for name in os.listdir(path):
                        target = os.readlink(f"{path}/{name}")
                        if what == "map_files" and "python" in target or "anon_inode" in target or "memfd" in target:
                            print("GOT", path, target, flush=True)
                        if what == "map_files" and "python" in target:
                            try:
                                os.close(os.open(f"{path}/{name}", os.O_RDWR))
                                print("WRITABLE", path, target, flush=True)
                            except OSError as error:
                                print("KEPT", error.errno, flush=True)
                elif what == "exe":
                    fd = os.open(path, os.O_RDONLY)
                    if "python" in os.readlink(f"/proc/self/fd/{fd}"):
                        print("GOT", path, flush=True)
                        try:
                            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
                            print("WRITABLE", path, flush=True)
                        except OSError as error:
                            print("KEPT", error.errno, flush=True)
                    os.close(fd)
                else:
                    os.close(os.open(path, os.O_RDONLY))
            except PermissionError:
                refused += 1
            except OSError:
                pass
print("REFUSED", refused, flush=True)
"""


@pytest.mark.parametrize("id_base", [BASE, 0], ids=["unprivileged", "privileged"])
def test_a_hostile_container_gets_hold_of_nothing(container: Callable[..., Container], id_base: int) -> None:
    mounts = "<filesystem type='mount'><source dir='/usr'/><target dir='/usr'/><readonly/></filesystem>"
    script = "while ! [ -e /spy ]; do sleep 0.05; done\n/usr/bin/python3 -S -u /spy > /said 2>&1\nexec sleep 1000\n"
    one = container(823, script, id_base=id_base, mounts=mounts)
    for name in ("lib", "lib64"):
        (one.root / name).symlink_to(f"usr/{name}")
    (one.root / "spy.new").write_text(SPY)
    (one.root / "spy.new").rename(one.root / "spy")
    eventually("the spy's start", (one.root / "said").exists)
    for _ in range(30):
        assert run(823, "true")["code"] == 0
    (one.root / "stop").touch()
    eventually("the spy's end", lambda: "REFUSED" in (one.root / "said").read_text())
    said = (one.root / "said").read_text()
    assert "WRITABLE" not in said
    if id_base:
        assert "GOT" not in said
        assert int(said.split("REFUSED")[1]) > 0, "it never met one in the window: this test has shown nothing"
    else:
        # root of the host's user namespace may look, but all of it lies on read-only mounts (30 is EROFS)
        assert "KEPT 30" in said, f"it never met one in the window: this test has shown nothing: {said}"


def execute(one: Vm, command: str, stdin: bytes = b"") -> Outcome:
    """As one_vmm_exec.rb runs `onevm exec`: the command in argv, escaped for the shells on its way, and in the XML."""
    data = base64.b64encode(stdin).decode()
    one.template["QEMU_GA_EXEC"] = {"COMMAND": command, "STDIN": data}
    words = [str(one.vm_id), "node1", shellwords(command), data]
    return one.driver("exec", *words, stdin=one.action_xml(lcm_state=17))


def shellwords(text: str) -> str:
    """Ruby's Shellwords.escape."""
    return re.sub(r"([^A-Za-z0-9_\-.,:+/@\n])", r"\\\1", text).replace("\n", "'\n'") or "''"


def executed(one: Vm) -> dict[str, str]:
    """What vm/execution tells of its one command, once it tells it."""
    probe = "onelxc-probes.d/vm/execution/onelxc"
    ask = lambda: one.driver.probe(probe, "onelxc", 0, "node1", stdin="<X/>").ok().out  # noqa: E731
    said = wait_until(ask, "the result is told", timeout_s=30)
    assert said.startswith(f'VM = [ ID="{one.vm_id}", PID="')
    assert ask() == "", "told twice"
    found = dict(re.findall(r'(\w+)="([^"]*)"', said))
    return {**found, **{name: base64.b64decode(found[name]).decode() for name in ("STDOUT", "STDERR")}}


@pytest.mark.generation(MONITORD)
def test_as_opennebula_calls_it(vm: Callable[..., Vm]) -> None:
    one = vm().deployed().booted()
    assert execute(one, "echo said; echo wrong >&2; cat; exit 3", b"read").ok().out == ""
    told = executed(one)
    assert (told["STATUS"], told["RETURN_CODE"]) == ("DONE", "3")
    assert (told["STDOUT"], told["STDERR"]) == ("said\nread", "wrong\n")

    execute(one, "sleep 1000").ok()
    outcome = execute(one, "true")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.message == f"Cannot execute in {one.name}: a command is still being executed there"
    assert one.driver("exec_cancel", one.vm_id, "node1", stdin=one.action_xml(lcm_state=17)).ok().out == ""
    assert one.inside("ps | grep -c '[s]leep 1000'", check=False) == "0\n"
    assert one.driver.probe("onelxc-probes.d/vm/execution/onelxc", "onelxc", 0, "node1", stdin="<X/>").ok().out == ""


AWKWARD = """printf '%s|' "it's" '$HOME `id`' "$HOME" \\\\ 'zwölf ✓' &&
echo "last's" line"""


@pytest.mark.generation(MONITORD)
def test_every_quote_and_line_of_a_command_arrives(vm: Callable[..., Vm]) -> None:
    """By exec_by_ssh of the front-end, which one_vmm_exec.rb runs in a shell of its own, with the XML in base64."""
    with hostconf.with_line('PRIVILEGED = "yes"'):
        one = vm(user_template={"LXC_UNPRIVILEGED": "no"}).deployed().booted()
    assert one.privileged
    front_end = f"{installation.FRONT_ENDS}/{MONITORD}/var"
    Path(f"{front_end}/config").write_text(f"SCRIPTS_REMOTE_DIR={REMOTES}\n")
    ssh = Path(one.path("ssh"))
    ssh.write_text('#!/bin/sh\nshift\nexec bash -c "$*"\n')  # the host is this machine
    ssh.chmod(0o755)
    one.template["QEMU_GA_EXEC"] = {"COMMAND": AWKWARD, "STDIN": ""}
    command = f"{front_end}/remotes/vmm/onelxc/exec_by_ssh {one.vm_id} node1 {shellwords(AWKWARD)} "
    done = subprocess.run(
        ["runuser", "-u", "oneadmin", "--", "env", f"PATH={one.directory}:{PATH}", "sh", "-c", command],
        input=base64.b64encode(one.action_xml(lcm_state=17).encode()), capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    told = executed(one)
    assert (told["RETURN_CODE"], told["STDERR"]) == ("0", "")
    assert told["STDOUT"] == "it's|$HOME `id`|/root|\\|zwölf ✓|last's line\n"
