"""The journal: what is held is known after whatever ended its writer."""

from __future__ import annotations

from pathlib import Path

from onelxc.root.journal import Journal


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
