"""What 6.x and 7.x say in the XML of each action."""

from __future__ import annotations

import pytest

from onelxc import actiondata, request
from onelxc.actiondata import Saving
from onelxc.config import Generation
from onelxc.errors import NotSupportedError, TemplateError
from onelxc.request import Request
from onelxc.template import Policy
from tests.support import captures

WITH_XML = [each for each in captures.ACTIONS if each.generation is Generation.MONITORD]


def request_of(case: str) -> Request:
    capture = captures.named(case)
    return request.parse(capture.action, capture.argv, capture.generation, capture.read)


@pytest.mark.parametrize("capture", WITH_XML, ids=lambda capture: capture.case)
def test_every_xml_is_a_vm(capture: captures.Capture) -> None:
    vm = actiondata.vm_of(request_of(capture.case), Policy())
    directory = "/var/lib/one/datastores/100" if vm.vm_id != 1 else "/var/lib/one/datastores/0"
    assert vm.root_disk.path == f"{directory}/{vm.vm_id}/disk.0"
    assert vm.context is not None
    assert vm.context.path == f"{directory}/{vm.vm_id}/disk.3"
    assert [disk.kind for disk in vm.disks if disk.disk_id < 3] in (["image", "fs", "swap"], ["image"])


@pytest.mark.parametrize("case", ["7.4.0/attach_disk/attach_disk", "7.4.0/detach_disk/detach_disk"])
def test_disk_that_comes_or_goes(case: str) -> None:
    attached = actiondata.disk_of(request_of(case), Policy())
    assert attached.disk.path == "/var/lib/one/datastores/0/1/disk.4"
    assert (attached.disk.disk_id, attached.disk.persistent, attached.disk.mount_point) == (
        4,
        True,
        "/media/one-disk.4",
    )


@pytest.mark.parametrize("case", ["7.4.0/attach_nic/attach_nic", "7.4.0/detach_nic/detach_nic"])
def test_nic_that_comes_or_goes(case: str) -> None:
    attached = actiondata.nic_of(request_of(case), Policy())
    assert (attached.nic.nic_id, attached.nic.device, attached.nic.guest_name) == (1, "one-1-1", "eth1")
    assert (attached.nic.mac, attached.nic.bridge) == ("02:00:c0:a8:96:65", "onebr0")


def test_disk_that_grows() -> None:
    growing = request_of("7.4.0/disk_resize_live/resize_disk")
    attached = actiondata.disk_of(growing, Policy())
    assert (attached.disk.path, actiondata.new_size_mb(growing)) == ("/var/lib/one/datastores/0/1/disk.0", 96)


def test_resize_has_the_new_values_in_template() -> None:
    vm = actiondata.vm_of(request_of("7.4.0/resize_live/resize"), Policy())
    assert (vm.cpu, vm.vcpu, vm.memory_kib) == (1.0, 3, 256 * 1024)


@pytest.mark.parametrize(
    ("case", "purpose"),
    [
        ("7.4.0/suspend/save", Saving.SUSPEND),
        ("7.4.0/stop/save", Saving.STOP),
        ("7.4.0/migrate_cold_save/save", Saving.MIGRATE),
        ("7.4.0/resume_from_suspend/restore", Saving.SUSPEND),
        ("7.4.0/resume_from_stop/restore", Saving.STOP),
        ("7.4.0/migrate_cold_save/restore", Saving.MIGRATE),
    ],
)
def test_what_a_save_is_for(case: str, purpose: Saving) -> None:
    assert actiondata.saving_of(request_of(case)) is purpose


def test_save_in_a_state_that_nobody_knows_is_refused() -> None:
    capture = captures.named("7.4.0/suspend/save")
    xml = capture.read().replace(b"<LCM_STATE>6</LCM_STATE>", b"<LCM_STATE>99</LCM_STATE>")
    with pytest.raises(NotSupportedError, match="Cannot save VM 1: not known in the state 99"):
        actiondata.saving_of(request.parse("save", capture.argv, capture.generation, lambda: xml))


@pytest.mark.parametrize("action", ["snapshot_create", "snapshot_revert", "snapshot_delete"])
def test_snapshots(action: str) -> None:
    got = actiondata.snapshot_of(request_of(f"7.4.0/{action}/{action}"))
    assert (got.snapshot_id, got.hypervisor_id) == (0, "snap-0")
    assert got.name == "snapA"


@pytest.mark.parametrize("name", ["", "snap-", "snap-0x", "../snap-0", "snap-01", "xsnap-0"])
def test_snapshot_names_that_are_not_ours(name: str) -> None:
    bad = Request("snapshot_revert", Generation.MONITORD, 1, "node2", ("one-1", name), b"<VM><TEMPLATE/></VM>")
    with pytest.raises(TemplateError, match="Cannot snapshot_revert VM 1: not a snapshot of ours"):
        actiondata.snapshot_of(bad)


def test_command() -> None:
    assert actiondata.command_of(request_of("7.4.0/exec/exec")) == ("echo hello", "")


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("<COMMAND><![CDATA[echo 'a  b'\ntrue]]></COMMAND><STDIN>aGk=</STDIN>", ("echo 'a  b'\ntrue", "aGk=")),
        ("<STDIN>aGk=</STDIN>", None),
    ],
)
def test_command_is_what_the_xml_says(inside: str, expected: tuple[str, str] | None) -> None:
    xml = f"<VM><TEMPLATE><QEMU_GA_EXEC>{inside}</QEMU_GA_EXEC></TEMPLATE></VM>".encode()
    got = request.parse("exec", ["exec", "2", "h", "echo a b"], Generation.MONITORD, lambda: xml)
    if expected:
        assert actiondata.command_of(got) == expected
        return
    with pytest.raises(TemplateError, match="Cannot exec in VM 2: its XML has no QEMU_GA_EXEC/COMMAND"):
        actiondata.command_of(got)


def test_context_path() -> None:
    assert actiondata.context_path(request_of("7.4.0/updateconf/reconfigure")) == "/var/lib/one/datastores/0/1/disk.3"


@pytest.mark.parametrize(
    ("root", "directory"),
    [
        ("<V><DATASTORE><BASE_PATH>/ds//7</BASE_PATH></DATASTORE></V>", "/ds/7/5"),
        ("<V><DISK_TARGET_PATH>/ds//7/5/disk.3</DISK_TARGET_PATH></V>", "/ds/7/5"),
        ("<V><CHECKPOINT_FILE>/ds/7/5/checkpoint</CHECKPOINT_FILE></V>", "/ds/7/5"),
        (
            "<V><HISTORY_RECORDS><HISTORY><DS_ID>9</DS_ID></HISTORY></HISTORY_RECORDS></V>",
            "/var/lib/one/datastores/9/5",
        ),
    ],
)
def test_where_the_disks_lie(root: str, directory: str) -> None:
    from lxml import etree

    assert actiondata.vm_dir_of(etree.fromstring(root), Request("resize", Generation.MONITORD, 5, "h")) == directory


def test_nobody_says_where_the_disks_lie() -> None:
    from lxml import etree

    with pytest.raises(TemplateError, match="VM 5: the XML does not say where the disks lie"):
        actiondata.vm_dir_of(etree.fromstring("<V/>"), Request("resize", Generation.MONITORD, 5, "h"))
