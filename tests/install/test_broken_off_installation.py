"""An installation that is broken off at any step is continued by install.sh, and undone by --uninstall."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import installations as trees

BUNDLE = Path(__file__).parents[2]
CHANGES = ("install", "mv", "cp", "rm", "mkdir", "rmdir", "chmod", "chown", "ln", "touch", "sync", "rename")
WAYS = {"pull": (trees.pull, ()), "monitord": (trees.monitord, ()), "replace": (trees.monitord, ("--replace",))}
# counts; from the N-th call on it fails as on a full disk, or ends everything, its caller included
FAKE = """#!/bin/bash
exec 9<>{count}.lock; flock 9
read -r n <{count}; n=$((n - 1)); echo $n >{count}
exec 9<&-
if [ "$n" -lt 0 ]; then
    [ -s {last} ] || echo {name} >{last}
    [ "$(cat {count}.how)" != kill ] || kill -KILL 0
    echo "{name}: cannot do it: No space left on device" >&2
    exit 1
fi
exec {real} "$@"
"""


class Machine:
    """One front-end, and programs first in PATH that end everything at the N-th call that changes something."""

    def __init__(self, directory: Path, kind: Callable[[Path], Path], arguments: tuple[str, ...]) -> None:
        self.root = kind(trees.reachable(directory) / "one")
        self.arguments = arguments
        self.fakes, self.count, self.last = directory / "bin", directory / "count", directory / "last"
        self.fakes.mkdir()
        for name in CHANGES:
            real = shutil.which(name)
            if real:
                (self.fakes / name).write_text(FAKE.format(name=name, real=real, count=self.count, last=self.last))
                (self.fakes / name).chmod(0o755)
        for path in (self.count, self.last, Path(f"{self.count}.lock"), Path(f"{self.count}.how")):
            path.write_text("")
            path.chmod(0o666)

    def run(self, *arguments: str, fails_at: int = 10**9, how: str = "fail") -> subprocess.CompletedProcess[str]:
        self.count.write_text(f"{fails_at}\n")
        Path(f"{self.count}.how").write_text(how)
        self.last.write_text("")
        return subprocess.run(
            [str(BUNDLE / "install.sh"), "-d", str(self.root), *arguments],
            env={"PATH": f"{self.fakes}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            start_new_session=True,
        )

    @property
    def broken_off(self) -> bool:
        return bool(self.last.read_text())

    def snapshot(self) -> dict[str, str]:
        return trees.snapshot(self.root)


@pytest.fixture(params=WAYS)
def here(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    kind, arguments = WAYS[request.param]
    machine = Machine(tmp_path, kind, arguments)
    # what an operator had in a place of ours
    theirs = machine.root / "var/remotes/vmm/onelxc"
    if request.param == "monitord":
        theirs.mkdir()
        for name in ("deploy", "own"):
            (theirs / name).write_text("the operator's\n")
    elif request.param == "pull":
        for name in ("vmm/lxc/deploy", "vmm/lxc/own", "im/lxc.d/probe"):
            path = machine.root / "var/remotes" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("another driver's\n")
            path.chmod(0o755)
    trees._owned(machine.root)
    return machine


def steps(total: int) -> list[int]:
    """The first and last ones, and two of the many equal ones between. The very last removes the bundle's copy in /tmp,
    when all is done."""
    return sorted({0, 1, 2, 5, total // 3, total // 2, total - 3, total - 2})


def calls(here: Machine, *arguments: str) -> int:
    """How many changes that takes."""
    done = here.run(*arguments)
    assert done.returncode == 0, done.stderr
    return int(10**9 - int(here.count.read_text()))


@pytest.mark.parametrize("part", [0, 1])
def test_an_installation_broken_off_is_undone_and_continued(here: Machine, part: int) -> None:
    before = here.snapshot()
    total = calls(here, *here.arguments)
    whole = here.snapshot()
    assert total > 50
    here.run("--uninstall")
    assert here.snapshot() == before
    for n, step in enumerate(steps(total)[part::2]):
        how = "kill" if n % 3 == part else "fail"
        done = here.run(*here.arguments, fails_at=step, how=how)
        assert done.returncode != 0, (step, done.stdout)
        assert here.broken_off
        if how == "fail":
            assert done.stderr.startswith("install.sh: Cannot "), (step, done.stderr)
            assert done.stderr.count("\n") == 1, (step, done.stderr)
        if n % 2:
            done = here.run(*here.arguments)
            assert done.returncode == 0, (step, done.stderr)
            assert here.snapshot() == whole, step
        here.run("--uninstall")
        assert here.snapshot() == before, step


def test_an_uninstallation_broken_off_is_continued(here: Machine) -> None:
    before = here.snapshot()
    here.run(*here.arguments).check_returncode()
    total = calls(here, "--uninstall")
    for step in steps(total)[::2]:
        here.run(*here.arguments).check_returncode()
        assert here.run("--uninstall", fails_at=step).returncode != 0
        done = here.run("--uninstall")
        assert done.returncode == 0 or "is not installed" in done.stderr, (step, done.stderr)
        assert here.snapshot() == before, step


# The disk of the front-end is full in the middle.
@pytest.mark.parametrize("room_kib", [8, 40, 120, 400])
def test_a_full_disk(tmp_path: Path, room_kib: int) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "none", str(place)], check=True)
    try:
        root = trees.pull(place / "one")
        before = trees.snapshot(root)
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        (place / "ballast").write_bytes(b"\0" * (free - (room_kib << 10)))
        argv = [str(BUNDLE / "install.sh"), "-d", str(root)]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("install.sh: Cannot ")
        assert done.stderr.count("\n") == 1
        subprocess.run([*argv, "--uninstall"], stdin=subprocess.DEVNULL, capture_output=True)
        assert trees.snapshot(root) == before
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
        (place / "ballast").unlink()
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        subprocess.run([*argv, "--uninstall"], stdin=subprocess.DEVNULL, capture_output=True, check=True)
        assert trees.snapshot(root) == before
    finally:
        subprocess.run(["umount", str(place)], check=True)


# What another driver had under our names is put aside, its probes do not run beside ours, and comes back.
def test_another_driver_of_that_name(tmp_path: Path) -> None:
    root = trees.pull(tmp_path / "one")
    for name in ("vmm/lxc/deploy", "vmm/lxc/lib/helper.sh", "im/lxc.d/old-probe"):
        path = root / "var/remotes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from onelxc import something\n")
        path.chmod(0o755)
    trees._owned(root)
    before = trees.snapshot(root)
    argv = [str(BUNDLE / "install.sh"), "-d", str(root)]
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert not (root / "var/remotes/im/lxc.d/old-probe").exists()
    assert not (root / "var/remotes/vmm/lxc/lib/helper.sh").exists()
    # what comes there later is the operator's, and stays
    own = root / "var/remotes/im/lxc.d/site-local"
    own.write_text("own\n")
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert own.read_text() == "own\n"
    own.unlink()
    subprocess.run([*argv, "--uninstall"], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert trees.snapshot(root) == before


# An executable of ours that the operator changed is kept aside when ours comes again, and when it goes.
@pytest.mark.parametrize("step", [(), ("--uninstall",)])
@pytest.mark.parametrize("arguments", [(), ("--replace",)])
def test_an_edited_executable_is_kept(tmp_path: Path, step: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    root = trees.monitord(tmp_path / "one")
    before = trees.snapshot(root)
    argv = [str(BUNDLE / "install.sh"), "-d", str(root), *arguments]
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    deploy = root / "var/remotes/vmm" / ("lxc" if arguments else "onelxc") / "deploy"
    edited = deploy.read_text() + "# edited\n"
    deploy.write_text(edited)
    done = subprocess.run([*argv[:3], *step], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    kept = root / "var/onelxc-replaced/edited" / deploy.relative_to(root / "var/remotes")
    assert kept.read_text() == edited
    assert f"keep {deploy}, which was edited, as {kept}" in done.stdout
    if not step:
        subprocess.run([*argv[:3], "--uninstall"], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    shutil.rmtree(root / "var/onelxc-replaced")
    assert trees.snapshot(root) == before


def test_two_at_once(tmp_path: Path) -> None:
    root = trees.pull(tmp_path / "one")
    remotes = os.open(root / "var/remotes", os.O_RDONLY)
    subprocess.run(["flock", str(remotes)], pass_fds=(remotes,), check=True)
    done = subprocess.run(
        [str(BUNDLE / "install.sh"), "-d", str(root)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    os.close(remotes)
    assert done.stderr == f"install.sh: another install.sh is at work in {root}/var/remotes\n"
    assert stat.S_ISDIR((root / "var/remotes").stat().st_mode)
