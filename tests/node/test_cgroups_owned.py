"""A container has its own control groups and nothing of anybody else's, and they go when it goes.

On version 1 without systemd libvirt gives the ids of each container what lies at the top of systemd's hierarchy; on
version 2 the files that limit it. Both versions' tests run everywhere that they mean something.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc.config import HostConfig
from onelxc.model import ID_RANGE
from onelxc.root import cgroups, limits
from tests.support import images, machine
from tests.support.frontends import MONITORD
from tests.support.vms import Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)
NewVm = Callable[..., Vm]
V1 = cgroups.version() == 1


def foreign(one: Vm) -> list[str]:
    """What the container's ids own of all hierarchies that is not there for it to divide its own group."""
    first = HostConfig().first_id(one.vm_id)
    ids = range(first, first + ID_RANGE)
    found = []
    for directory, _, files in os.walk("/sys/fs/cgroup"):
        parts = directory.replace(r"\x2d", "-")
        its_own = f"/onelxc-{one.vm_id}.slice" in parts or f"-{one.name}.scope/libvirt" in parts
        # version 2: limits of the group itself stay root's, what it makes below is its own
        limit = parts.endswith((f"-{one.name}.scope/libvirt", f"-{one.name}.libvirt-lxc"))
        for name in (".", *files):
            path = os.path.join(directory, name)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_uid not in ids:
                    continue
                free = name in (".", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control") or "oom" in name
                if not its_own or (limit and not V1 and not free and name != "memory.reclaim"):
                    found.append(path)
    return found


@pytest.fixture
def two(vm: NewVm) -> tuple[Vm, Vm]:
    first = vm(images.distribution_tar("systemd"), template={"MEMORY": "256"}).deployed().booted()
    return first, vm().deployed().booted()


def test_nobody_owns_what_is_not_his(two: tuple[Vm, Vm]) -> None:
    first, second = two
    for one in two:
        assert foreign(one) == []
    # and after each has started again by itself
    for one in two:
        one.inside("kill -TERM 1" if one is second else "reboot", check=False)
        one.booted(2)
        wait_until(lambda: foreign(one) == [], "the hub has looked")  # noqa: B023
    for one in two:
        assert foreign(one) == []
    # a unit of systemd's in the first gets its group, though others have started since
    assert "active" in first.inside("systemd-run --wait --collect true; systemctl is-active systemd-journald")


def test_groups_that_a_container_made_go_with_it(vm: NewVm, form: dict[str, str]) -> None:
    one = vm(images.distribution_tar("systemd"), template={"MEMORY": "256"}, user_template=form).deployed().booted()
    one.inside("systemd-run --unit=later sleep 100")
    one.act("cancel").ok()
    assert left() == []


def left() -> list[str]:
    """Directories of any hierarchy that libvirt, this machine's systemd, or we ourselves have not made for good."""
    if os.path.isdir("/run/systemd/system"):
        return [path for path in machine.cgroups() if "one-" in path]
    keep = ("machine", "machine.slice", "onelxc.slice")
    found = []
    for point, _ in cgroups.hierarchies():
        for directory, names, _ in os.walk(point):
            found += [os.path.join(directory, name) for name in names if not (directory == point and name in keep)]
    return found


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Path]:
    """A hierarchy of version 2 with a group as libvirt makes it under systemd, whichever version this host has."""
    point = tmp_path / "unified"
    point.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", point], check=True)
    unit = point / "onelxc-test.scope"
    (unit / "libvirt").mkdir(parents=True)
    yield unit / "libvirt"
    cgroups.remove(str(unit))
    subprocess.run(["umount", point], check=True)


def test_limits_of_version_2_are_roots(many: Path) -> None:
    """libvirt gives all files of the group away; only those stay given that divide it."""
    for path in (many, *many.iterdir()):
        os.chown(path, 1879048192, 1879048192)
    taken = limits.take_back(str(many))
    assert {"cgroup.max.depth", "cgroup.freeze", "cgroup.kill"} <= set(taken)
    theirs = {path.name for path in many.iterdir() if path.stat().st_uid}
    assert {"cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} <= theirs
    assert not {name for name in theirs if name.endswith((".max", ".weight", ".limit", ".high", ".min", ".freeze"))}
    assert limits.take_back(str(many)) == (), "doing it again is nothing new"


@pytest.mark.emulated
def test_a_container_cannot_raise_its_limits(vm: NewVm) -> None:
    one = vm().deployed().booted()
    (group,) = cgroups.groups(one.vm_id)
    assert foreign(one) == []
    path = cgroups.limited(group)
    assert one.inside(f"cat '{path}/memory.max'") == f"{64 << 20}\n"
    one.inside(f"for file in '{path}'/*.max; do echo max > \"$file\"; done 2>/dev/null", check=False)
    assert Path(path, "memory.max").read_text() == f"{64 << 20}\n"
    assert Path(group.path, "memory.max").read_text() == f"{64 << 20}\n"
