"""Which images do the tests deploy? Root file systems made on the spot, as archives, kept in a cache.

`busybox_tar` is made in a moment from busybox-static; `one_process_tar` holds one program. The distribution's roots
(systemd, sysvinit) need mmdebstrap and the network, once: `python3 -m tests.support.images` makes what is missing, and
`tests/run` calls it, outside of `tests/alone`.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CACHE = "/var/cache/onelxc-tests"
VERSION = 6
"""To be raised when a recipe changes."""

INITTAB = """\
::sysinit:/etc/init.d/rcS
::respawn:/bin/sleep 86400
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/sync
"""
# a line in /boots for each boot, with the start of process 1, so that one boot is told from another
COUNT_BOOT = """\
#!/bin/sh
echo boot $(cut -d' ' -f22 /proc/1/stat) >> /boots
"""
RCS = """\
#!/bin/sh
/sbin/count-boot
echo "busybox is up"
"""
SUITE = "bookworm"
DISTRIBUTION = {
    "systemd": ("systemd-sysv", "sudo", "iproute2", "procps", "iputils-ping", "passwd", "login"),
    "sysvinit": ("sysvinit-core", "sudo", "iproute2", "procps", "iputils-ping", "passwd", "login"),
}
# shell text that mmdebstrap runs with the root as $1: a line in /boots at each boot
BOOTS = {
    "systemd": """\
cat > "$1/etc/systemd/system/boots.service" <<'END'
[Unit]
Description=count boots
[Service]
Type=oneshot
ExecStart=/sbin/count-boot
[Install]
WantedBy=multi-user.target
END
mkdir -p "$1/etc/systemd/system/multi-user.target.wants"
ln -s ../boots.service "$1/etc/systemd/system/multi-user.target.wants/boots.service"
""",
    # getty has no terminal of its own in a container: it would end and be started again for ever. Not as a script of a
    # runlevel: startpar runs only those that its own list of dependencies knows
    "sysvinit": """\
sed -i /getty/d "$1/etc/inittab"
echo 'bo:2345:once:/sbin/count-boot' >> "$1/etc/inittab"
""",
}


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _cached(name: str, make: Callable[[str], None]) -> str:
    """The path of `name` in the cache; `make(path)` makes what is missing, one process at a time."""
    os.makedirs(CACHE, exist_ok=True)
    path = os.path.join(CACHE, f"{VERSION}-{name}")
    with open(os.path.join(CACHE, f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            make(path + ".new")
            os.rename(path + ".new", path)
    return path


def _write(path: str, text: str, mode: int = 0o644) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, mode)


def busybox_tree(root: str) -> None:
    """A root with busybox as init, and one of each kind of file that an import has to keep."""
    for directory in ("bin", "sbin", "etc/init.d", "dev", "proc", "sys", "tmp", "root", "usr/bin", "var", "home/user"):
        os.makedirs(os.path.join(root, directory))
    os.chmod(os.path.join(root, "tmp"), 0o1777)
    os.chown(os.path.join(root, "home/user"), 1000, 1000)
    busybox = os.path.join(root, "bin/busybox")
    shutil.copy(shutil.which("busybox") or "/bin/busybox", busybox)
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for applet in applets:
        if applet not in ("busybox", "init", "su"):
            os.symlink("busybox", os.path.join(root, "bin", applet))
    os.symlink("../bin/busybox", os.path.join(root, "sbin/init"))
    for applet in ("reboot", "poweroff", "halt"):
        os.symlink("../bin/busybox", os.path.join(root, "sbin", applet))
    _write(os.path.join(root, "etc/inittab"), INITTAB)
    _write(os.path.join(root, "etc/init.d/rcS"), RCS, 0o755)
    _write(os.path.join(root, "sbin/count-boot"), COUNT_BOOT, 0o755)
    _write(os.path.join(root, "etc/passwd"), "root::0:0:root:/root:/bin/sh\nuser::1000:1000::/home/user:/bin/sh\n")
    _write(os.path.join(root, "etc/group"), "root:x:0:\nuser:x:1000:\n")
    _write(os.path.join(root, "etc/shadow"), "root::19000:0:99999:7:::\nuser::19000:0:99999:7:::\n", 0o640)
    # suid: busybox keeps its right only as an applet that needs it, so the suid program is called as `su`
    shutil.copy(busybox, os.path.join(root, "usr/bin/sudo"))
    os.chmod(os.path.join(root, "usr/bin/sudo"), 0o4755)
    os.link(os.path.join(root, "usr/bin/sudo"), os.path.join(root, "bin/su"))
    shutil.copy(busybox, os.path.join(root, "usr/bin/ping"))
    _run("setcap", "cap_net_raw+ep", os.path.join(root, "usr/bin/ping"))
    _write(os.path.join(root, "etc/attributes"), "acl and xattr\n")
    os.setxattr(os.path.join(root, "etc/attributes"), "user.test", b"kept")
    _run("setfacl", "-m", "u:1000:rw", os.path.join(root, "etc/attributes"))
    with open(os.path.join(root, "var/sparse"), "wb") as sparse:
        sparse.truncate(8 << 20)
    os.mknod(os.path.join(root, "dev/null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))


def tar(tree: str, path: str, *options: str) -> None:
    """`tree` as an archive with every attribute. The compression is given as an option of tar (`--gzip`)."""
    _run("tar", "-C", tree, "--create", "--file", path, "--numeric-owner", "--sparse", "--acls", "--xattrs",
         "--xattrs-include=*", *options, ".")  # fmt: skip


def _from_tree(build: Callable[[str], None], *options: str) -> Callable[[str], None]:
    def make(path: str) -> None:
        # the tree needs trusted xattrs and devices, which every file system of a Linux host has
        with tempfile.TemporaryDirectory(dir=CACHE) as tree:
            os.chmod(tree, 0o755)
            build(tree)
            tar(tree, path, *options)

    return make


def busybox_tar() -> str:
    """A gzip'ed archive: boots in a moment, powers off on SIGUSR2, reboots on SIGTERM, has all applets."""
    return _cached("busybox.tar.gz", _from_tree(busybox_tree, "--gzip"))


def _one_process_tree(root: str) -> None:
    busybox_tree(root)
    os.unlink(os.path.join(root, "sbin/init"))
    _write(os.path.join(root, "sbin/init"), "#!/bin/sh\n/sbin/count-boot\nexec /bin/sleep 86400\n", 0o755)


def one_process_tar() -> str:
    """Its init is one plain process, `sleep`, which ignores every signal but SIGKILL, as process 1 does by default."""
    return _cached("process.tar.gz", _from_tree(_one_process_tree, "--gzip"))


def distribution_tar(init: str) -> str:
    """Debian with `init` ("systemd" or "sysvinit"), sudo, ping; /boots counts boots there too."""

    def make(path: str) -> None:
        raw = path + ".tar"
        script = f'cat > "$1/sbin/count-boot" <<\'END\'\n{COUNT_BOOT}END\nchmod 755 "$1/sbin/count-boot"\n'
        hook = script + BOOTS[init]
        user = 'echo "root:x" | chroot "$1" chpasswd; chroot "$1" useradd -m -u 1000 user'
        sudo = 'echo "user ALL=(ALL) NOPASSWD: ALL" > "$1/etc/sudoers.d/user"'
        _run("mmdebstrap", "--quiet", "--variant=essential", '--aptopt=Acquire::Languages "none"',
             "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
             "--dpkgopt=path-exclude=/usr/share/locale/*", f"--include={','.join(DISTRIBUTION[init])}",
             f"--customize-hook={hook.strip()}", f"--customize-hook={user}", f"--customize-hook={sudo}",
             SUITE, raw)  # fmt: skip
        with open(path, "wb") as packed:
            subprocess.run(["gzip", "-1", "-c", raw], check=True, stdout=packed)
        os.unlink(raw)

    return _cached(f"{init}-{SUITE}-{platform.machine()}.tar.gz", make)


def ext4(path: str, tree: str, size_mb: int = 64) -> str:
    """A raw image with an ext4 file system that holds `tree`."""
    with open(path, "wb") as image:
        image.truncate(size_mb << 20)
    _run("mkfs.ext4", "-q", "-F", "-d", tree, path)
    return path


def _busybox_ext4(path: str) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as tree:
        os.chmod(tree, 0o755)
        busybox_tree(tree)
        ext4(path, tree)


def busybox_ext4() -> str:
    """A raw ext4 image of 64 MB with the busybox root; copy it, never start it."""
    return _cached("busybox.ext4", _busybox_ext4)


def main() -> int:
    busybox_tar()
    one_process_tar()
    busybox_ext4()
    with ThreadPoolExecutor() as pool:
        list(pool.map(distribution_tar, sys.argv[1:] or DISTRIBUTION))
    return 0


if __name__ == "__main__":
    sys.exit(main())
