"""Large images, and I/O inside an unprivileged container, beside tar, the host's own file system and bindfs."""

from __future__ import annotations

import os
import shutil

from bench import bare
from bench.actions import drop_cache
from bench.table import Table
from tests.support import hostconf, images, installation, machine
from tests.support.frontends import MONITORD
from tests.support.vms import Driver, Vm

WORK = "/var/lib/one/bench"
LARGE_MB = 500
STREAM_MB = 1024
FILES = 5000


def measure(table: Table) -> None:
    driver = installation.activate(MONITORD)
    os.makedirs(WORK)
    archive = large_root()
    xfs = mount_xfs()
    try:
        _deploys(table, driver, archive, "ext4", "/var/lib/one/datastores/0")
        if xfs:
            with hostconf.with_line(f'CACHE = [ DIRECTORY = "{xfs}/cache" ]'):  # as host.conf recommends
                _deploys(table, driver, archive, "XFS (reflink)", xfs)
        else:
            table.note("XFS: not measured, mkfs.xfs or the kernel cannot")
        _io(table, driver)
    finally:
        if xfs:
            machine.command("umount", xfs)
        bare.remove(WORK)


def large_root() -> str:
    """A Debian with sysvinit, filled to 500 MB with what this machine has in /usr/lib."""
    tree = f"{WORK}/tree"
    bare.unpack(images.distribution_tar("sysvinit"), tree)
    size = int(bare.run("du", "-sm", tree).split()[0])
    os.makedirs(f"{tree}/srv/fill")
    for number, name in enumerate(sorted(os.listdir("/usr/lib/python3/dist-packages")) * 50):
        if size >= LARGE_MB:
            break
        source = f"/usr/lib/python3/dist-packages/{name}"
        target = f"{tree}/srv/fill/{number}"
        bare.run("cp", "-a", source, target)
        size += int(bare.run("du", "-sm", target).split()[0]) - (os.path.isfile(target))
    archive = f"{WORK}/root.tar.gz"
    bare.run("tar", "-C", tree, "-c", "--use-compress-program=gzip -1", "-f", archive, ".")
    bare.remove(tree)
    return archive


def mount_xfs() -> str:
    """A datastore on XFS, which shares blocks between copies; "" where that cannot be had."""
    if not shutil.which("mkfs.xfs"):
        return ""
    image, point = f"{WORK}/xfs.img", "/var/lib/one/datastores/1"
    bare.run("truncate", "-s", "6G", image)
    os.makedirs(point)
    try:
        bare.run("mkfs.xfs", "-q", "-m", "reflink=1", image)
        bare.run("mount", "-o", "loop", image, point)
    except RuntimeError:
        os.rmdir(point)
        return ""
    bare.run("chown", "oneadmin:oneadmin", point)
    return point


def _deploys(table: Table, driver: Driver, archive: str, kind: str, datastore: str) -> None:
    table.heading(f"A root of {LARGE_MB} MB ({os.path.getsize(archive) >> 20} MB gzip'ed) on {kind}")
    state = {"id": 3000}
    live: list[Vm] = []
    root = f"{datastore}/bare"
    init = "/sbin/init"

    def new_vm() -> Vm:
        state["id"] += 1
        one = Vm(driver, state["id"], {"MEMORY": "512"}, {}, int(os.path.basename(datastore)))
        one.add_disk(archive)
        return one

    def cleaned() -> None:
        while live:
            live.pop().end()
        bare.end("bare")
        bare.remove(root)
        os.sync()

    def bare_first() -> None:
        bare.unpack(archive, root)
        bare.run("sync", "-f", root)

    live.append(new_vm())
    drop_cache()
    table.compare("deploy, an archive never seen", lambda: live[-1].deployed(timeout_s=300), "tar -x, sync", bare_first,
                  rounds=1)  # fmt: skip
    cleaned()
    bare.unpack(archive, root)
    xml = bare.domain("bare", root, init, 512 * 1024)
    for _ in range(3):
        live.append(new_vm())
    waiting = list(live)
    table.compare("deploy, an archive seen before", lambda: waiting.pop().deployed(), "virsh create",
                  lambda: bare.virsh("create", xml), rounds=3, between=lambda: bare.end("bare"))  # fmt: skip
    one = live[0]
    one.act("cancel").ok()
    table.compare("deploy again", one.deployed, "virsh create", lambda: bare.virsh("create", xml), rounds=3,
                  between=lambda: (one.act("cancel").ok(), bare.end("bare")))  # fmt: skip
    cleaned()


def _io(table: Table, driver: Driver) -> None:
    """The same busybox does the same work in the container, on the host's file system, and through bindfs."""
    host = f"{WORK}/io"
    small = f"{WORK}/small"
    os.makedirs(host)
    os.makedirs(small)
    for number in range(FILES):
        with open(f"{small}/{number}", "wb") as file:
            file.write(os.urandom(4096))
    bare.run("tar", "-C", WORK, "-cf", f"{host}/small.tar", "small")
    # room for the files in its page cache, as the host has: reclaiming is not what is compared
    one = Vm(driver, 3900, {"MEMORY": str(3 * STREAM_MB)}, {})
    one.add_disk(images.busybox_tar())
    data = images.ext4(f"{WORK}/data.ext4", host, STREAM_MB * 2 + 512)
    one.add_disk(data, TARGET="/data")
    one.deployed().booted()
    where = {"the host": host}
    if shutil.which("bindfs"):
        through = f"{WORK}/bindfs"
        os.makedirs(through)
        # as OpenNebula's LXC driver maps ids (src/vmm_mad/remotes/lib/lxc/storage_mappers)
        bare.run("bindfs", "--map=" + ":".join(f"{i}/{600100000 + i}" for i in range(50)), host, through)
        where["bindfs"] = through
    try:
        for place, directory in where.items():
            table.heading(f"I/O on a disk of an unprivileged container, beside {place}")
            for what, shell in (
                (f"write {STREAM_MB} MiB, fsync", f"dd if=/dev/zero of=stream bs=1M count={STREAM_MB} conv=fsync"),
                (f"read {STREAM_MB} MiB, cold", "dd if=stream of=/dev/null bs=1M"),
                (f"unpack {FILES} files of 4 KiB, sync", "tar -xf small.tar && sync"),
                (f"remove {FILES} files", "rm -rf small"),
            ):
                table.compare(
                    what,
                    lambda shell=shell: one.inside(f"cd /data && {shell} 2>/dev/null", timeout_s=600),  # type: ignore[misc]
                    place,
                    lambda shell=shell, at=directory: bare.run(  # type: ignore[misc]
                        "busybox", "sh", "-c", f"cd {at} && {_applets(shell)} 2>/dev/null"
                    ),
                    rounds=1 if what.startswith("remove") else 3,
                    between=_forget_pages,
                )
    finally:
        if len(where) > 1:
            machine.command("umount", where["bindfs"])
        one.end()


def _applets(shell: str) -> str:
    """The commands by busybox on the host, too."""
    return " && ".join(f"busybox {part}" for part in shell.split(" && "))


def _forget_pages() -> None:
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
