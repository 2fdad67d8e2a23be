"""install.sh run by root in directories that oneadmin owns: whatever oneadmin puts there, root's own is untouched."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import installations as trees

BUNDLE = Path(__file__).parents[2]
Kind = Callable[[Path], Path]


def install(root: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(BUNDLE / "install.sh"), "-d", str(root), *arguments],
        env={"PATH": os.environ["PATH"], **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """In one line, in which no path is a descriptor's."""
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("install.sh: ")
    assert done.stderr.count("\n") == 1
    assert "/proc/self" not in done.stderr + done.stdout
    return done.stderr


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A directory of root's that everybody may look into, with a file, a secret and a program."""
    place = tmp_path / "victim"
    place.mkdir(mode=0o755)
    (place / "file").write_text("root's\n")
    (place / "secret").write_text("root's secret\n")
    (place / "secret").chmod(0o600)
    (place / "lxc").mkdir(mode=0o755)
    before = trees.snapshot(tmp_path / "victim")
    yield place
    assert trees.snapshot(place) == before


@pytest.fixture(params=[trees.pull, trees.monitord], ids=["pull", "monitord"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    trees.reachable(tmp_path)
    return request.param(tmp_path / "one")  # type: ignore[no-any-return]


def oneadmins(*paths: Path) -> None:
    for path in paths:
        os.lchown(path, trees.ONEADMIN, trees.ONEADMIN)


def link(path: Path, target: Path | str) -> None:
    """Takes the place of what is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    oneadmins(path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("step", [(), ("--uninstall",)], ids=["install", "uninstall"])
@pytest.mark.parametrize("known", [True, False], ids=["its digest", "any digest"])
def test_a_manifest_with_a_link_in_a_path(root: Path, victim: Path, known: bool, step: tuple[str, ...]) -> None:
    install(root).check_returncode()
    remotes = root / "var/remotes"
    link(remotes / "evil", victim)
    with (remotes / "onelxc/manifest").open("a") as manifest:
        for name in ("file", "secret"):
            manifest.write(f"{digest(victim / name) if known else '00'} @remotes@/evil/{name}\n")
        manifest.write("directory @remotes@/evil/lxc\nlink @remotes@/evil/file\n")
    refused(install(root, *step))


@pytest.mark.parametrize("step", [(), ("--uninstall",)], ids=["install", "uninstall"])
def test_a_manifest_that_is_a_link(root: Path, victim: Path, step: tuple[str, ...]) -> None:
    install(root).check_returncode()
    link(root / "var/remotes/onelxc/manifest", victim / "secret")
    install(root, *step)


def test_a_file_that_was_replaced_is_put_back_into_no_directory_of_roots(root: Path, victim: Path) -> None:
    install(root).check_returncode()
    kept = root / "var/onelxc-replaced/evil"
    kept.mkdir(parents=True)
    (kept / "new.sh").write_text("id\n")
    (kept / "file").write_text("id\n")
    oneadmins(kept.parent, kept, *kept.iterdir())
    link(root / "var/remotes/evil", victim)
    refused(install(root, "--uninstall"))


def test_the_place_of_what_was_replaced_is_a_link(root: Path, victim: Path) -> None:
    install(root).check_returncode()
    link(root / "var/onelxc-replaced", victim)
    install(root, "--uninstall")


@pytest.mark.parametrize("name", ["vmm", "im", "onelxc", "vmm/lxc", "im/lxc.d", "im/onelxc.d", "im/onelxc-probes.d",
                                  "etc", "etc/vmm"])  # fmt: skip
@pytest.mark.parametrize("step", ["install", "replace", "again", "uninstall"])
def test_a_directory_is_a_link(root: Path, victim: Path, name: str, step: str) -> None:
    if step in ("again", "uninstall"):
        install(root).check_returncode()
    link(root / "var/remotes" / name, victim)
    done = install(root, *({"replace": ["--replace"], "uninstall": ["--uninstall"]}.get(step, [])))
    assert done.returncode in (0, 1)
    assert done.stderr.count("\n") == done.returncode, done.stderr


@pytest.mark.parametrize("name", ["vmm/{}/poll", "vmm/{}/poll.onelxc-new", "onelxc/names.py",
                                  "onelxc/manifest.onelxc-new", "onelxc/front_end.conf",
                                  "onelxc/__pycache__"])  # fmt: skip
@pytest.mark.parametrize("step", ["install", "again", "uninstall"])
def test_a_file_is_a_link(root: Path, victim: Path, name: str, step: str) -> None:
    if step != "install":
        install(root).check_returncode()
    place = root / "var/remotes" / name.format("lxc" if (root / "etc/vmm_exec").is_dir() else "onelxc")
    place.parent.mkdir(parents=True, exist_ok=True)
    oneadmins(place.parent)
    link(place, victim / "file" if "pycache" not in name else victim)
    done = install(root, *(["--uninstall"] if step == "uninstall" else []))
    assert done.returncode == 0, done.stderr


def test_nothing_that_only_root_may_read_is_copied(tmp_path: Path, victim: Path) -> None:
    """A probe of the stock's is a link to root's secret; so is what another driver had in our place."""
    trees.reachable(tmp_path)
    root = trees.monitord(tmp_path / "one")
    remotes = root / "var/remotes"
    link(remotes / "im/kvm-probes.d/host/system/pci.rb", victim / "secret")
    refused(install(root))
    link(remotes / "im/kvm-probes.d/host/system/pci.rb", victim / "file")
    link(remotes / "vmm/lxc/deploy", victim / "secret")
    install(root, "--replace")
    for path in (root / "var").rglob("*"):
        assert path.is_symlink() or not path.is_file() or b"root's secret" not in path.read_bytes(), path


def test_nothing_of_oneadmins_is_executed_by_root(tmp_path: Path) -> None:
    """oned of a self-contained installation is asked for its version where nothing else says it."""
    trees.reachable(tmp_path)
    root = trees.pull(tmp_path / "one")
    (root / "lib/ruby/cli/one_helper.rb").unlink()
    oned = root / "bin/oned"
    oned.parent.mkdir()
    oned.write_text(
        f"#!/bin/sh\n{{ id -u; id -G; cat /proc/self/status; env; ls -l /proc/self/fd; }} > {root}/etc/said\n"
        'echo "OpenNebula 3.2.1 is distributed"\n'
    )
    oned.chmod(0o755)
    oneadmins(oned.parent, oned)
    done = install(root, environment={"SECRET_OF_ROOT": "x"})
    assert done.returncode == 0, done.stderr
    said = (root / "etc/said").read_text()
    assert said.splitlines()[0] == str(trees.ONEADMIN)
    assert "0" not in said.splitlines()[1].split()
    assert "SECRET_OF_ROOT" not in said
    for line in ("NoNewPrivs:\t1", "CapPrm:\t0000000000000000", "CapInh:\t0000000000000000"):
        assert line in said


def test_the_session_and_terminal_of_root_are_not_given(tmp_path: Path) -> None:
    """Whoever has root's terminal could type there (TIOCSTI)."""
    trees.reachable(tmp_path)
    root = trees.pull(tmp_path / "one")
    oned, tty = root / "bin/oned", os.openpty()
    (root / "lib/ruby/cli/one_helper.rb").unlink()
    oned.parent.mkdir()
    oned.write_text(
        f"#!/bin/sh\n{{ ls -l /proc/self/fd/; (: < /dev/tty) 2>&1; }} > {root}/etc/said\necho OpenNebula 3.2.1\n"
    )
    oned.chmod(0o755)
    oneadmins(oned.parent, oned)
    argv = ["setsid", "-c", "-w", str(BUNDLE / "install.sh"), "-d", str(root)]
    with subprocess.Popen(argv, stdin=tty[1], stdout=tty[1], stderr=tty[1]) as process:
        drain = threading.Thread(target=lambda: [None for _ in iter(lambda: _read(tty[0]), b"")], daemon=True)
        drain.start()
        assert process.wait(60) == 0
    said = (root / "etc/said").read_text()
    assert os.ttyname(tty[1]) not in said
    assert "/dev/tty" in said, "it could be opened"


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""


@pytest.mark.parametrize("name", ["vmm", "onelxc", "vmm/lxc"])
def test_oneadmin_is_quicker(root: Path, victim: Path, name: str) -> None:
    """A directory is a link at one moment and a directory at the next, while root installs and uninstalls."""
    place, other = root / "var/remotes" / name, root / "var/remotes/other"
    place.mkdir(parents=True, exist_ok=True)
    oneadmins(place)
    link(other, victim)
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            for old, new in ((place, place.with_name("aside")), (other, place), (place, other)):
                try:
                    os.rename(old, new)
                except OSError:
                    pass
            try:
                os.rename(place.with_name("aside"), place)
            except OSError:
                pass

    racer = threading.Thread(target=exchange)
    racer.start()
    try:
        for step in ((), ("--uninstall",)) * 3:
            install(root, *step)
    finally:
        stop.set()
        racer.join()


# What the operator or a distribution has made of links goes on working.
def test_links_that_are_legitimate(tmp_path: Path) -> None:
    root = trees.monitord(tmp_path / "one")
    (tmp_path / "elsewhere").mkdir()
    os.rename(root / "var/remotes/vmm", tmp_path / "elsewhere/vmm")
    os.rename(root / "var/remotes/etc", tmp_path / "elsewhere/etc")
    oneadmins(tmp_path / "elsewhere")
    trees.reachable(tmp_path)
    link(root / "var/remotes/vmm", "../../../elsewhere/vmm")
    link(root / "var/remotes/etc", tmp_path / "elsewhere/etc")
    here = tmp_path / "link-to-one"
    here.symlink_to(root)
    done = install(here)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere/vmm/onelxc/deploy").is_file()
    assert stat.S_IMODE((tmp_path / "elsewhere/vmm/onelxc").stat().st_mode) == 0o755
    install(here, "--uninstall").check_returncode()
    assert not (tmp_path / "elsewhere/vmm/onelxc").exists()


def test_an_installation_of_roots_own(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        os.lchown(path, 0, 0)
    before = trees.snapshot(root)
    install(root).check_returncode()
    install(root, "--uninstall").check_returncode()
    assert trees.snapshot(root) == before


@pytest.mark.parametrize("how", ["owned", "written by a group", "written by all", "a link leads there"])
def test_an_installation_of_roots_in_which_others_can_write_is_refused(root: Path, tmp_path: Path, how: str) -> None:
    for path in (root, *root.rglob("*")):
        os.lchown(path, 0, 0)
    place = root / "var/remotes/vmm"
    if how == "owned":
        os.chown(place, trees.ONEADMIN, 0)
    elif how == "written by a group":
        os.chown(place, 0, trees.ONEADMIN)
        place.chmod(0o775)
    elif how == "written by all":
        place.chmod(0o777)
    else:
        os.rename(place, tmp_path / "vmm")
        os.chown(tmp_path / "vmm", trees.ONEADMIN, trees.ONEADMIN)
        place.symlink_to(tmp_path / "vmm")
    before = trees.snapshot(root)
    assert "chown" in refused(install(root)) or "belongs to oneadmin" in refused(install(root))
    assert trees.snapshot(root) == before


# etc is root's there: its files are put and removed by root, on no word of oneadmin's.
def test_etc_of_a_package_is_not_touched_on_oneadmins_word(tmp_path: Path) -> None:
    trees.packaged(tmp_path, trees.pull)
    put = ["/etc/one", "/usr/lib/one", "/var/lib/one/remotes"]
    try:
        for path in put:
            os.makedirs(path)
            subprocess.run(["mount", "--bind", f"{tmp_path}{path}", path], check=True)
        argv = [str(BUNDLE / "install.sh"), "front-end"]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        conf, oned = Path("/etc/one/vmm_exec/vmm_exec_lxc.conf"), Path("/etc/one/oned.conf")
        conf.write_text("MEMORY = 99\n")
        with Path("/var/lib/one/remotes/onelxc/manifest").open("a") as manifest:
            for path in (conf, oned):
                manifest.write(f"{digest(path)} @etc@/{path.relative_to('/etc/one')}\n")
        for step in ([], ["--uninstall"]):
            subprocess.run([*argv, *step], stdin=subprocess.DEVNULL, capture_output=True)
            assert conf.read_text() == "MEMORY = 99\n"
            assert oned.exists()
    finally:
        for path in put:
            subprocess.run(["umount", path], check=False)
            os.rmdir(path)
