"""What the template says reaches the container: limits in its control groups, init, mounts, fragments, ids."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from onelxc import cgroup, containers
from tests.node.test_nics import failure
from tests.support import hostconf, machine
from tests.support.vms import MONITORD, Vm

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]
HOST_CONF = "/etc/onelxc/host.conf"
PROFILES = "/etc/onelxc/profiles"
SCRATCH = (
    "<devices><filesystem type='ram'><source usage='1024' units='KiB'/><target dir='/scratch'/></filesystem></devices>"
)


@contextlib.contextmanager
def file(path: str, text: str) -> Iterator[None]:
    """A file of the administrator's, as it was before at the end."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    before = None
    if os.path.exists(path):
        with open(path) as old:
            before = old.read()
    with open(path, "w") as new:
        new.write((before or "") + text)
    try:
        yield
    finally:
        if before is None:
            os.unlink(path)
        else:
            with open(path, "w") as new:
                new.write(before)


def groups(one: Vm) -> cgroup.Groups:
    running = next(each for each in containers.running() if each.name == one.name)
    return cgroup.of(running.controller, cgroup.mounts())


def test_limits(vm: NewVm) -> None:
    one = vm(template={"MEMORY": 96, "CPU": "1.5", "VCPU": 2, "LXC_SWAP": 16}).deployed().booted()
    limits = groups(one)
    assert cgroup.memory_limit_kib(limits) == 96 * 1024
    assert cgroup.cpu_quota(limits) == 2.0
    xml = machine.domain_xml(one.name)
    version2 = bool(limits.unified)
    if version2:
        with open(f"{limits.unified}/memory.swap.max") as file:
            assert file.read() == f"{16 << 20}\n"
    else:
        assert f"<swap_hard_limit unit='KiB'>{112 * 1024}</swap_hard_limit>" in xml
    assert f"<shares>{150 if version2 else 1536}</shares>" in xml
    assert one.inside("head -n 1 /proc/meminfo").split() == ["MemTotal:", "98304", "kB"]


def test_what_is_beyond_memory_is_killed_inside_and_the_container_lives(vm: NewVm) -> None:
    greedy = "head -c 200000000 /dev/zero | tail -c 190000000 > /dev/null; echo $? > /code; echo boot >> /boots"
    one = vm(template={"MEMORY": 48, "OS": {"INIT": f"/bin/sh -c '{greedy}; exec sleep 1000'"}}).deployed().booted()
    assert one.inside("cat /code") == "137\n"
    assert cgroup.oom_kills(groups(one)) >= 1


def test_pinning(vm: NewVm) -> None:
    one = vm(template={"NUMA_NODE": {"CPUS": "0", "MEMORY_NODE_ID": "0"}}).deployed().booted()
    assert one.inside("grep Cpus_allowed_list /proc/1/status").split()[-1] == "0"


def test_init_with_arguments_and_environment(vm: NewVm) -> None:
    script = 'echo "$WHO $1" > /said; mount -o remount,rw / ; echo boot >> /boots; exec sleep 1000'
    os_ = {"INIT": f"/bin/sh -c '{script}' sh 'two words'", "INIT_ENV": "WHO='the init'"}
    one = vm(template={"OS": os_}).deployed().booted()
    assert one.inside("cat /said") == "the init two words\n"


def test_i686_is_a_personality(vm: NewVm) -> None:
    os_ = {"ARCH": "i686", "INIT": "/bin/sh -c 'uname -m > /machine; echo boot >> /boots; exec sleep 1000'"}
    one = vm(template={"OS": os_}).deployed().booted()
    assert one.inside("cat /machine") == "i686\n"


def test_profiles_of_the_host(vm: NewVm) -> None:
    with file(f"{PROFILES}/scratch.xml", SCRATCH), file(HOST_CONF, '\nPROFILES = "other, scratch"\n'):
        one = vm(user_template={"LXC_PROFILES": "scratch"}).deployed().booted()
        assert "tmpfs /scratch tmpfs" in one.inside("cat /proc/mounts") or " /scratch " in one.inside(
            "cat /proc/mounts"
        )


def test_a_profile_that_is_missing(vm: NewVm) -> None:
    one = vm(user_template={"LXC_PROFILES": "nothere"})
    with file(HOST_CONF, '\nPROFILES = "nothere"\n'):
        assert failure(one, one.deploy()) == (
            f"Cannot deploy VM {one.vm_id}: cannot read the profile nothere: {PROFILES}/nothere.xml: No such file or"
            " directory"
        )


@pytest.mark.parametrize("place", ["USER_TEMPLATE", "TEMPLATE"])
def test_a_profile_that_host_conf_does_not_list(vm: NewVm, place: str) -> None:
    """It is there, and a template names it; also with the name of its file."""
    for name in ("scratch", "scratch.xml"):
        asked = {"LXC_PROFILES": f"other, {name}"}
        one = vm(user_template=asked) if place == "USER_TEMPLATE" else vm(template=asked)
        with file(f"{PROFILES}/scratch.xml", SCRATCH), file(HOST_CONF, '\nPROFILES = "other, scratch-2"\n'):
            assert failure(one, one.deploy()) == (
                f"Cannot prepare VM {one.vm_id}: this host does not allow the profile {name} (PROFILES in host.conf)"
            )
        assert one.name not in machine.domains()


def test_raw_is_refused_and_where_the_host_allows_it_used(vm: NewVm) -> None:
    one = vm(template={"RAW": {"TYPE": "libvirt-lxc", "DATA": SCRATCH}})
    assert failure(one, one.deploy()) == (
        f"VM {one.vm_id}: RAW: TYPE='libvirt-lxc' in a template is not allowed on this host (RAW in host.conf)"
    )
    with file(HOST_CONF, '\nRAW = "yes"\n'):
        one.deployed().booted()
        assert " /scratch " in one.inside("cat /proc/mounts")


def test_a_fragment_that_libvirts_schema_does_not_know(vm: NewVm) -> None:
    one = vm(template={"RAW": {"TYPE": "libvirt-lxc", "DATA": "<nonsense/>"}})
    with file(HOST_CONF, '\nRAW = "yes"\n'):
        line = failure(one, one.deploy())
    assert line.startswith(f"Cannot start {one.name}: ")
    assert "nonsense" in line or "schema" in line
    assert one.name not in machine.domains()


def test_root_that_is_read_only(vm: NewVm) -> None:
    one = vm()
    one.deployed().booted()
    one.act("cancel").ok()
    one.disks[0]["READONLY"] = "YES"
    one.template["OS"] = {"INIT": "/bin/sleep 1000"}
    one.deployed()
    assert "Read-only file system" in one.inside("touch /x 2>&1", check=False)


def test_capabilities_of_a_privileged_container(vm: NewVm) -> None:
    """Its root is the host's: what would let it out is dropped, beyond libvirt's own choice."""
    with hostconf.with_line('PRIVILEGED = "yes"'):
        one = vm(user_template={"LXC_UNPRIVILEGED": "no"}).deployed().booted()
        pid = machine.init_pid(one.name)
        with open(f"/proc/{pid}/status") as status:
            bounding = int(next(line.split()[1] for line in status if line.startswith("CapBnd")), 16)
    dropped = {"sys_module": 16, "sys_rawio": 17, "sys_time": 25, "mknod": 27, "mac_override": 32, "mac_admin": 33}
    assert {name: bool(bounding >> bit & 1) for name, bit in dropped.items()} == dict.fromkeys(dropped, False)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ({"MEMORY": 0}, "MEMORY is 0 MB: a container needs 32 MB at least"),
        ({"MEMORY": "much"}, "MEMORY is not a number of MB: 'much'"),
        ({"OS": {"INIT": "init"}}, "OS/INIT is not an absolute path: 'init'"),
        (
            {"TOPOLOGY": {"HUGEPAGE_SIZE": 2}},
            "TOPOLOGY/HUGEPAGE_SIZE: a container's memory cannot be made of huge pages: remove it",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(vm: NewVm, template: dict[str, object], text: str) -> None:
    one = vm(template=template)
    assert failure(one, one.deploy()) == f"VM {one.vm_id}: {text}"
    assert one.name not in machine.domains()
