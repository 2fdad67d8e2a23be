"""Programs and readers of ours that see a tenant's bytes have bounds, measured from outside: of memory, time, rights.

What our own parsers say to such bytes is in tests/pure/test_hostile_bytes.py.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from onelxc import __version__, command
from onelxc.errors import CommandError, StorageError
from onelxc.root import cgroups, consolelog, context, filesystems, jail, layout, loops, mounts, orphans, rawview
from tests.support import images, machine
from tests.support.diskimages import sh
from tests.support.vms import Vm
from tests.support.waiting import wait_until

NewVm = Callable[..., Vm]
LIMIT = 128 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Loop devices over files."""
    held: list[loops.Loop] = []

    def attach(path: Path) -> str:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        held.append(loops.attach(fd, name=str(path)))
        os.close(fd)
        return held[-1].path

    yield attach
    for one in held:
        one.close()


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that any process that is a descendant of the action's had in memory."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    # of this child and of those that it waited for; RUSAGE_CHILDREN is of all that the tests before had
    return usage.ru_maxrss << 10


def helper(*words: str, stdin: int | BinaryIO) -> tuple[int, list[str], int]:
    """Exit code, lines and peak memory of the root helper itself."""
    program = str(Path(__file__).resolve().parents[2] / "libexec/onelxc-root")
    argv = [sys.executable, program, *words]
    process = subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, out.decode().splitlines(), usage.ru_maxrss << 10


# programs on images


def test_a_program_on_a_tenants_device_is_a_stranger_without_rights(
    tmp_path: Path, device: Callable[[Path], str]
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"tenant's".ljust(1 << 20, b"\0"))
    status = 'grep -E "^(Uid|Groups|Cap|NoNewPrivs)" /proc/self/status; cat /proc/self/limits'
    look = f'head -c 8 "$0"; echo; {status}; ls /proc /dev; id >/x'
    limits = jail.Limits(memory_bytes=LIMIT, cpu_s=20, processes=4, file_bytes=0)
    outcome = jail.on_device(device(image), ("sh", "-c", look, jail.DEVICE), limit_s=60, limits=limits)
    told = {
        line.partition(":")[0]: line.partition(":")[2].split() for line in outcome.stdout.splitlines() if ":" in line
    }
    assert outcome.stdout.startswith("tenant's\n")
    assert all(int(uid) > 0xF0000000 for uid in told["Uid"])
    assert told["Groups"] == []
    assert {told[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert told["NoNewPrivs"] == ["1"]
    rows = {line[:25].strip(): line[25:].split()[:2] for line in outcome.stdout.splitlines() if line.startswith("Max ")}
    assert rows["Max data size"] == [str(LIMIT)] * 2
    assert rows["Max cpu time"] == ["20"] * 2
    assert rows["Max processes"] == ["4"] * 2
    assert rows["Max core file size"] == ["0"] * 2
    assert "sysrq-trigger" not in outcome.stdout and "loop-control" not in outcome.stdout
    assert "Read-only file system" in outcome.stderr or "Permission denied" in outcome.stderr


def test_a_checker_takes_no_more_memory_than_it_may(
    tmp_path: Path, device: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^30 inodes in a sparse file of some MiB: e2fsck wants 330 MiB for its tables."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 4 << 40)
    options = "lazy_itable_init=1,nodiscard"
    sh("mkfs.ext4", "-q", "-F", "-i", "4096", "-O", "^has_journal", "-E", options, str(image))
    assert filesystems._WORK.memory_bytes and filesystems._WORK.memory_bytes <= 2 << 30
    monkeypatch.setattr(filesystems, "_WORK", jail.Limits(memory_bytes=LIMIT))
    path = device(image)

    def check() -> None:
        with pytest.raises(StorageError, match=r"Cannot check: e2fsck: ") as caught:
            filesystems.run_on(path, ("e2fsck", "-f", "-p"), "check")
        assert "\n" not in str(caught.value)

    assert peak_bytes(check) < LIMIT + (64 << 20)


def test_who_recognises_file_systems_has_no_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever libblkid were made to do by an image, it can open nothing of the host."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    image.chmod(0o600)

    def tell(_library: object, fd: int, _places: object) -> int:
        assert os.pread(fd, 1, 0) == b"\0"
        reached = [path for path in ("/etc/shadow", str(image), "/proc/1/environ", "/dev/sda") if os.path.exists(path)]
        os.write(1, json.dumps({"TYPE": f"{os.geteuid() > 0xF0000000} {reached}"}).encode())
        return 0

    monkeypatch.setattr("onelxc.root.blkid.tell", tell)
    fd = os.open(image, os.O_RDONLY)
    assert filesystems.probe_parts(fd, [(0, 0)], "x")[0].kind == "True []"
    os.close(fd)


@pytest.mark.parametrize("how", ["computes", "allocates", "dies"])
def test_who_recognises_file_systems_has_limits(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(*_: object) -> int:
        while how == "computes":
            pass
        if how == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        return len(bytearray(1 << 30))

    image = tmp_path / "image"
    image.write_bytes(b"x")
    monkeypatch.setattr("onelxc.root.blkid.tell", tell)
    monkeypatch.setattr(filesystems, "_LOOK", jail.Limits(memory_bytes=LIMIT, cpu_s=1))
    fd = os.open(image, os.O_RDONLY)
    with pytest.raises(StorageError, match=r"Cannot look at disk.9: ") as caught:
        filesystems.probe_parts(fd, [(0, 0)], "disk.9")
    assert "\n" not in str(caught.value)
    os.close(fd)


@pytest.mark.parametrize("said", ["[]", "5", "{", '{"TYPE":[[]],"AMBIVALENT":0}', "null", "[" * 100_000])
def test_nonsense_from_who_recognises_file_systems_is_a_line(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x")
    monkeypatch.setattr("onelxc.root.blkid.tell", lambda *_: os.write(1, said.encode()) * 0)
    fd = os.open(image, os.O_RDONLY)
    with pytest.raises(StorageError, match=r"answers with nonsense|the marks of more than one"):
        filesystems.probe_parts(fd, [(0, 0)], "disk.9")
    os.close(fd)


def test_every_place_of_a_file_is_told_apart(tmp_path: Path) -> None:
    parts = []
    for number, kind in enumerate(("ext4", "ext2")):
        part = tmp_path / f"part{number}"
        part.write_bytes(bytes(8 << 20))
        sh(f"mkfs.{kind}", "-q", "-F", "-L", f"name {number}", str(part))
        parts.append(part.read_bytes())
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20) + parts[0] + bytes(1 << 20) + parts[1])
    fd = os.open(image, os.O_RDONLY)
    places = [(1 << 20, 8 << 20), (9 << 20, 1 << 20), (10 << 20, 8 << 20)]
    found = filesystems.probe_parts(fd, places, "image")
    assert [(one.kind, one.label) for one in found] == [("ext4", "name 0"), ("", ""), ("ext2", "name 1")]
    os.close(fd)


def iso_of_loops() -> bytes:
    """Every entry of every directory is that directory: 10,000 of them are read before it is refused, at 8 levels."""
    record = bytearray(33) + b"a"
    record[0], record[25], record[32] = 34, 2, 1
    record[2:6], record[10:14] = struct.pack("<I", 18), struct.pack("<I", 4 << 20)
    head = bytearray(2048)
    head[:6] = b"\x01CD001"
    head[128:130] = struct.pack("<H", 2048)
    head[156:190] = record
    return bytes(16 * 2048) + bytes(head) + bytes(2048) + (bytes(record) * 60).ljust(2048, b"\0") * 2048


def test_a_context_that_leads_in_circles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "context"
    mounts.place(context.make(id_base=5_000_000), str(target), id_base=None)
    monkeypatch.setattr(context, "_LIMITS", jail.Limits(memory_bytes=256 << 20, cpu_s=2, processes=1))
    try:
        (tmp_path / "iso").write_bytes(iso_of_loops())
        with open(tmp_path / "iso", "rb") as file, pytest.raises(StorageError, match=r"Cannot read the context: "):
            context.fill(file.fileno(), str(target), id_base=5_000_000)
        assert not list(target.iterdir())
    finally:
        mounts.unmount(str(target))


def test_the_daemon_of_a_qcow2_has_limits(vm: NewVm, tmp_path: Path) -> None:
    sh("qemu-img", "convert", "-f", "raw", "-O", "qcow2", images.busybox_ext4(), str(tmp_path / "image"))
    vm(str(tmp_path / "image")).deployed().booted()
    daemons = [pid for pid in machine.pids() if rawview.DAEMON in machine.command_line(pid)]
    assert len(daemons) == 1
    rows = Path(f"/proc/{daemons[0]}/limits").read_text().splitlines()
    most = next(line.split()[3] for line in rows if line.startswith("Max data size"))
    assert int(most) == rawview._MEMORY + rawview._MEMORY_OF_EACH


def test_a_program_that_never_stops_writing_is_ended() -> None:
    def endless() -> None:
        with pytest.raises(CommandError, match="Cannot run yes: yes wrote more than 16 MiB"):
            command.run(["yes"])

    assert peak_bytes(endless) < 512 << 20


# the helper


@pytest.mark.parametrize("words", [("reap",), ("sample",), ("executions",), ("check", "--version", __version__)])
def test_a_request_without_end_is_refused_in_a_line(words: tuple[str, ...]) -> None:
    with open("/dev/zero", "rb") as zeros:
        status, lines, peak = helper(*words, stdin=zeros)
    assert status == 1
    assert [json.loads(line)["error"] for line in lines] == ["Cannot read a request: longer than 64 KiB"]
    assert peak < 1 << 30


def test_a_session_outlives_every_kind_of_nonsense() -> None:
    """One line of error each, and the worker answers the next request."""
    nonsense = [
        b"[" * 100_000,
        b'{"do":"detach_disk","disk_id":[1]}',
        b'{"do":"detach_disk","disk_id":' + b"9" * 5000 + b"}",
        b'{"do":"resize_disk","disk_id":{},"size_mb":null}',
        b'{"do":"resize_disk","disk_id":0,"size_mb":1e400}',
        b'{"do":"prepare","vm":' + b'{"vm":' * 50_000 + b"}",
        b'{"do":"prepare","vm":{"vm_id":4242,"disks":[{"disk_id":0,"path":"\\ud800"}]}}',
        b'{"do":"prepare","vm":{"vm_id":4242,"cpu":Infinity}}',
        b'{"do":"prepare","vm":{"vm_id":4242,"nics":[{"nic_id":0,"device":"one-4242-0","bridge":"b","guest_name":"e",'
        b'"vlan_tagged":"0-4294967295"}]}}',
        b'{"do":["x"]}',
        b'{"do":"exec","command":["a"],"stdin":{}}',
        b'{"do":"exec","command":"true","stdin":"\\u20ac"}',
        b'{"do":"new_nic","nic":[[[]]]}',
        b'{"do":"detach_nic","nic_id":true}',
        b'{"do":"snapshot_create","name":{"a":1}}',
        b'{"do":"resize","cpu":"nan","vcpu":[],"memory_kib":-1}',
        b'{"do":"freeze","why":[]}',
        b'{"do":"attach_disk","disk":{"disk_id":1e5}}',
        b"\xff\xfe",
        b"nothing",
    ]
    asked = b"\n".join([*nonsense, b'{"do":"record"}', b""])
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            view = memoryview(asked)
            while view:
                view = view[os.write(writer, view) :]
            os.read(os.open("/dev/null", os.O_RDONLY), 1)
            signal.pause()
        finally:
            os._exit(0)
    os.close(writer)
    program = str(Path(__file__).resolve().parents[2] / "libexec/onelxc-root")
    argv = [sys.executable, program, "session", "4242", "test", "--version", __version__]
    process = subprocess.Popen(argv, stdin=reader, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.close(reader)
    assert process.stdout is not None
    answers = [json.loads(process.stdout.readline()) for _ in range(len(nonsense) + 2)]
    assert "pid" in answers[0]["ok"]
    for question, answer in zip(nonsense, answers[1:-1]):
        assert set(answer) == {"error", "kind"}, question[:60]
        assert "internal error" not in answer["error"], (question[:60], answer)
        assert len(answer["error"]) < 3000
    assert answers[-1]["ok"]["ours"] is False
    for child in machine.pids():
        if orphans.comm(child).startswith("python") and child != os.getpid() and _waits(child):
            os.kill(child, signal.SIGKILL)
    rest, _ = process.communicate(timeout=30)
    assert rest == b""


def _waits(pid: int) -> bool:
    """Whether it is the child of ours that keeps the session's stdin open."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1]) == os.getpid() and "libexec" not in machine.command_line(
            pid
        )


def test_a_session_whose_request_has_no_end_says_so() -> None:
    with open("/dev/zero", "rb") as zeros:
        status, lines, _ = helper("session", "4243", "test", "--version", __version__, stdin=zeros)
    assert json.loads(lines[-1])["error"] == "Cannot read a request: longer than 4096 KiB"
    assert status == 0


def test_arguments_without_end_are_one_line() -> None:
    status, lines, _ = helper(*(["x" * 100] * 10_000), "--version", __version__, stdin=subprocess.DEVNULL)
    assert status == 1 and len(lines) == 1
    assert len(lines[0]) < 3000


# control groups


NAME = "x" * 200


def deepen(path: str, depth: int) -> int:
    """Groups one below the other, as a tenant makes them where he may; a descriptor of the deepest."""
    here = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(NAME, dir_fd=here)
        below = os.open(NAME, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    return here


@pytest.fixture
def group() -> Iterator[str]:
    point = next(point for point, kind in cgroups.hierarchies() if kind in ("", "freezer"))
    path = f"{point}/onelxc-limits-test"
    os.mkdir(path)
    yield path
    if os.path.isdir(path):
        cgroups.remove(path)


def test_groups_deeper_than_a_path_go(group: str) -> None:
    os.close(deepen(group, 2000))
    cgroups.remove(group)
    assert not os.path.exists(group)


def test_a_process_in_groups_deeper_than_a_path_is_found(group: str) -> None:
    deepest = deepen(group, 2000)
    sleeper = subprocess.Popen(["sleep", "1000"])
    with open(os.open("cgroup.procs", os.O_WRONLY, dir_fd=deepest), "w") as file:
        file.write(str(sleeper.pid))
    os.close(deepest)
    assert cgroups.processes(group) == (sleeper.pid,)
    with pytest.raises(OSError, match="Device or resource busy"):
        cgroups.remove(group, limit_s=0)
    sleeper.kill()
    sleeper.wait()
    cgroups.remove(group)
    assert not os.path.exists(group)


def test_very_many_groups_go(group: str) -> None:
    for number in range(200):
        os.mkdir(f"{group}/{number}")
        for other in range(100):
            os.mkdir(f"{group}/{number}/{other}")
    assert cgroups.processes(group) == ()
    cgroups.remove(group)
    assert not os.path.exists(group)


def test_a_walk_that_finds_no_end_is_given_up(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.close(deepen(group, 100))
    monkeypatch.setattr(cgroups, "WALK_S", 0.0)
    with pytest.raises(TimeoutError, match="more groups in it than can be looked at"):
        cgroups.processes(group)
    monkeypatch.undo()


def test_a_container_with_groups_deeper_than_a_path_ends(vm: NewVm) -> None:
    one = vm().deployed().booted()
    found = cgroups.groups(one.vm_id)
    for each in found:
        os.close(deepen(each.path, 300))
    one.act("cancel").ok()
    assert cgroups.groups(one.vm_id) == ()
    assert not [each.path for each in found if os.path.exists(each.path)]


def test_what_lies_beside_rootfs_goes_however_deep_it_is(tmp_path: Path) -> None:
    for name in ("rootfs/etc", "templates", "metadata/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rootfs/etc/kept").write_text("x")
    (tmp_path / "metadata/link").symlink_to("/etc")
    os.close(deepen(str(tmp_path / "templates"), 3000))
    top = os.open(tmp_path, os.O_RDONLY)
    layout.hoist(top)
    os.close(top)
    assert [path.name for path in tmp_path.iterdir()] == ["etc"]
    assert (tmp_path / "etc/kept").read_text() == "x"
    assert os.path.exists("/etc/passwd")


# files of the host


def test_the_logs_of_vms_that_are_gone_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolelog, "KEEP_BYTES", 3 << 20)
    directory = Path("/var/log/onelxc")
    directory.mkdir(exist_ok=True)
    for path in directory.glob("one-*"):  # of other tests
        path.unlink()
    made = [directory / f"one-{number}.log" for number in range(880, 890)]
    for age, path in enumerate(made):
        path.write_bytes(bytes(1 << 20))
        os.utime(path, (1_000_000_000 - age, 1_000_000_000 - age))
    consolelog.expire(now=1_000_000_100)
    assert [path for path in made if path.exists()] == made[:3]
    for path in made[:3]:
        path.unlink()


def test_the_console_of_a_vm_that_is_here_is_kept(vm: NewVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolelog, "KEEP_BYTES", 0)
    one = vm().deployed().booted()
    wait_until(lambda: os.path.exists(f"/var/log/onelxc/{one.name}.log"), "its console log")
    consolelog.expire()
    assert os.path.exists(f"/var/log/onelxc/{one.name}.log")
