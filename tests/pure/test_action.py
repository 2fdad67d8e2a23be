"""An error is one line that names the VM, whatever it came from."""

from __future__ import annotations

import pytest

from onelxc.action import told


@pytest.mark.parametrize(
    ("action", "vm_id", "text", "line"),
    [
        ("deploy", 5, "Cannot import disk.0: no space", "Cannot deploy VM 5: cannot import disk.0: no space"),
        ("deploy", 5, "Cannot start one-5: no init", "Cannot start one-5: no init"),
        ("deploy", 5, "VM 5: MEMORY is not a number", "VM 5: MEMORY is not a number"),
        ("deploy", 5, "VM 55: something", "Cannot deploy VM 5: VM 55: something"),
        ("deploy", 5, "Cannot use one-55", "Cannot deploy VM 5: cannot use one-55"),
        ("shutdown", 5, "it is not there", "Cannot shut down VM 5: it is not there"),
        ("attach_disk", 5, "Cannot open x", "Cannot attach disk VM 5: cannot open x"),
        ("deploy", None, "not the id of a VM: 'x'", "not the id of a VM: 'x'"),
    ],
)
def test_told(action: str, vm_id: int | None, text: str, line: str) -> None:
    assert told(action, vm_id, text) == line
