"""What is wrong with a VM or its host is said in one line that names both, in the form OpenNebula 3.2.1 shows to its
user; the exit code is 1 and the host is as before, the VM's own files too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator

import libvirt
import pytest

from tests.support import images, leaks, machine
from tests.support.stream import Outcome
from tests.support.vms import HOST, Vm
from tests.support.waiting import wait_until

NewVm = Callable[..., Vm]


def refused(one: Vm, act: Callable[[], Outcome], pattern: str, *, mounted: bool = False) -> None:
    """`act` fails with one line that matches and names the VM; nothing has changed on the host.

    A disk that was `mounted` before the fault was met has another time of last mount in it.
    """
    before, files = leaks.snapshot(), contents(one)
    outcome = act()
    assert (outcome.code, outcome.out) == (1, ""), outcome
    frame = re.fullmatch(r"ERROR MESSAGE --8<------\n(.*)\nERROR MESSAGE ------>8--\n", outcome.err)
    assert frame, outcome.err
    assert re.search(pattern, frame.group(1)), frame.group(1)
    assert re.search(rf"\b(VM |one-){one.vm_id}\b", frame.group(1)), frame.group(1)
    leaks.assert_none_since(before)
    assert mounted or contents(one) == files


def contents(one: Vm) -> dict[str, str]:
    found = {}
    for name in os.listdir(one.directory):
        with open(one.path(name), "rb") as file:
            found[name] = hashlib.sha256(file.read()).hexdigest()
    return found


def rewrite(one: Vm, change: Callable[[bytes], bytes]) -> None:
    with open(one.path("disk.0"), "rb") as file:
        data = change(file.read())
    with open(one.path("disk.0"), "wb") as file:
        file.write(data)


def small_archive(members: dict[str, bytes], mode: int = 0o755) -> bytes:
    """A plain tar of some programs."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


# what a console says in the first few milliseconds goes with it when it ends as soon
ENDING_INIT = b"#!/bin/sh\necho cannot go on\n/bin/sleep 0.2\n"


def busybox() -> bytes:
    with open("/bin/busybox", "rb") as file:
        return file.read()


def bomb(_: bytes) -> bytes:
    """A megabyte that unpacks to one gigabyte."""
    member = tarfile.TarInfo("zeros")
    member.size = 1 << 30
    packing = subprocess.Popen(["gzip", "-1", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert packing.stdin
    assert packing.stdout
    pid = os.fork()
    if not pid:
        packing.stdout.close()
        packing.stdin.write(member.tobuf())
        for _part in range(1024):
            packing.stdin.write(bytes(1 << 20))
        packing.stdin.write(bytes(1024))
        packing.stdin.close()
        os._exit(0)
    packing.stdin.close()
    data = packing.stdout.read()
    os.waitpid(pid, 0)
    packing.wait()
    return data


IMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated archive": (lambda data: data[: len(data) // 2], r"disk\.0: .*(truncated|unexpected end|Unexpected EOF)"),
    "corrupt archive": (
        lambda data: data[: len(data) // 3] + bytes(4096) + data[len(data) // 3 + 4096 :],
        r"disk\.0: .*corrupt",
    ),
    "archive bomb": (bomb, r"disk\.0: .*(DISK/SIZE|too large|larger|64 MB|does not fit)"),
    "archive without an init": (lambda _: small_archive({"bin/true": b"#!/bin/false\n"}), "/sbin/init"),
    "empty archive": (lambda _: bytes(10240), r"disk\.0"),
    "no image at all": (lambda _: b"this is not an image\n" * 1000, r"disk\.0: "),
    "empty file": (lambda _: b"", r"disk\.0"),
    "init that ends at once": (
        lambda _: small_archive({"sbin/init": ENDING_INIT, "bin/sh": busybox(), "bin/sleep": busybox()}),
        "its init ended at once; its console said: cannot go on",
    ),
    "init that no kernel executes": (
        lambda _: small_archive({"sbin/init": b"no program\n"}),
        "(Exec format error|its init ended at once)",
    ),
}


@pytest.mark.parametrize("image", list(IMAGES))
def test_images(vm: NewVm, image: str) -> None:
    change, pattern = IMAGES[image]
    one = vm()
    one.disks[0]["SIZE"] = 64
    rewrite(one, change)
    if image.startswith("init that"):  # by then the archive has become the disk, as it does once and for all
        outcome = one.deploy()
        assert outcome.code == 1
        assert re.search(pattern, one.driver.message(outcome)), one.driver.message(outcome)
        assert one.name not in machine.domains()
    refused(one, one.deploy, pattern, mounted=image.startswith("init that"))


TEMPLATES: dict[str, tuple[dict[str, object], str]] = {
    "MEMORY of 0": ({"MEMORY": "0"}, "MEMORY"),
    "MEMORY in words": ({"MEMORY": "lots"}, "MEMORY is not a number.*'lots'"),
    "CPU in words": ({"CPU": "two"}, "CPU is not a number.*'two'"),
    "VCPU of 0": ({"VCPU": "0"}, "VCPU"),
    "unknown init": ({"OS": {"INIT": "/sbin/nope"}}, "/sbin/nope"),
    "init that is a directory": ({"OS": {"INIT": "/bin"}}, "/bin"),
    "relative init": ({"OS": {"INIT": "sbin/init"}}, "OS/INIT is not an absolute path"),
    "missing bridge": ({"NIC": {"BRIDGE": "nobridge", "MAC": "02:00:00:00:00:01"}}, "nobridge"),
    "NIC without a bridge": ({"NIC": {"MAC": "02:00:00:00:00:01"}}, "NIC"),
}


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_templates(vm: NewVm, template: str) -> None:
    values, pattern = TEMPLATES[template]
    one = vm(template=values)
    late = template in ("unknown init", "init that is a directory", "missing bridge")
    if late:
        one.deploy()  # the archive becomes the disk
    refused(one, one.deploy, pattern, mounted=late)


@pytest.mark.parametrize("text", ["this is no XML", "<TEMPLATE><DISK></TEMPLATE>", "<OTHER/>", "<TEMPLATE/>", ""])
def test_what_is_no_template(vm: NewVm, text: str) -> None:
    one = vm()
    refused(
        one,
        lambda: one.driver("deploy", one.path("deployment.0"), HOST, one.vm_id, HOST, stdin=text),
        "(XML|begins with <OTHER>|no DISK|template)",
    )


def test_missing_disk(vm: NewVm) -> None:
    one = vm()
    os.unlink(one.path("disk.0"))
    refused(one, one.deploy, r"disk\.0: No such file or directory")


@pytest.mark.parametrize("there", [True, False])
def test_a_disk_outside_of_the_datastores_gets_the_same_answer_whether_it_exists_or_not(vm: NewVm, there: bool) -> None:
    one = vm()
    os.unlink(one.path("disk.0"))
    os.symlink("/etc/shadow" if there else "/etc/nothing", one.path("disk.0"))
    before = leaks.snapshot()
    outcome = one.deploy()
    assert outcome.code == 1
    expected = rf"{one.path('disk.0')}: it does not lie in a datastore of this host"
    assert expected in one.driver.message(outcome)
    leaks.assert_none_since(before)
    os.unlink(one.path("disk.0"))


def test_a_container_of_that_name_that_is_not_ours_is_left_alone(vm: NewVm) -> None:
    one = vm()
    with foreign_domain(one.name) as uuid:
        refused(one, one.deploy, rf"not ours.*{uuid}")
        for action in ("shutdown", "reboot"):
            refused(one, lambda: one.act(action), "not ours")  # noqa: B023
        one.act("cancel")
        assert one.running


@contextlib.contextmanager
def foreign_domain(name: str) -> Iterator[str]:
    root = f"/srv/{name}"
    os.makedirs(f"{root}/bin")
    machine.command("cp", "/bin/busybox", f"{root}/bin/busybox")
    xml = f"""<domain type='lxc'><name>{name}</name><memory unit='KiB'>65536</memory><features><privnet/></features>
        <os><type>exe</type><init>/bin/busybox</init><initarg>sleep</initarg><initarg>1000</initarg></os>
        <devices><filesystem type='mount'><source dir='{root}'/><target dir='/'/></filesystem>
        <console type='pty'/></devices></domain>"""
    connection = libvirt.open("lxc:///")
    domain = connection.createXML(xml, 0)
    wait_until(lambda: "sleep" in machine.command_line(machine.init_pid(name)), "it is what it will be")
    try:
        yield domain.UUIDString()
    finally:
        domain.destroy()
        connection.close()
        machine.command("rm", "-rf", root)


@pytest.mark.parametrize("action", ["shutdown", "reboot"])
def test_a_vm_that_is_not_here(vm: NewVm, action: str) -> None:
    one = vm()
    refused(one, lambda: one.act(action), "no such container on this host")


@pytest.mark.parametrize("action", ["shutdown", "reboot", "cancel"])
def test_an_unknown_deploy_id(vm: NewVm, action: str) -> None:
    one = vm()
    refused(one, lambda: one.driver(action, "nonsense", HOST, one.vm_id, HOST), "nonsense")


def test_libvirt_not_running(vm: NewVm) -> None:
    one = vm()
    before = contents(one)
    with machine.libvirtd_away("stop"):
        outcome = one.deploy()
    assert outcome.code == 1
    assert re.match(
        rf"Cannot deploy VM {one.vm_id}: cannot reach libvirt .*No such file or directory", one.driver.message(outcome)
    )
    assert contents(one) == before


def test_no_permission_for_libvirt(vm: NewVm) -> None:
    one = vm()
    socket = "/run/libvirt/libvirt-sock"
    mode = stat.S_IMODE(os.stat(socket).st_mode)
    os.chmod(socket, 0o600)
    try:
        refused(one, one.deploy, "libvirt.*Permission denied")
    finally:
        os.chmod(socket, mode)


@contextlib.contextmanager
def moved(path: str) -> Iterator[None]:
    os.rename(path, path + ".away")
    try:
        yield
    finally:
        os.rename(path + ".away", path)


@pytest.mark.parametrize("path", ["/usr/lib/onelxc/onelxc-root", "/etc/sudoers.d/onelxc"])
def test_helper_missing_or_not_allowed(vm: NewVm, path: str) -> None:
    one = vm()
    with moved(path):
        refused(one, one.deploy, "install.sh node")


def test_helper_of_another_version(vm: NewVm) -> None:
    one = vm()
    path = "/usr/lib/onelxc/onelxc/__init__.py"
    with open(path) as file:
        text = file.read()
    try:
        with open(path, "w") as file:
            file.write(re.sub(r'__version__ = ".*"', '__version__ = "0.0.1-other"', text))
        refused(one, one.deploy, r"helper of this host is 0\.0\.1-other; run `install\.sh node`")
    finally:
        with open(path, "w") as file:
            file.write(text)


def test_no_space_left(vm: NewVm) -> None:
    """A datastore of its own, too small for what is in the archive."""
    one = vm(image=None)
    machine.command("mount", "-t", "tmpfs", "-o", "size=6m,mode=777", "tmpfs", one.directory)
    try:
        one.add_disk(images.busybox_tar())
        refused(one, one.deploy, r"disk\.0.*(No space left|free|space)")
    finally:
        machine.command("umount", one.directory)
