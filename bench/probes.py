"""vm/status and vm/monitor with one container and with a hundred, beside virsh."""

from __future__ import annotations

import os
import shutil
import statistics

import libvirt

from bench import bare
from bench.table import Table, timed
from tests.support import installation
from tests.support.frontends import MONITORD
from tests.support.vms import Driver

ROOT = "/srv/idle"
MANY = 100


def measure(table: Table) -> None:
    driver = installation.activate(MONITORD)
    for directory in ("bin", "proc", "sys", "dev", ".oldroot"):
        os.makedirs(os.path.join(ROOT, directory))
    shutil.copy("/bin/busybox", f"{ROOT}/bin/sleep")
    connection = libvirt.open(bare.URI)
    names: list[str] = []
    before: dict[str, float] = {}
    try:
        for count in (1, MANY):
            while len(names) < count:
                names.append(f"one-{2000 + len(names)}")
                with open(bare.domain(names[-1], ROOT, "/bin/sleep")) as file:
                    connection.createXML(file.read())
            table.heading(f"Probes of 7.x, {count} container{'s' if count > 1 else ''}")
            for name in ("vm/status", "vm/monitor", "vm/snapshot", "host/monitor", "host/system"):
                before[name] = _compare(table, driver, name, names, before.get(name))
    finally:
        connection.close()
        for name in names:
            bare.end(name)


def _compare(table: Table, driver: Driver, probe: str, names: list[str], for_one: float | None) -> float:
    path = f"/var/tmp/one/im/onelxc-probes.d/{probe}/onelxc"

    def ours() -> None:
        # as monitord's client starts them: always the same parent
        bare.run(path, "onelxc", "0", "node1", user=bare.USER)

    if probe == "vm/monitor":
        # virsh has no call for all containers of this driver: one is measured, and taken as often as there are
        first, one = (statistics.median(timed(work) for _ in range(7)) for work in (ours, lambda: memory(names[0])))
        table.row(probe, first, "virsh dommemstat of each", one * len(names))
    elif probe.startswith("vm/"):
        first, _ = table.compare(probe, ours, "virsh list", lambda: bare.virsh("list"), rounds=5)
    else:
        first, _ = table.compare(probe, ours, "virsh nodeinfo", lambda: bare.virsh("nodeinfo"), rounds=5)
    if for_one:
        table.note(f"{'':40}{first / for_one:.2f} times what one container costs")
    return first


def memory(name: str) -> str:
    return bare.virsh("dommemstat", name)
