"""Where targets really lead in a root that its tenant wrote; what the guard makes of libvirt's own places in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from onelxc import names
from onelxc.errors import StorageError
from onelxc.root import guard, targets
from onelxc.root.owner import Owner
from onelxc.root.targets import Filesystem


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root file system where those of VMs are mounted."""
    monkeypatch.setattr(names, "MOUNTS", str(tmp_path))
    (tmp_path / "7/root").mkdir(parents=True)
    return tmp_path / "7/root"


def disk(root: Path, number: int) -> Path:
    path = root.parent / f"disk.{number}"
    path.mkdir(exist_ok=True)
    return path


def secure(root: Path, *mounted: tuple[str, str, str]) -> None:
    """The guard on (kind, source, target)s."""
    targets.secure(str(root), [Filesystem(*each) for each in mounted], Owner(None))


def refused(root: Path, *mounted: tuple[str, str, str]) -> str:
    with pytest.raises(StorageError) as raised:
        secure(root, *mounted)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("name", targets.SPECIAL)
@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("media/x"),
        lambda path: path.symlink_to("/"),
        lambda path: path.symlink_to("../../../etc"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.write_text("kept"),
        fifo,
        lambda path: None,
    ],
    ids=["relative", "root", "out", "dangling", "loop", "file", "fifo", "missing"],
)
def test_libvirts_places_become_directories(root: Path, name: str, make: Callable[[Path], None]) -> None:
    (root / "media/x").mkdir(parents=True)
    make(root / name)
    secure(root)
    for each in targets.SPECIAL:
        assert stat.S_ISDIR((root / each).lstat().st_mode)
    assert list((root / "media/x").iterdir()) == []


def test_no_byte_of_a_file_in_their_place_is_lost(root: Path) -> None:
    (root / "proc").write_text("first")
    secure(root)
    (root / "proc").rmdir()
    (root / "proc").write_text("second")
    secure(root)
    assert [(root / name).read_text() for name in ("proc.1", "proc.2")] == ["first", "second"]


def test_their_own_content_stays(root: Path) -> None:
    for name in targets.SPECIAL:
        (root / name / "deep").mkdir(parents=True)
    secure(root)
    assert all((root / name / "deep").is_dir() for name in targets.SPECIAL)


@pytest.mark.parametrize("special", targets.SPECIAL)
@pytest.mark.parametrize("form", ["/{}", "//{}/", "/./{}", "/{}/below", "/{}/./a/b"])
def test_a_target_that_is_one_of_them(root: Path, special: str, form: str) -> None:
    target = form.format(special)
    assert f"/{special} is the container's own" in refused(root, ("mount", str(disk(root, 1)), target))


@pytest.mark.parametrize("target", ["/", "//", "/.", "/media/..", "/media/d/../../proc", "media", "", "/a/../b"])
def test_a_target_that_is_no_plain_path(root: Path, target: str) -> None:
    if target != "/":  # libvirt does not mount a second root
        assert "not a path below /" in refused(root, ("mount", str(disk(root, 1)), target))
        with pytest.raises(StorageError):
            targets.refuse_special(target)


@pytest.mark.parametrize(
    "links,target",
    [
        ({"d": "/proc"}, "/d"),
        ({"d": "proc"}, "/d/x"),
        ({"media/d": "/proc"}, "/media/d"),
        ({"media/d": "../proc"}, "/media/d"),
        ({"media": "/sys"}, "/media/d"),
        ({"a": "/b", "b": "c", "c": "dev"}, "/a"),
        ({"x/d": "../../../../.oldroot"}, "/x/d"),
        ({"x/d": "/./x/../proc/"}, "/x/d"),
        ({"d": "/proc/../media"}, "/d"),
        ({"d": "/proc/self/root/etc"}, "/d"),
    ],
)
def test_a_target_that_leads_to_one_of_them(root: Path, links: dict[str, str], target: str) -> None:
    for name, text in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(text)
    assert "which is the container's own" in refused(root, ("mount", str(disk(root, 1)), target))


@pytest.mark.parametrize("text", ["/", ".", "..", "/d/..", "self"])
def test_a_target_that_leads_to_the_root_or_in_a_circle(root: Path, text: str) -> None:
    (root / "self").symlink_to("self")
    (root / "d").symlink_to(text)
    why = refused(root, ("mount", str(disk(root, 1)), "/d"))
    assert "the root of the container" in why or "too many symbolic links" in why


def test_links_that_lead_elsewhere_are_followed(root: Path) -> None:
    (root / "run/lock").mkdir(parents=True)
    (root / "var").mkdir()
    (root / "var/run").symlink_to("/run")
    secure(root, ("mount", str(disk(root, 1)), "/var/run/lock/disk"), ("mount", str(disk(root, 2)), "/srv/new"))
    assert (root / "run/lock/disk").is_dir()
    assert (root / "srv/new").is_dir()


def test_nothing_is_made_behind_a_link_to_nowhere(root: Path) -> None:
    (root / "d").symlink_to("/nowhere")
    assert "leads nowhere" in refused(root, ("mount", str(disk(root, 1)), "/d"))
    assert "leads nowhere" in refused(root, ("mount", str(disk(root, 1)), "/d/below"))
    assert not (root / "nowhere").exists()


@pytest.mark.parametrize("text", ["/proc", "../../proc", "/media/link", "../../../.oldroot"])
def test_a_link_on_a_disk_that_is_mounted_before(root: Path, text: str) -> None:
    first, second = disk(root, 1), disk(root, 2)
    (root / "media").mkdir()
    (root / "media/link").symlink_to("/dev")
    (first / "x").symlink_to(text)
    mounts = (("mount", str(first), "/media/d"), ("mount", str(second), "/media/d/x"))
    assert "which is the container's own" in refused(root, *mounts)


def test_a_disk_mounted_before_hides_what_lies_under_it(root: Path) -> None:
    """A link in the root that is no longer seen once the first disk is mounted there is no reason to refuse."""
    first = disk(root, 1)
    (first / "x").mkdir()
    (root / "media/d").mkdir(parents=True)
    (root / "media/d/x").symlink_to("/proc")
    secure(root, ("mount", str(first), "/media/d"), ("mount", str(disk(root, 2)), "/media/d/x"))


def test_a_disk_reached_by_another_name(root: Path) -> None:
    first = disk(root, 1)
    (first / "x").symlink_to("/proc")
    (root / "media").mkdir()
    (root / "other").symlink_to("media")
    mounts = (("mount", str(first), "/other/d"), ("mount", str(disk(root, 2)), "/media/d/x"))
    assert "/proc, which is the container's own" in refused(root, *mounts)


def test_a_disk_over_a_disk(root: Path) -> None:
    first, second = disk(root, 1), disk(root, 2)
    (second / "x").symlink_to("/sys")
    mounts = (("mount", str(first), "/m"), ("mount", str(second), "/m"), ("mount", str(disk(root, 3)), "/m/x"))
    assert "/sys, which is the container's own" in refused(root, *mounts)


def test_a_file_in_the_way(root: Path) -> None:
    (root / "srv").write_text("")
    assert "Not a directory" in refused(root, ("mount", str(disk(root, 1)), "/srv/x"))


def test_the_administrators_may_lie_in_what_the_kernel_shows(root: Path, tmp_path: Path) -> None:
    share = tmp_path.parent / "share"
    share.mkdir(exist_ok=True)
    for target in ("/proc/cpuinfo", "/dev/shm", "/sys/fs/cgroup/systemd"):
        secure(root, ("mount", str(share), target), ("ram", "65536", target))
        assert "the container's own" in refused(root, ("mount", str(disk(root, 1)), target))
        assert "the container's own" in refused(root, ("bind", "/srv", target))
    for target in (
        "/proc",
        "/sys/",
        "/dev",
        "/.oldroot/x",
        "/proc/self/mounts",
        "/proc/1/x",
        "/proc/mounts",
        "/dev/fd",
    ):
        assert "the container's own" in refused(root, ("mount", str(share), target))
        assert "the container's own" in refused(root, ("ram", "65536", target))


def test_a_source_that_is_not_on_the_host(root: Path, tmp_path: Path) -> None:
    """libvirt would look for it in the tenant's root."""
    assert "is not there for the container's root" in refused(root, ("mount", str(tmp_path.parent / "no"), "/x"))


@pytest.mark.parametrize("text", ["/.oldroot", "/proc", "/.oldroot/etc"])
def test_a_bind_within_the_container(root: Path, text: str) -> None:
    (root / "shared-nowhere").symlink_to(text)
    why = refused(root, ("bind", "/shared-nowhere/x", "/srv"))
    assert "the container's own" in why or "leads nowhere" in why
    (root / "plain-nowhere").mkdir()
    secure(root, ("bind", "/plain-nowhere", "/srv"))


DOMAIN = """<domstatus><domain type='lxc' id='5'><name>one-5</name>
<idmap><uid start='0' target='1879048192' count='65536'/><gid start='0' target='1879048192' count='65536'/></idmap>
<os><type>exe</type><init>/sbin/init</init>{user}</os>
<devices><filesystem type='mount' accessmode='passthrough'><source dir='/a &amp; b'/><target dir='/'/></filesystem>
<filesystem type='ram'><source usage='1024' units='KiB'/><target dir='/x'/><readonly/></filesystem>
<filesystem type='block'><source dev='/dev/vda'/><target dir='/y'/></filesystem>
<disk type='block'><source dev='/dev/vdb'/><target dev='vdb'/></disk></devices></domain></domstatus>"""


def test_what_is_read_of_a_domain() -> None:
    domain = guard.Domain(DOMAIN.format(user="").encode())
    assert [(each.kind, each.source, each.target) for each in domain.filesystems] == [
        ("mount", "/a & b", "/"),
        ("ram", "1024", "/x"),
        ("block", "/dev/vda", "/y"),
    ]
    assert domain.root is domain.filesystems[0]
    assert domain.id_base == 1879048192


@pytest.mark.parametrize("user", ["<inituser>nobody</inituser>", "<initgroup>100</initgroup>"])
def test_nobody_is_asked_who_a_user_is(user: str) -> None:
    with pytest.raises(StorageError, match=r"written as \+NUMBER"):
        guard.secure(guard.Domain(DOMAIN.format(user=user).encode()))


def test_what_is_no_domain_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match="Cannot read the domain's description"):
        guard.Domain(b"<domain><devices>")
    assert guard.main(["somebody-else", "start", "begin", "-"]) == 0
    assert guard.main(["one-5", "prepare", "begin", "-"]) == 0
    assert capsys.readouterr().err == ""
