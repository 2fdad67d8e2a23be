"""The journal: what is held is known after whatever ended its writer."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from onelxc.errors import StorageError
from onelxc.root.journal import LONG, Journal


def kinds(journal: Journal) -> list[tuple[str, bool]]:
    return [(entry.kind, entry.committed) for entry in journal.held()]


def test_last_in_first_out_and_what_was_given_back_is_not_held(tmp_path: Path) -> None:
    path = str(tmp_path / "vms/5/journal")
    journal = Journal(path, "deploy")
    journal.take("loop", dev=1, ino=2)
    second = journal.take("mount", path="/x")
    journal.take("domain")
    journal.gave_back(second)
    assert kinds(journal) == kinds(Journal(path, "reap")) == [("domain", False), ("loop", False)]
    assert Journal(path, "reap").held()[1].what == {"dev": 1, "ino": 2}
    assert Journal(path, "reap").held()[1].verb == "deploy"


def test_a_commit_covers_what_came_before_it(tmp_path: Path) -> None:
    path = str(tmp_path / "vms/5/journal")
    journal = Journal(path, "deploy")
    journal.take("mount", path="/a")
    journal.commit()
    later = Journal(path, "attach_disk")
    later.take("mount", path="/b")
    assert [(entry.what["path"], entry.committed) for entry in later.held()] == [("/b", False), ("/a", True)]


def test_every_line_is_on_disk_before_the_thing_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "vms/5/journal"
    journal = Journal(str(path), "deploy")
    assert not path.exists()
    journal.take("mount", path="/a")
    assert path.read_text().count("\n") == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_half_a_line_of_a_power_cut_spoils_nothing(tmp_path: Path) -> None:
    path = tmp_path / "vms/5/journal"
    Journal(str(path), "deploy").take("mount", path="/a")
    for torn in (b'{"n":2,"take":"mou', b"\0\0\0\0", b'{"n":2,"take":"x"}'):
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n" + torn)
        journal = Journal(str(path), "reap")
        journal.take("loop", dev=1, ino=1)
        assert ("loop", False) in kinds(Journal(str(path), "reap"))
        assert ("mount", False) in kinds(Journal(str(path), "reap"))


def test_cleared_it_is_gone_and_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "vms/5/journal"
    journal = Journal(str(path), "deploy")
    journal.take("mount", path="/a")
    journal.clear()
    assert not path.exists()
    assert journal.held() == []
    journal.clear()
    journal.take("loop", dev=1, ino=1)
    assert kinds(Journal(str(path), "reap")) == [("loop", False)]


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond `size`: the kernel takes what fits and says so, as on a disk that is just full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [1, 10, 17, 18, 19])
def test_a_line_that_does_not_fit_whole_is_an_error_and_leaves_nothing(tmp_path: Path, room: int) -> None:
    path = tmp_path / "vms/5/journal"
    journal = Journal(str(path), "attach_disk")
    journal.take("mount", path="/a")
    before = path.read_bytes()
    error = f"Cannot write the journal {path}: File too large"
    with room_for(len(before) + room), pytest.raises(StorageError, match=error):
        journal.commit()
    assert path.read_bytes() == before
    assert kinds(journal) == kinds(Journal(str(path), "reap")) == [("mount", False)]
    journal.commit()
    assert kinds(Journal(str(path), "reap")) == [("mount", True)]


def test_that_something_is_gone_is_no_error_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "vms/5/journal"
    journal = Journal(str(path), "detach_disk")
    number = journal.take("mount", path="/a")
    with room_for(path.stat().st_size + 3):
        journal.gave_back(number)
    assert kinds(journal) == []
    assert kinds(Journal(str(path), "reap")) == [("mount", False)], "whoever comes next finds that it is not there"


def test_one_that_grows_is_written_anew_with_what_is_held(tmp_path: Path) -> None:
    path = tmp_path / "vms/5/journal"
    journal = Journal(str(path), "deploy")
    journal.take("mount", path="/kept")
    journal.commit()
    for number in range(500):
        again = Journal(str(path), "save", f"session {number}")
        taken = again.take("suspended")
        again.commit()
        again.gave_back(taken)
        again.compact()
        assert again.kept(f"session {number}")
        assert path.read_bytes().count(b"\n") <= LONG + 3
        again.close()
    last = Journal(str(path), "attach_disk")
    assert kinds(last) == [("mount", True)]
    assert last.kept("session 499")
    assert not last.kept("session 498")
    last.take("loop", dev=1, ino=2)
    assert kinds(Journal(str(path), "reap")) == [("loop", False), ("mount", True)], "a number is not used again"
    assert [entry.name for entry in path.parent.iterdir()] == ["journal"]


def test_one_that_cannot_be_written_anew_stays(tmp_path: Path) -> None:
    path = tmp_path / "vms/5/journal"
    journal = Journal(str(path), "deploy")
    for _ in range(LONG):
        journal.gave_back(journal.take("mount", path="/a"))
    before = path.read_bytes()
    journal.take("loop", dev=1, ino=2)
    with room_for(10):
        journal.compact()
    assert path.read_bytes().startswith(before)
    assert [entry.name for entry in path.parent.iterdir()] == ["journal"]
    journal.compact()
    assert path.read_bytes().count(b"\n") == 1


def test_one_that_cannot_be_read_takes_nothing_and_ends_no_release(tmp_path: Path) -> None:
    path = tmp_path / "vms/5/journal"
    path.mkdir(parents=True)
    journal = Journal(str(path), "cancel")
    assert journal.held() == []
    journal.gave_back(1)
    with pytest.raises(StorageError, match="Is a directory"):
        journal.take("mount", path="/a")
