"""What would one do by hand? tar, virsh, and a directory as the root file system: the measure for all of ours."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time

import libvirt

URI = "lxc:///"
USER = "oneadmin"


def run(*argv: str, user: str = "") -> str:
    """stdout of a program that has to succeed, as root or as `user`."""
    account = pwd.getpwnam(user) if user else None
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=os.getgrouplist(user, account.pw_gid) if account else None,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stderr or done.stdout}")
    return done.stdout


def virsh(*argv: str) -> str:
    """As oneadmin, as a shell script in place of the driver would."""
    return run("virsh", "-q", "-c", URI, *argv, user=USER)


def unpack(archive: str, directory: str) -> None:
    """As root, as it has to be for owners to be kept."""
    os.makedirs(directory)
    run("tar", "-x", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-f", archive, "-C", directory)


def domain(name: str, root: str, init: str = "/sbin/init", memory_kib: int = 65536) -> str:
    """A file with the smallest domain that can be."""
    path = f"/tmp/{name}.xml"
    arguments = "<initarg>1000000</initarg>" if init.endswith("sleep") else ""
    with open(path, "w") as file:
        file.write(
            f"<domain type='lxc'><name>{name}</name><memory unit='KiB'>{memory_kib}</memory><vcpu>1</vcpu>"
            f"<features><privnet/></features><os><type>exe</type><init>{init}</init>{arguments}</os><devices>"
            f"<filesystem type='mount'><source dir='{root}'/><target dir='/'/></filesystem><console type='pty'/>"
            "</devices></domain>"
        )
    os.chmod(path, 0o644)
    return path


def end(name: str) -> None:
    """Kill its init, and wait until the domain is gone: destroy() alone takes two seconds. It is for those that libvirt
    9 has lost while it started them, which have no init for ever.
    """
    libvirt.registerErrorHandler(lambda *_: None, None)
    connection = libvirt.open(URI)
    patience = time.monotonic() + 2
    try:
        found = connection.lookupByName(name)
        while True:
            try:
                if time.monotonic() > patience:
                    found.destroy()
                else:
                    found.sendProcessSignal(1, 9)
            except libvirt.libvirtError as error:
                # others than this one: the container was just made, or is just ending
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    return
            time.sleep(0.005)
    except libvirt.libvirtError:
        pass
    finally:
        connection.close()


def remove(directory: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
