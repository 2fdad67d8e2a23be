"""What a caller may name: disks inside the datastores and nothing else, held so that no exchange afterwards matters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onelxc.config import HostConfig
from onelxc.errors import HelperError, OneLxcError, StorageError
from onelxc.model import Disk, Vm, to_json
from onelxc.root import validate


@pytest.fixture
def store(tmp_path: Path) -> Path:
    place = tmp_path / "store"
    (place / "7").mkdir(parents=True)
    (place / "7/disk.0").write_text("the disk")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    return place


def policy(*stores: Path) -> HostConfig:
    return HostConfig(datastores=tuple(map(str, stores)))


def content(found: validate.Found) -> str:
    with os.fdopen(found.open(os.O_RDONLY)) as file:
        return file.read()


def refusal(path: object, store: Path) -> str:
    with pytest.raises(StorageError) as caught:
        validate.find(str(path), policy(store)).close()
    return str(caught.value)


def test_a_disk_in_a_datastore_is_found(store: Path) -> None:
    with validate.find(f"{store}/7/disk.0", policy(store)) as found:
        assert content(found) == "the disk"
        assert (found.real, found.name) == (f"{store}/7/disk.0", "disk.0")
        assert Path(found.beside("disk.0")).read_text() == "the disk"


def test_links_to_another_datastore_are_followed_to_the_file_itself(store: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "deep/abc").write_text("shared")
    (images / "shortcut").symlink_to("deep")
    (store / "7/disk.1").symlink_to(images / "shortcut/abc")
    (store / "7/disk.2").symlink_to("disk.1")
    for name in ("disk.1", "disk.2"):
        with validate.find(f"{store}/7/{name}", policy(store, images)) as found:
            assert content(found) == "shared"
            assert found.real == f"{images}/deep/abc"


def test_a_datastore_that_is_a_link_itself_is_the_administrators_choice(store: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(store)
    with validate.find(f"{tmp_path}/alias/7/disk.0", policy(tmp_path / "alias")) as found:
        assert content(found) == "the disk"


@pytest.mark.parametrize("there", ["secret", "nothing-there"])
def test_outside_gets_one_answer_whether_or_not_something_is_there(store: Path, tmp_path: Path, there: str) -> None:
    (store / "7/link").symlink_to(tmp_path / "outside" / there)
    (store / "7/up").symlink_to(f"../../outside/{there}")
    (store / "7/dir").symlink_to(tmp_path / "outside")
    (store / "7/through").symlink_to(f"{tmp_path}/outside/{there}/../../store/../outside/secret")
    for path in (
        tmp_path / "outside" / there,
        f"{store}/../outside/{there}",
        f"{store}/7/link",
        f"{store}/7/up",
        f"{store}/7/dir/{there}",
        f"{store}/7/through",
        f"outside/{there}",
    ):
        assert refusal(path, store) == (
            f"Cannot use {path}: it does not lie in a datastore of this host (DATASTORES in host.conf)"
        )


def test_a_name_that_only_begins_like_a_datastore_is_outside(store: Path) -> None:
    (store.parent / "store2").mkdir()
    (store.parent / "store2/disk.0").write_text("")
    assert "does not lie in a datastore" in refusal(store.parent / "store2/disk.0", store)


def test_devices_that_a_link_leads_to_have_to_be_opennebulas_volumes(store: Path) -> None:
    (store / "7/disk.1").symlink_to("/dev/null")
    (store / "7/disk.2").symlink_to("/dev/vg-one-0/../null")
    for name in ("disk.1", "disk.2"):
        assert "does not lie in a datastore" in refusal(store / "7" / name, store)
    # without a link of a datastore's in between, not even those
    assert "does not lie in a datastore" in refusal("/dev/vg-one-0/lv-one-7-0", store)
    (store / "7/disk.3").symlink_to("/dev/vg-one-0/lv-one-7-0")
    assert "/dev/vg-one-0/lv-one-7-0: No such file" in refusal(store / "7/disk.3", store)


def test_links_in_a_circle_end(store: Path) -> None:
    (store / "7/a").symlink_to("b")
    (store / "7/b").symlink_to("a")
    assert refusal(store / "7/a", store) == f"Cannot open {store}/7/a: too many symbolic links"


def test_missing_disks_and_what_is_no_disk(store: Path) -> None:
    os.mkfifo(store / "7/pipe")
    assert refusal(store / "7/disk.9", store) == f"Cannot open {store}/7/disk.9: No such file or directory"
    assert refusal(store / "8/disk.0", store) == f"Cannot open {store}/8/disk.0: No such file or directory"
    assert refusal(store / "7/disk.0/x", store) == f"Cannot open {store}/7/disk.0/x: Not a directory"
    assert refusal(store / "7/pipe", store) == f"Cannot use {store}/7/pipe: it is neither a file nor a volume"
    assert "does not lie in" in refusal(store, store)


def test_what_is_exchanged_after_the_check_is_not_used(store: Path, tmp_path: Path) -> None:
    with validate.find(f"{store}/7/disk.0", policy(store)) as found:
        (store / "7").rename(store / "old")
        (store / "7").symlink_to(tmp_path / "outside")
        (tmp_path / "outside/disk.0").write_text("another")
        (store / "old/disk.0").rename(store / "old/kept")
        (store / "old/disk.0").symlink_to(tmp_path / "outside/secret")
        assert content(found) == "the disk"
        os.unlink("disk.0", dir_fd=found.directory)
        assert not (store / "old/disk.0").is_symlink()
        assert (tmp_path / "outside/disk.0").read_text() == "another"


def test_a_directory_is_looked_for_in_the_same_way(store: Path, tmp_path: Path) -> None:
    (store / "8").symlink_to(tmp_path / "outside")
    for good in (store, store / "7"):
        os.close(validate.find_directory(str(good), policy(store)))
    for bad in (store / "8", store / "7/disk.0", tmp_path / "outside"):
        with pytest.raises(StorageError):
            validate.find_directory(str(bad), policy(store))


def described(vm: Vm, config: HostConfig | None = None) -> Vm:
    return validate.vm(to_json(vm), 7, config or HostConfig())


def test_a_vm_comes_over_as_it_is() -> None:
    vm = Vm(
        vm_id=7,
        cpu=2,
        disks=(Disk(0, "/var/lib/one/7/disk.0"), Disk(1, "/x", target="/srv")),
        init_environment=(("A", "b"),),
    )
    assert described(vm) == vm


@pytest.mark.parametrize(
    ("vm", "told"),
    [
        (Vm(vm_id=8), "described as VM 8"),
        (Vm(vm_id=7, privileged=True), "no privileged containers (PRIVILEGED in host.conf)"),
        (Vm(vm_id=7, disks=(Disk(1, "/a"), Disk(1, "/b"))), "not distinct"),
        (Vm(vm_id=7, disks=(Disk(-1, "/a"),)), "not distinct small numbers"),
        (Vm(vm_id=7, profiles=("../../etc/shadow",)), "no name of a profile"),
        (Vm(vm_id=7, profiles=("gpu",)), "this host does not allow the profile gpu (PROFILES in host.conf)"),
        (Vm(vm_id=7, raw=("<devices/>",)), "this host allows no RAW (RAW in host.conf)"),
        (Vm(vm_id=7, disks=(Disk(1, "/a", target="/a/../../etc"),)), "not a path below /"),
        (Vm(vm_id=7, disks=(Disk(1, "/a", target="/"),)), "not a path below /"),
        (Vm(vm_id=7, disks=(Disk(1, "/a\0b"),)), "a NUL"),
    ],
)
def test_a_vm_that_may_not_be(vm: Vm, told: str) -> None:
    with pytest.raises(OneLxcError) as caught:
        described(vm)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("allowed", "asked", "refused"),
    [
        (("gpu",), ("gpu",), ""),
        (("gpu.xml",), ("gpu",), ""),
        (("gpu",), ("gpu.xml",), ""),
        (("gpu", "audio"), ("audio", "gpu"), ""),
        (("gpu",), ("gpu", "audio"), "audio"),
        (("gpu",), ("GPU",), "GPU"),
        (("gpu2",), ("gpu",), "gpu"),
        (("*",), ("gpu",), "gpu"),
        (("gpu",), ("gpu.xml.xml",), "gpu.xml.xml"),
    ],
)
def test_profiles_that_the_host_allows(allowed: tuple[str, ...], asked: tuple[str, ...], refused: str) -> None:
    vm, host = Vm(vm_id=7, profiles=asked), HostConfig(profiles=allowed)
    if not refused:
        assert described(vm, host) == vm
        return
    with pytest.raises(HelperError, match=f"does not allow the profile {refused} "):
        described(vm, host)


def test_raw_where_the_host_allows_it() -> None:
    assert described(Vm(vm_id=7, raw=("<devices/>",)), HostConfig(raw=True)).raw


def test_privileged_where_the_host_allows_it() -> None:
    assert described(Vm(vm_id=7, privileged=True), HostConfig(privileged=True)).privileged


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vm_id": "7"}, "Vm.vm_id: not int: '7'"),
        ({"vm_id": True}, "Vm.vm_id: not int: True"),
        ({"cpu": "1"}, "Vm.cpu: not float"),
        ({"disks": {}}, "Vm.disks: not a list"),
        ({"disks": [{"disk_id": 0}]}, "missing 1 required positional argument: 'path'"),
        ({"disks": [{"disk_id": 0, "path": 5}]}, "Vm.disks[0].path: not str: 5"),
        ({"disks": [{"disk_id": 0, "path": "", "owner": 0}]}, "Vm.disks[0]: unknown field 'owner'"),
        ({"init_environment": [["A"]]}, "1 items instead of 2"),
        ({"graphics": 5}, "Vm.graphics: not an object"),
    ],
)
def test_json_that_is_no_vm(change: dict[str, object], told: str) -> None:
    with pytest.raises(HelperError) as caught:
        validate.vm({"vm_id": 7, **change}, 7, HostConfig())
    assert told in str(caught.value)


def test_a_link_to_a_device_leads_where_the_host_allows_it(store: Path) -> None:
    def refused(target: str, *patterns: str) -> str:
        (store / "7/disk.9").unlink(missing_ok=True)
        (store / "7/disk.9").symlink_to(target)
        with pytest.raises(StorageError) as caught:
            validate.find(f"{store}/7/disk.9", HostConfig(datastores=(str(store),), block_devices=patterns)).close()
        return str(caught.value)

    assert "does not lie in a datastore" in refused("/dev/disk/by-id/none", "/dev/vg-one-*/lv-one-*")
    assert "/dev/disk/by-id/none: No such file" in refused("/dev/disk/by-id/none", "/dev/sd*", "/dev/disk/by-id/n*")
    assert "does not lie in a datastore" in refused("/dev/disk/by-id/none", "/dev/*"), "* stands for no /"
    assert "does not lie in a datastore" in refused("/dev/vg/../../etc/passwd", "/dev/vg/*")
    assert "/dev/null is no block device" in refused("/dev/null", "/dev/n*")
    assert "/dev/fd/0 is no block device" in refused("/dev/fd/0", "/dev/fd/*")
