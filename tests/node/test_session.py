"""The root helper's session on a real kernel: whatever is killed, and whenever, nothing is left that was not kept."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onelxc import __version__, model, rootclient
from onelxc.errors import GiveUpError, HelperError, OneLxcError, StorageError
from onelxc.model import Disk, Vm, VmPaths, to_json
from onelxc.report import Report
from onelxc.root import lock
from tests.support import images, machine
from tests.support.waiting import wait_until

REPOSITORY = str(Path(__file__).resolve().parents[2])
REPORT = Report("test", framed=False)
ID = 901

CLIENT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from onelxc import rootclient, wire
from onelxc.model import Vm
from onelxc.report import Report
vm = wire.decode(Vm, json.loads(sys.argv[2]))
with rootclient.open_session(vm.vm_id, "deploy", Report("deploy", framed=False)) as host:
    print("open", flush=True)
    host.prepare(vm)
    print("prepared", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def helper(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests speak with the helper itself, as it is installed. Each is an action that begins anew."""
    monkeypatch.setattr(rootclient, "_started", lambda: time.clock_gettime(time.CLOCK_BOOTTIME))


@pytest.fixture
def vm() -> Iterator[Vm]:
    """Every kind of disk: an archive, an image, a volatile one."""
    directory = Path(f"/var/lib/one/{ID}")
    directory.mkdir()
    shutil.copy(images.busybox_tar(), directory / "disk.0")
    machine.command("cp", "--sparse=always", images.busybox_ext4(), f"{directory}/disk.1")
    with open(directory / "disk.2", "wb") as file:
        file.truncate(32 << 20)
    yield Vm(
        vm_id=ID,
        disks=(
            Disk(0, f"{directory}/disk.0"),
            Disk(1, f"{directory}/disk.1", target="/srv/data"),
            Disk(2, f"{directory}/disk.2", kind="fs", fs="ext4", size_mb=32),
        ),
    )
    with session("cancel") as host:
        host.release()
    shutil.rmtree(directory)


def session(verb: str = "deploy", vm_id: int = ID, wait_s: float = 60) -> rootclient.Session:
    return rootclient.open_session(vm_id, verb, REPORT, wait_s=wait_s)


def client(vm: Vm) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", CLIENT, REPOSITORY, json.dumps(to_json(vm))]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def lock_is_free() -> bool:
    with open(VmPaths(ID).lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def talk(argv: list[str], *requests: bytes) -> list[dict[str, Any]]:
    """The helper's first line, and its answer to each request."""
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        answers = [process.stdout.readline()]
        for request in requests:
            process.stdin.write(request)
            process.stdin.flush()
            answers.append(process.stdout.readline())
        process.stdin.close()
    return [json.loads(answer) for answer in answers]


def holder() -> lock.Holder:
    return wait_until(lambda: lock.holder(ID), "a helper that holds the lock", interval_s=0.001)


def journal_lines() -> int:
    try:
        return Path(VmPaths(ID).journal).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def held() -> list[str]:
    """What the kernel holds for the VM."""
    mounts = [mount.point for mount in machine.mounts() if mount.point.startswith(VmPaths(ID).mounts + "/")]
    loops = [path for path in machine.loops().values() if f"/one/{ID}/" in path]
    state = [VmPaths(ID).state] if os.path.exists(VmPaths(ID).state) else []
    return mounts + loops + state


def nothing_held() -> bool:
    return held() == []


def test_all_is_mounted_with_the_vms_own_ids(vm: Vm) -> None:
    with session() as host:
        prepared = host.prepare(vm)
        base = prepared.id_base
        assert base == 1879048192 + ID * 65536
        assert prepared.root == VmPaths(ID).root
        assert [(mount.source, mount.target) for mount in prepared.mounts] == [
            (VmPaths(ID).disk(2), "/media/one-disk.2"),
            (VmPaths(ID).disk(1), "/srv/data"),
        ] or sorted(mount.target for mount in prepared.mounts) == ["/media/one-disk.2", "/srv/data"]
        assert prepared.init is model.Init.BUSYBOX
        for path in (prepared.root, *(mount.source for mount in prepared.mounts)):
            assert os.path.ismount(path)
            assert os.stat(path).st_uid == base
        # nobody else of this host may come to the tenant's files
        assert os.stat(VmPaths(ID).mounts).st_mode & 0o7777 == 0o710
        assert held() != []
    assert nothing_held()


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 5, 6, 8, 9])
@pytest.mark.parametrize("victim", ["client", "helper"])
def test_killed_at_any_step_nothing_stays(vm: Vm, victim: str, lines: int) -> None:
    """The journal's length says how far it is; what is killed there is at that step or just behind it."""
    process = client(vm)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    helper = holder()
    deadline = time.monotonic() + 60
    while journal_lines() < lines:
        assert time.monotonic() < deadline
    os.kill(process.pid if victim == "client" else helper.pid, signal.SIGKILL)
    if victim == "client":
        process.wait()
        wait_until(nothing_held, "the helper has given back everything")
        wait_until(lambda: lock.holder(ID) is None, "the helper's end")
    else:
        process.stdin.close()
        process.wait(60)
        with session("cancel") as host:
            host.release()
        assert nothing_held()
    process.stdout.close()
    if not process.stdin.closed:
        process.stdin.close()
    assert [name for name in os.listdir(f"/var/lib/one/{ID}") if not name.startswith("disk.")] == []


def kill_helper() -> None:
    os.kill(holder().pid, signal.SIGKILL)
    wait_until(lambda: lock.holder(ID) is None, "its end")
    wait_until(lock_is_free, "its worker's end")


def test_a_killed_helper_is_cleaned_up_by_whoever_comes_next(vm: Vm) -> None:
    with session() as host:
        host.prepare(vm)
        kill_helper()
    assert held() != []
    with session() as host:
        # not even asked to
        assert nothing_held()
        host.prepare(vm)
        host.commit()
    assert held() != []


def test_a_killed_helper_is_cleaned_up_by_its_own_caller_who_asks_on(vm: Vm) -> None:
    """Whether it had kept everything is asked of a new helper, which gives back what was not kept."""
    with pytest.raises(HelperError, match="killed by signal 9"), session() as host:
        host.prepare(vm)
        kill_helper()
        host.commit()
    assert nothing_held()


def test_kept_after_a_commit_and_recorded(vm: Vm) -> None:
    with session() as host:
        assert host.record() == {"ours": False, "vm": None, "prepared": None, "paused": "", "lost": False}
        prepared = host.prepare(vm)
        host.commit()
    assert held() != []
    with session("shutdown") as host:
        record = host.record()
        assert record["ours"]
        assert record["vm"] == to_json(vm)
        assert record["prepared"] == to_json(prepared)
        host.release()
        assert nothing_held()
        host.release()


def test_an_error_is_of_its_own_class_and_undoes_all(vm: Vm) -> None:
    broken = dataclasses.replace(vm, disks=(*vm.disks, Disk(3, f"/var/lib/one/{ID}/disk.3", target="/x")))
    with session() as host:
        with pytest.raises(StorageError) as caught:
            host.prepare(broken)
        assert str(caught.value) == f"Cannot open /var/lib/one/{ID}/disk.3: No such file or directory"
    assert nothing_held()


def test_a_directory_in_place_of_the_disk_gets_the_whole_story(vm: Vm) -> None:
    os.unlink(f"/var/lib/one/{ID}/disk.0")
    os.mkdir(f"/var/lib/one/{ID}/disk.0")
    with session() as host, pytest.raises(StorageError, match='set NO_DECOMPRESS="yes" on the image datastore'):
        host.prepare(vm)
    os.rmdir(f"/var/lib/one/{ID}/disk.0")


def test_cancel_makes_a_deploy_in_flight_give_up(vm: Vm) -> None:
    """The deploy's helper is amid its import, of an archive that takes its time."""
    tree = Path("/srv/slow")
    images.busybox_tree(str(tree))
    with open(tree / "zeros", "wb") as file:
        for _ in range(600):
            file.write(os.urandom(1 << 20))
    images.tar(str(tree), f"/var/lib/one/{ID}/disk.0")
    shutil.rmtree(tree)
    told: list[Exception] = []

    def deploy() -> None:
        try:
            with session() as host:
                host.prepare(vm)
        except OneLxcError as error:
            told.append(error)

    deploying = threading.Thread(target=deploy)
    deploying.start()
    wait_until(machine.loops, "the import has begun", interval_s=0.001)
    began = time.monotonic()
    with session("cancel") as host:
        host.release()
        assert nothing_held()
    assert time.monotonic() - began < 20
    deploying.join(30)
    assert [type(error) for error in told] == [GiveUpError]
    assert "cancelled meanwhile" in str(told[0])


def test_cancel_reaches_a_deploy_that_waits_for_libvirt(vm: Vm) -> None:
    """Between prepare and commit the helper is idle; its caller hears of the cancel at its next word, or by asking."""
    with session() as host:
        host.prepare(vm)
        done: list[str] = []

        def cancel() -> None:
            with session("cancel") as other:
                other.release()
            done.append("cancelled")

        cancelling = threading.Thread(target=cancel)
        cancelling.start()

        def heard() -> bool:
            try:
                host.check()
            except GiveUpError:
                return True
            return False

        wait_until(heard, "the caller hears of the cancel")
        assert done == [], "the cancel has to wait until the deploy has left libvirt alone"
        with pytest.raises(GiveUpError):
            host.commit()
    cancelling.join(30)
    assert done == ["cancelled"]
    assert nothing_held()


def test_a_deploy_that_had_begun_before_the_cancel_gives_up_and_a_later_one_does_not(vm: Vm) -> None:
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    with session("cancel") as host:
        host.release()
    argv = [model.HELPER, "session", str(ID), "deploy", "--version", __version__, "--started"]
    assert talk([*argv, f"{began:.2f}"])[0]["kind"] == "GiveUpError"
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert "ok" in talk([*argv, f"{now:.2f}"])[0]


def test_one_at_a_time_and_the_wait_has_an_end(vm: Vm) -> None:
    order: list[str] = []

    def second() -> None:
        with session("reboot"):
            order.append("second")

    with session("attach_disk"):
        with pytest.raises(HelperError) as caught:
            session("reboot", wait_s=0.2)
        assert str(caught.value) == (
            f"Cannot reboot VM {ID}: attach_disk (process {holder().pid}) is still at work on it after 0.2 s"
        )
        waiting = threading.Thread(target=second)
        waiting.start()
        with session("reboot", vm_id=ID + 1):
            order.append("another VM's")
        order.append("first")
    waiting.join(30)
    assert order == ["another VM's", "first", "second"]


def test_another_version_is_told_what_to_run() -> None:
    argv = [model.HELPER, "session", str(ID), "deploy", "--version", "0.0.1"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "error": f"Cannot use the root helper: the driver is version 0.0.1, the helper of this host is {__version__};"
        " run `install.sh node` of the driver's version on this host",
        "kind": "HelperError",
    }


@pytest.mark.parametrize(
    "words",
    [
        ["session", "5; id", "deploy"],
        ["session", "-5", "deploy"],
        ["session", "007", "deploy"],
        ["session", "99999999999", "deploy"],
        ["session", "../5", "deploy"],
        ["session", "5", "../deploy"],
        ["session", "5"],
        ["shell"],
        ["freeze", "one-5x"],
        ["--help"],
    ],
)
def test_arguments_that_sudo_would_let_through_are_refused(words: list[str]) -> None:
    argv = [model.HELPER, *words, *(["--version", __version__] if words[0] != "freeze" else [])]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "Cannot" in said
    assert "Traceback" not in said
    assert not os.path.exists("/var/lib/onelxc/vms/5")


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"do": "shell"}\n', b'{"do": "prepare"}\n', b"{}\n"])
def test_requests_that_are_none_get_an_error_and_the_session_goes_on(line: bytes) -> None:
    argv = [model.HELPER, "session", str(ID), "deploy", "--version", __version__]
    opened, refused, answered = talk(argv, line, b'{"do": "record"}\n')
    assert "ok" in opened
    assert refused["error"].startswith("Cannot ")
    assert refused["kind"] == "HelperError"
    assert answered["ok"]["ours"] is False


def test_a_missing_helper_is_told_with_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootclient, "HELPER", "/usr/lib/onelxc/not-there")
    with pytest.raises(HelperError, match=r"No such file or directory; run `install.sh node` on this host"):
        session()


def test_busy_mounts_name_who_keeps_them(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    with session() as host:
        host.prepare(vm)
        host.commit()
    sitter = subprocess.Popen(["sleep", "1000"], cwd=VmPaths(ID).disk(1))
    try:
        with session("cancel") as host, pytest.raises(StorageError) as caught:
            host.release()
        assert str(caught.value).startswith(f"Cannot unmount {VmPaths(ID).disk(1)}: ")
        assert f"in use by sleep ({sitter.pid})" in str(caught.value)
        # all the rest was let go
        # the disk, and what keeps its place below it
        assert [path for path in held() if "/mnt/" in path] == [VmPaths(ID).disk(1)] * 2
    finally:
        sitter.kill()
        sitter.wait()


def test_images_of_private_mounts_are_free_although_other_controllers_saw_them(vm: Vm) -> None:
    """Where `/` is private every process that unshared its mounts keeps ours: the image must be free all the same."""
    with session() as host:
        host.prepare(vm)
        host.commit()
    other = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "1000"])
    try:
        wait_until(lambda: machine.command_line(other.pid).startswith("sleep"), "the other one has its own mounts")
        table = Path(f"/proc/{other.pid}/mountinfo").read_text()
        assert VmPaths(ID).root in table
        with session("shutdown") as host:
            host.release()
        assert nothing_held()
        assert VmPaths(ID).root not in Path(f"/proc/{other.pid}/mountinfo").read_text()
    finally:
        other.kill()
        other.wait()
