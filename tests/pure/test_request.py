"""argv and stdin of both generations become a Request; nothing is read from a stdin that never ends."""

from __future__ import annotations

import os
import threading

import pytest

from onelxc import request
from onelxc.config import Generation
from onelxc.errors import TemplateError
from tests.support import captures

# case: VM id, host, deploy id, the VM's directory
EXPECTED = {
    "3.2.1/cancel": (3, "node2", "one-3", ""),
    "3.2.1/cancel_after_empty_deploy_id": (11, "node1", "", ""),
    "3.2.1/cancel_while_booting": (5, "node1", "", ""),
    "3.2.1/deploy": (2, "node1", "", "/var/lib/one/2/images"),
    "3.2.1/deploy_nic_context": (24, "node1", "", "/var/lib/one/24/images"),
    "3.2.1/migrate": (7, "node1", "one-7", ""),
    "3.2.1/poll": (12, "node1", "one-12", ""),
    "3.2.1/reboot": (2, "node1", "one-2", ""),
    "3.2.1/restore": (2, "node1", "", "/var/lib/one/2/images"),
    "3.2.1/save": (2, "node1", "one-2", "/var/lib/one/2/images"),
    "3.2.1/shutdown": (2, "node2", "one-2", ""),
    "7.4.0/attach_disk/attach_disk": (1, "node2", "one-1", "/var/lib/one/datastores/0/1"),
    "7.4.0/attach_nic/attach_nic": (1, "node2", "one-1", ""),
    "7.4.0/attach_nic/prereconfigure": (1, "node2", "one-1", ""),
    "7.4.0/attach_nic/reconfigure": (1, "node2", "one-1", "/var/lib/one/datastores/0/1"),
    "7.4.0/attach_nic_alias/prereconfigure": (1, "node2", "one-1", ""),
    "7.4.0/attach_nic_alias/reconfigure": (1, "node2", "one-1", "/var/lib/one/datastores/0/1"),
    "7.4.0/deploy/deploy": (4, "localhost", "", "/var/lib/one/datastores/100/4"),
    "7.4.0/detach_disk/detach_disk": (1, "node2", "one-1", "/var/lib/one/datastores/0/1"),
    "7.4.0/detach_nic/detach_nic": (1, "node2", "one-1", ""),
    "7.4.0/detach_nic/prereconfigure": (1, "node2", "one-1", ""),
    "7.4.0/detach_nic/reconfigure": (1, "node2", "one-1", "/var/lib/one/datastores/0/1"),
    "7.4.0/detach_nic_alias/prereconfigure": (1, "node2", "one-1", ""),
    "7.4.0/detach_nic_alias/reconfigure": (1, "node2", "one-1", "/var/lib/one/datastores/0/1"),
    "7.4.0/disk_resize_live/resize_disk": (1, "node2", "one-1", ""),
    "7.4.0/exec/exec": (2, "localhost", "", ""),
    "7.4.0/exec_cancel/exec_cancel": (2, "localhost", "", ""),
    "7.4.0/migrate_cold_poff/deploy": (2, "node2", "", "/var/lib/one/datastores/100/2"),
    "7.4.0/migrate_cold_poff/shutdown": (2, "localhost", "one-2", ""),
    "7.4.0/migrate_cold_save/restore": (2, "localhost", "one-2", "/var/lib/one/datastores/100/2"),
    "7.4.0/migrate_cold_save/save": (2, "node2", "one-2", "/var/lib/one/datastores/100/2"),
    "7.4.0/migrate_live/migrate": (2, "node2", "one-2", ""),
    "7.4.0/poll/poll": (1, "node2", "one-1", ""),
    "7.4.0/poweroff/shutdown": (1, "node2", "one-1", ""),
    "7.4.0/poweroff_hard/cancel": (1, "node2", "one-1", ""),
    "7.4.0/reboot/reboot": (1, "node2", "one-1", ""),
    "7.4.0/recover_recreate/cancel": (3, "localhost", "one-3", ""),
    "7.4.0/recover_recreate/deploy": (3, "localhost", "", "/var/lib/one/datastores/100/3"),
    "7.4.0/reset/reset": (1, "node2", "one-1", ""),
    "7.4.0/resize_live/resize": (1, "node2", "one-1", ""),
    "7.4.0/resume_from_poweroff/deploy": (1, "node2", "", "/var/lib/one/datastores/0/1"),
    "7.4.0/resume_from_stop/restore": (2, "localhost", "one-2", "/var/lib/one/datastores/100/2"),
    "7.4.0/resume_from_suspend/restore": (1, "node2", "one-1", "/var/lib/one/datastores/0/1"),
    "7.4.0/resume_from_undeploy/deploy": (2, "localhost", "", "/var/lib/one/datastores/100/2"),
    "7.4.0/snapshot_create/snapshot_create": (1, "node2", "one-1", ""),
    "7.4.0/snapshot_delete/snapshot_delete": (1, "node2", "one-1", ""),
    "7.4.0/snapshot_revert/snapshot_revert": (1, "node2", "one-1", ""),
    "7.4.0/stop/save": (2, "localhost", "one-2", "/var/lib/one/datastores/100/2"),
    "7.4.0/suspend/save": (1, "node2", "one-1", "/var/lib/one/datastores/0/1"),
    "7.4.0/terminate/shutdown": (2, "localhost", "one-2", ""),
    "7.4.0/terminate_hard/cancel": (3, "localhost", "one-3", ""),
    "7.4.0/undeploy/shutdown": (2, "localhost", "one-2", ""),
    "7.4.0/updateconf/prereconfigure": (1, "node2", "one-1", ""),
    "7.4.0/updateconf/reconfigure": (1, "node2", "one-1", "/var/lib/one/datastores/0/1"),
    "7.4.0/vnm_post_fails_after_deploy/cancel": (3, "localhost", "one-3", ""),
    "7.4.0/vnm_post_fails_after_deploy/deploy": (3, "localhost", "", "/var/lib/one/datastores/100/3"),
}


def test_every_capture_is_expected() -> None:
    assert sorted(capture.case for capture in captures.ACTIONS) == sorted(EXPECTED)


@pytest.mark.parametrize("capture", captures.ACTIONS, ids=lambda capture: capture.case)
def test_captures(capture: captures.Capture) -> None:
    got = request.parse(capture.action, capture.argv, capture.generation, capture.read)
    assert (got.vm_id, got.host, got.deploy_id, got.vm_dir) == EXPECTED[capture.case]
    assert got.xml == (capture.stdin or b"")


@pytest.mark.parametrize("action", ["shutdown", "cancel", "reboot", "poll", "save", "restore", "migrate"])
def test_pull_generation_reads_no_stdin(action: str) -> None:
    def read() -> bytes:
        raise AssertionError("stdin was read: oned 3.2.1 leaves it open for ever")

    request.parse(action, ["x", "one-3", "node2", "3", "node2"], Generation.PULL, read)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["cancel"], "Cannot cancel: VM id and host expected: no arguments"),
        (["cancel", "node1"], "Cannot cancel: VM id and host expected: node1"),
        (["cancel", "one-3", "node2", "x3", "node2"], "Cannot cancel: not the id of a VM: 'x3'"),
        (["cancel", "one-3", "node2", "-3", "node2"], "Cannot cancel: not the id of a VM: '-3'"),
        (["cancel", "one-3", "node2", "٣", "node2"], "Cannot cancel: not the id of a VM: '٣'"),
    ],
)
def test_arguments_that_are_none(argv: list[str], words: str) -> None:
    with pytest.raises(TemplateError) as error:
        request.parse("cancel", argv, Generation.PULL)
    assert str(error.value) == words


def test_exec_has_its_id_first() -> None:
    got = request.parse(
        "exec", ["exec", "7", "node1", "cat; echo 'x y'", "aGk="], Generation.MONITORD, lambda: b"<VM/>"
    )
    assert (got.vm_id, got.host, got.arguments) == (7, "node1", ("cat; echo 'x y'", "aGk="))


def test_missing_arguments_are_named() -> None:
    got = request.Request("resize_disk", Generation.MONITORD, 5, "node1", ("one-5", "0", "1o"))
    assert got.number(1, "disk id") == 0
    with pytest.raises(TemplateError, match="Cannot resize_disk VM 5: the new size is not a number: '1o'"):
        got.number(2, "new size")
    with pytest.raises(TemplateError, match="Cannot resize_disk VM 5: no XML in the arguments"):
        got.argument(3, "XML")


def test_stdin_comes_in_pieces() -> None:
    reader, writer = os.pipe()

    def write() -> None:
        for part in (b"<VM>", b"x" * 100_000, b"</VM>"):
            os.write(writer, part)
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert request.read_stdin(reader, limit_s=30) == b"<VM>" + b"x" * 100_000 + b"</VM>"
    finally:
        thread.join()
        os.close(reader)


def test_stdin_that_never_ends_is_an_error() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(TemplateError, match=r"no end of it on stdin after 0\.1 s"):
            request.read_stdin(reader, limit_s=0.1)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("/var/lib/one//datastores/0/1", "/var/lib/one/datastores/0/1"), ("//a/../b", "/b"), ("/a/", "/a")],
)
def test_clean_path(written: str, meant: str) -> None:
    assert request.clean_path(written) == meant
