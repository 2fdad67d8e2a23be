"""Roots that change while the driver works: what a tenant with root in a container keeps doing from inside.

`MOODS` are shell texts that the container's init runs for ever beside an ordinary busybox init: each does one kind of
mischief in a loop, so that an action meets it at any moment. `ONCE` are things done a single time, before an action or
a reboot. All are ended with the container.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.hostile.witness import CANARY, SECRET_FILE
from tests.support import images
from tests.support.diskimages import sh

PLACES = "proc sys dev .oldroot media mnt run context etc tmp var/run srv home"
"""Where the driver or libvirt puts or reads something."""

MOODS: dict[str, str] = {
    "swaps its directories for links": f"""
for place in media mnt srv context run var/run home tmp etc; do
    rm -rf /$place.away; mv /$place /$place.away 2>/dev/null; ln -s {CANARY} /$place 2>/dev/null
    rm -f /$place; ln -s /proc/1/root /$place 2>/dev/null; rm -f /$place
    ln -s /.oldroot/etc /$place 2>/dev/null; rm -f /$place
    mv /$place.away /$place 2>/dev/null || mkdir -p /$place
done""",
    "makes its special places links": """
for place in .oldroot proc sys dev; do
    umount -l /$place 2>/dev/null; rmdir /$place 2>/dev/null; rm -f /$place 2>/dev/null
    ln -s media/x /$place 2>/dev/null
done
mkdir -p /media/x; rm -f /run/initctl /dev/initctl; ln -s /proc/sys/kernel/hostname /run/initctl
ln -s /proc/1/root/etc/hostname /dev/initctl""",
    "mounts over everything": """
for place in media mnt srv run etc proc/1 sys/class/net dev/pts media/later; do
    mkdir -p /$place; mount -t tmpfs none /$place; mount --bind / /$place; mount -t proc none /$place
done 2>/dev/null
i=0; for place in media mnt srv run etc proc/1 sys/class/net dev/pts media/later; do
    while umount -l /$place && [ $i -lt 40 ]; do i=$((i + 1)); done
done 2>/dev/null""",
    "fills its mount table": """
mkdir -p /m; mount -t tmpfs none /m; mount --make-shared /m; i=0
while [ $i -lt 200 ]; do mkdir -p /m/$i; mount -t tmpfs none /m/$i || break; i=$((i + 1)); done 2>/dev/null
sleep 1; umount -l /m 2>/dev/null""",
    "gives files odd kinds and names": r"""
for file in etc/os-release etc/hostname etc/passwd etc/group run/initctl dev/initctl proc.x media/later/x; do
    rm -rf /$file; mkfifo /$file; rm -rf /$file; mkdir -p /$file; rm -rf /$file; ln -s /dev/zero /$file
    rm -rf /$file; ln -s /$file /$file; rm -rf /$file; printf '\033[2J\233\n"]' > /$file
done 2>/dev/null
mkdir -p "/media/$(printf '\033[2J\233')" "/media/one-disk.1/$(printf 'a\nb')" """,
    "names itself for a terminal": r"""
hostname "$(printf '\033[2J')" 2>/dev/null; hostname x"$i"
sh -c 'printf "\033[2J\033]0;evil\007\2331m one-1 ERROR: \n\r" > /dev/console' 2>/dev/null
cp /bin/busybox "/tmp/$(printf '\033[2J\n) R 0 0')"
"/tmp/$(printf '\033[2J\n) R 0 0')" sleep 0.01 2>/dev/null; sleep 0.02""",
    "makes interfaces": r"""
i=$((i + 1)); ip link add "d$i" type dummy 2>/dev/null; ip link add eth7 type veth peer name eth8 2>/dev/null
ip link set d$i name "$(printf 'e\033[2J')" 2>/dev/null; ip link set d$i name "a;id" 2>/dev/null
ip link set eth0 name lo0 2>/dev/null; ip link set lo0 name eth0 2>/dev/null
ip addr add 10.0.0.$i/8 dev eth7 2>/dev/null
ip link set lo down; ip link set lo up; ip link del d$i 2>/dev/null; ip link del eth7 2>/dev/null; sleep 0.02""",
    "makes control groups": """
for top in /sys/fs/cgroup/* /sys/fs/cgroup; do
    for below in $top $top/onelxc.slice $top/onelxc.slice/* $top/machine $top/machine/* $top/onelxc-*; do
        mkdir -p $below/evil/er/est && echo $$ > $below/evil/cgroup.procs
        echo 1 > $below/notify_on_release; echo /srv/canary/evil > $below/release_agent
        echo max > $below/memory.max; echo -1 > $below/memory.limit_in_bytes; echo 1 > $below/cgroup.freeze
        rmdir $below/evil/er/est $below/evil/er $below/evil
    done
done 2>/dev/null
cd /sys/fs/cgroup/systemd/onelxc.slice/onelxc-* 2>/dev/null && i=0 && while [ $i -lt 60 ]; do
    mkdir nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn 2>/dev/null
    cd nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn || break; i=$((i + 1))
done; cd /; sleep 0.05""",
    "uses up what it has": """
dd if=/dev/zero of=/fill bs=64k count=2000 2>/dev/null; rm -f /fill
mkdir -p /many; i=0; while [ $i -lt 300 ]; do : > /many/$i; i=$((i + 1)); done 2>/dev/null; rm -rf /many
tail -c 40m /dev/zero > /dev/null & sleep 0.1; kill $! 2>/dev/null""",
    "talks without end": r"""
dd if=/dev/zero bs=64k count=20 2>/dev/null | tr '\0' '\033' > /dev/console
yes "$(printf '\2332J')" | head -n 2000 > /dev/console""",
    "breeds": """
i=0; while [ $i -lt 30 ]; do (trap '' TERM HUP INT; sleep 3) & i=$((i + 1)); done 2>/dev/null; sleep 1""",
    "reboots itself": "sleep 1; kill -TERM 1; sleep 5",
}

ONCE: dict[str, str] = {
    "ln oldroot": "mkdir -p /media/x; rmdir /.oldroot; ln -s media/x /.oldroot",
    "ln proc": "umount -l /proc; rmdir /proc; ln -s /sys /proc",
    "ln run": f"rm -rf /run; ln -s {CANARY} /run",
    "ln media": "rm -rf /media; ln -s / /media",
    "ln context": "rm -rf /context; ln -s /proc /context",
    "ln etc": f"mv /etc /etc.away; ln -s {CANARY} /etc",
    "ln init": f"rm -f /sbin/init; ln -s {SECRET_FILE} /sbin/init",
    "initctl": "mkdir -p /run; rm -f /run/initctl /dev/initctl; ln -s /proc/sys/kernel/hostname /run/initctl",
    "file oldroot": "rmdir /.oldroot; echo x > /.oldroot",
    "fifo os-release": "rm -f /etc/os-release; mkfifo /etc/os-release",
    "no sh": "mv /bin/sh /bin/sh.away",
    "read-only": "mount -o remount,ro /",
    "unmount all": "umount -a -l -f",
    "private all": "mount --make-rprivate /",
    "shared all": "mount --make-rshared /",
    "kill all": "kill -9 -1",
    "stop all": "kill -STOP -1",
    "exit": "kill -TERM 1",
    "net down": "ip link set eth0 down; ip link del eth0",
    "new namespaces": "unshare -m -n -p -i -u sleep 100 &",
    "deep": "cd /; i=0; while [ $i -lt 400 ]; do mkdir -p dddddddddddddddd; cd dddddddddddddddd; i=$((i + 1)); done",
    "no space": "dd if=/dev/zero of=/fill bs=1M",
    "immutable": "chattr +i /etc /media /sbin; chattr +a /",
    "odd modes": "chmod 0 / /etc /proc /dev /media /sbin /bin/sh; chmod 7777 /root",
    "odd owners": "chown -R 65534:65534 /etc /media; chown 65533:65533 /",
}


def tree(path: Path, *moods: str) -> Path:
    """The busybox root whose init is followed by each of `moods`, again and again."""
    path.mkdir()
    path.chmod(0o755)
    images.busybox_tree(str(path))
    for name in ("media", "mnt", "srv", "run"):
        (path / name).mkdir(exist_ok=True)
    for number, mood in enumerate(moods):
        script = path / f"sbin/mood{number}"
        script.write_text(f"#!/bin/sh\ni=0\nwhile :; do\n{MOODS[mood]}\nsleep 0.02\ndone\n")
        script.chmod(0o755)
        with open(path / "etc/inittab", "a") as file:
            file.write(f"::respawn:/sbin/mood{number}\n")
    return path


def image(path: Path, *moods: str, size_mb: int = 24) -> str:
    """It as a raw ext4 image, which is what live snapshots and growth want."""
    made = tree(path.with_suffix(".tree"), *moods)
    with open(path, "wb") as file:
        file.truncate(size_mb << 20)
    sh("mkfs.ext4", "-q", "-F", "-d", str(made), str(path))
    os.chmod(path, 0o644)
    return str(path)
