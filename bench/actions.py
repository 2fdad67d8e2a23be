"""deploy, poll, shutdown, cancel and reboot, beside tar and virsh."""

from __future__ import annotations

import os

from bench import bare
from bench.table import Table
from tests.support import images, installation
from tests.support.frontends import PULL
from tests.support.vms import HOST, Vm

ROOT = "/var/lib/one/bare"


def measure(table: Table) -> None:
    driver = installation.activate(PULL)
    archive = images.busybox_tar()
    table.heading(f"A busybox root, {os.path.getsize(archive) >> 10} KiB packed, as OpenNebula 3.2.1 calls the actions")
    state = {"id": 1000}
    live: list[Vm] = []

    def new_vm() -> Vm:
        state["id"] += 1
        one = Vm(driver, state["id"], {}, {})
        one.add_disk(archive)
        return one

    def ended() -> None:
        while live:
            live.pop().end()
        bare.end("bare")

    def first() -> None:
        live.append(new_vm())
        live[-1].deployed()

    def bare_first() -> None:
        bare.unpack(archive, ROOT)
        bare.virsh("create", bare.domain("bare", ROOT))

    def cleaned() -> None:
        ended()
        bare.remove(ROOT)

    drop_cache()
    table.compare("deploy, an archive never seen", lambda: (drop_cache(), first()), "tar -x, virsh create", bare_first,
                  between=cleaned, rounds=5)  # fmt: skip
    table.compare(
        "deploy, an archive seen before", first, "tar -x, virsh create", bare_first, between=cleaned, rounds=5
    )

    bare.unpack(archive, ROOT)
    xml = bare.domain("bare", ROOT)
    one = new_vm()
    one.deployed()
    one.act("cancel").ok()
    table.compare("deploy again (restart, resume)", one.deployed, "virsh create", lambda: bare.virsh("create", xml),
                  between=lambda: (one.act("cancel").ok(), bare.end("bare")), rounds=5)  # fmt: skip

    def both_run() -> None:
        one.deployed()
        try:
            bare.virsh("create", xml)
        except RuntimeError:
            pass

    both_run()
    one.booted()
    table.compare(
        "poll", lambda: one.act("poll").ok(), "virsh dominfo", lambda: bare.virsh("dominfo", "bare"), rounds=9
    )
    table.compare("cancel", lambda: one.act("cancel").ok(), "virsh destroy", lambda: bare.virsh("destroy", "bare"),
                  between=both_run, rounds=5)  # fmt: skip
    one.booted()
    table.compare("host probe", lambda: driver.probe("lxc.d/onelxc", "lxc", 0, HOST).ok(), "virsh nodeinfo",
                  lambda: bare.virsh("nodeinfo"), rounds=9)  # fmt: skip
    table.compare("reaper", lambda: driver.probe("lxc.d/onelxc-reap", "lxc", 0, HOST).ok(), "virsh list",
                  lambda: bare.virsh("list"), rounds=9)  # fmt: skip
    one.end()
    bare.end("bare")
    bare.remove(ROOT)


def drop_cache() -> None:
    """Forget imported images."""
    bare.run("/usr/lib/onelxc/onelxc-root", "cache", "empty")
