"""install.sh node: each of its promises, on the host that this machine is.

Every test begins with OneLXC installed on it and leaves it so, for the other tiers in the same machine.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc.root import check, starts
from tests.support import machine
from tests.support.frontends import REPOSITORY
from tests.support.vms import Vm
from tests.support.waiting import wait_until

PLACES = (
    "/usr/lib/onelxc",
    "/etc/onelxc",
    "/etc/sudoers.d",
    "/etc/libvirt/hooks",
    "/etc/systemd",
    "/usr/sbin",
    "/etc/group",
)


def node(*arguments: str, ok: bool = True, **environment: str) -> str:
    """`install.sh node`: its stdout, or its stderr when it is to fail."""
    done = subprocess.run(
        [os.path.join(REPOSITORY, "install.sh"), "node", "--no-packages", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def files() -> dict[str, tuple[str, int, bytes]]:
    """Mode, owner and contents of everything in the places where node puts files."""
    found = {}
    for place in PLACES:
        for path in (Path(place), *Path(place).rglob("*")):
            if "__pycache__" in path.parts or not os.path.lexists(path):
                continue
            seen = path.lstat()
            content = path.read_bytes() if path.is_file() and "onelxc" in str(path) else b""
            found[str(path)] = (stat.filemode(seen.st_mode), seen.st_uid, content)
    return found


def as_oneadmin(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["setpriv", "--reuid", "oneadmin", "--regid", "oneadmin", "--init-groups", "--", *argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.fixture(autouse=True)
def host(installed: None) -> Iterator[None]:
    """Installed before, and again after."""
    yield
    if not os.path.exists("/usr/lib/onelxc/manifest"):
        node()


# A second run changes nothing.
def test_idempotent() -> None:
    before = files()
    assert "Everything is in place already." in node()
    assert files() == before


# A new version takes the old one's place in one step: an action that starts meanwhile sees the one or the other.
def test_the_package_is_exchanged_as_a_whole() -> None:
    package = Path("/usr/lib/onelxc/onelxc")
    before, old = files(), package.stat().st_ino
    for name in ("names.py", "root/cli.py"):
        (package / name).write_text("an older version\n")
    said = node()
    assert "\nupdate /usr/lib/onelxc/onelxc/names.py\nupdate /usr/lib/onelxc/onelxc/root/cli.py\n" in said
    assert files() == before
    assert package.stat().st_ino != old
    code = "import onelxc.names as names; print(names.__cached__, names.deploy_id.__code__.co_filename)"
    compiled = machine.command("/usr/bin/python3", "-I", "-c", f"import sys; sys.path[0] = '{package.parent}'; {code}")
    code_of = f"__pycache__/names.{sys.implementation.cache_tag}.pyc"
    assert compiled.split() == [f"{package}/{code_of}", f"{package}/names.py"]


# What sudo runs as root can be changed by nobody but root, from / on down.
def test_only_root_writes() -> None:
    for path in (Path("/usr"), Path("/usr/lib"), Path("/usr/lib/onelxc"), *Path("/usr/lib/onelxc").rglob("*")):
        seen = path.lstat()
        assert seen.st_uid == 0, path
        assert path.is_symlink() or not seen.st_mode & 0o022, path


# oneadmin may run the helper as root, and nothing else by our line.
def test_sudo() -> None:
    version = as_oneadmin("sudo", "-n", "/usr/lib/onelxc/onelxc-root", "version")
    assert version.stdout == machine.command("/usr/lib/onelxc/onelxc-root", "version")
    assert as_oneadmin("sudo", "-n", "id").returncode == 1
    assert as_oneadmin("sudo", "-n", "/bin/sh", "-c", "id").returncode == 1
    assert stat.S_IMODE(os.stat("/etc/sudoers.d/onelxc").st_mode) == 0o440


# A line that visudo refuses is never put in place: sudo goes on working as before.
def test_a_bad_line_for_sudo_is_not_installed() -> None:
    before = Path("/etc/sudoers.d/onelxc").read_bytes()
    error = node(ok=False, ONEADMIN="one admin = (")
    assert error.startswith("install.sh: visudo refuses the line for sudo")
    assert Path("/etc/sudoers.d/onelxc").read_bytes() == before
    machine.command("visudo", "-c", "-q")


# The administrator's policy is kept when OneLXC comes again, and when it goes.
def test_edited_policy_is_kept() -> None:
    policy = Path("/etc/onelxc/host.conf")
    shipped = policy.read_text()
    policy.write_text(shipped + 'RAW = "yes"\n')
    try:
        assert "kept /etc/onelxc/host.conf, which was edited" in node()
        assert policy.read_text().endswith('RAW = "yes"\n')
        assert "kept /etc/onelxc/host.conf" in node("--uninstall")
        assert policy.read_text().endswith('RAW = "yes"\n')
    finally:
        policy.write_text(shipped)


# A dry run does nothing, and says what is then done; files of one directory in one line, unless each is wanted.
def test_dry_run() -> None:
    node("--uninstall")
    before = files()
    would = node("--dry-run", "--verbose")
    assert files() == before
    assert "would create /usr/lib/onelxc/onelxc-root\n" in would
    assert "would create /etc/sudoers.d/onelxc\n" in would
    assert "\nwould create /usr/lib/onelxc/onelxc/root/ (" in node("--dry-run")
    said = node("--verbose").splitlines()
    for line in would.splitlines():
        if line.startswith("would create "):
            assert line[len("would ") :] in said


# --uninstall leaves the host as it was before: no file, no state, no daemon.
def test_uninstall() -> None:
    node("--uninstall")
    before = files()
    assert not [path for path in before if "onelxc" in path or "lxc-freeze" in path]
    node()
    assert files() != before
    node("--uninstall")
    assert files() == before
    for state in ("/var/lib/onelxc", "/run/onelxc", "/var/log/onelxc"):
        assert not os.path.exists(state) or not os.listdir(state)
    assert not [pid for pid in machine.pids() if "onelxc-hub" in machine.command_line(pid)]
    assert "OneLXC is not installed on this host" in node("--uninstall", ok=False)


# A host whose containers run is not taken from under them.
def test_uninstall_with_a_container(vm: Callable[..., Vm]) -> None:
    one = vm()
    one.deployed()
    before = files()
    assert node("--uninstall", ok=False) == (
        f"install.sh: containers run on this host: {one.name}; end them or migrate them first\n"
    )
    assert files() == before


# Only root installs; anybody may look at what would be done.
def test_the_hook_is_there_and_those_of_others_stay(vm: Callable[..., Vm]) -> None:
    """An upgrade from a version without one, and a libvirtd that has been running all the while."""
    hook, others = Path(starts.HOOK), Path("/etc/libvirt/hooks/lxc")
    hook.unlink()
    others.write_text("#!/bin/sh\nexit 0\n")
    try:
        with machine.libvirtd_away("stop"):
            pass
        assert any("hook" in str(problem) for problem in check.hook(str(hook)))
        node()
        assert list(check.hook(str(hook))) == []
        vm().deployed().booted()
        hook.chmod(0o644)
        assert ["is not executable" in str(problem) for problem in check.hook(str(hook))] == [True]
        node()
        assert list(check.hook(str(hook))) == []
        node("--uninstall", ok=False)  # a container runs
        assert hook.exists()
        assert others.read_text() == "#!/bin/sh\nexit 0\n"
    finally:
        others.unlink()


def test_needs_root() -> None:
    done = as_oneadmin(os.path.join(REPOSITORY, "install.sh"), "node", "--no-packages")
    assert done.stderr == "install.sh: node has to be run as root, on the host: sudo ./install.sh node\n"
    assert done.returncode == 1


# node ends with a look at the host, and fails where no container can run: here, without the user.
def test_ends_with_a_check() -> None:
    done = subprocess.run(
        [os.path.join(REPOSITORY, "install.sh"), "node", "--no-packages"],
        env={"PATH": os.environ["PATH"], "ONEADMIN": "nobody-of-that-name"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    node()  # sudo's line is for oneadmin again
    assert "cannot: no user nobody-of-that-name" in done.stdout
    assert "installed, but containers cannot run on this host yet" in done.stderr


# OpenNebula's live disk snapshots freeze our container by `sudo lxc-freeze -n one-N`, and thaw it again.
def test_freeze_of_our_own(vm: Callable[..., Vm]) -> None:
    one = vm()
    one.deployed().booted()
    assert as_oneadmin("sudo", "-n", "lxc-freeze", "-n", one.name).returncode == 0
    try:
        assert frozen(one.name)
    finally:
        thawed = as_oneadmin("sudo", "-n", "lxc-unfreeze", "-n", one.name)
    assert thawed.returncode == 0, thawed.stderr
    wait_until(lambda: not frozen(one.name), "the container to run again")


def frozen(name: str) -> bool:
    """What the kernel says of the container's first process."""
    groups = dict(
        line.split(":", 2)[1:] for line in Path(f"/proc/{machine.init_pid(name)}/cgroup").read_text().splitlines()
    )
    if "freezer" in groups:
        return Path(f"/sys/fs/cgroup/freezer{groups['freezer']}/freezer.state").read_text() != "THAWED\n"
    scope = groups[""].split("/libvirt")[0]
    return "frozen 1" in Path(f"/sys/fs/cgroup{scope}/cgroup.events").read_text()


@pytest.fixture
def real_tool(tmp_path: Path) -> Iterator[Path]:
    """A distribution's lxc-freeze that writes down how it was called."""
    tool, calls = Path("/usr/bin/lxc-freeze"), tmp_path / "calls"
    assert not tool.exists()
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {calls}\n')
    tool.chmod(0o755)
    yield calls
    tool.unlink()


# Other containers are the real tool's: by root with whatever arguments, by oneadmin's sudo with a plain name only.
def test_freeze_of_others(real_tool: Path) -> None:
    machine.command("/usr/sbin/lxc-freeze", "-n", "web", "-P", "/srv/lxc")
    assert as_oneadmin("sudo", "-n", "lxc-freeze", "-n", "one-777777").returncode == 0
    assert real_tool.read_text() == "-n web -P /srv/lxc\n-n one-777777\n"
    for arguments in (["-n", "web"], ["-n", "one-777777", "-o", "/etc/x"], ["-n", "one-1 -o /etc/x"], []):
        refused = as_oneadmin("sudo", "-n", "lxc-freeze", *arguments)
        assert refused.returncode == 1
        assert "by sudo only as" in refused.stderr
    assert real_tool.read_text() == "-n web -P /srv/lxc\n-n one-777777\n"


# The check tells what stops everything before what takes away a feature.
def test_the_worst_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEADMIN", "nobody-of-that-name")
    found = check.problems()
    fatal = [problem.fatal for problem in found]
    assert fatal[0]
    assert fatal == sorted(fatal, reverse=True)


# Without a real tool a foreign name is an error that says so.
def test_freeze_without_the_real_tool() -> None:
    done = subprocess.run(["/usr/sbin/lxc-unfreeze", "-n", "one-777777"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "lxc-unfreeze: no container one-777777 of OneLXC here, and no lxc-unfreeze of the distribution's\n"
    )


# A tool of the same name in the same directory moves aside, is still what other containers get, and comes back.
def test_a_real_tool_in_our_place() -> None:
    node("--uninstall")
    tool = Path("/usr/sbin/lxc-freeze")
    tool.write_text("#!/bin/sh\necho the real one: $*\n")
    tool.chmod(0o755)
    try:
        node()
        assert machine.command(str(tool), "-n", "web") == "the real one: -n web\n"
        assert as_oneadmin("sudo", "-n", "lxc-freeze", "-n", "web").returncode == 1
        assert "Everything is in place already." in node()
        node("--uninstall")
        assert tool.read_text() == "#!/bin/sh\necho the real one: $*\n"
        assert machine.command("dpkg-divert", "--list", str(tool)) == ""
    finally:
        tool.unlink()


# Where there is no systemd: a new version of the package is a new hub, whose containers go on.
@pytest.mark.skipif(os.path.isdir("/run/systemd/system"), reason="the hub is systemd's here, which restarts it")
def test_an_upgrade_ends_the_old_hub(vm: Callable[..., Vm]) -> None:
    one = vm()
    one.deployed().booted()
    pid = Path("/run/onelxc/hub.pid").read_text().split()[0]
    shim = Path("/usr/lib/onelxc/onelxc/names.py")
    shim.write_text(shim.read_text() + "# of another version\n")
    assert f"stop onelxc-hub (process {pid})\n" in node()
    wait_until(
        lambda: not os.path.exists(f"/proc/{pid}") or "onelxc-hub" not in machine.command_line(int(pid)), "its end"
    )
    assert one.name in machine.domains()
