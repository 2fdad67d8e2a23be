"""Confines containers by AppArmor where the host has it. host.conf can turn that off (APPARMOR).

The profiles are OneLXC's own (etc/apparmor.d/onelxc), not the one that libvirt makes from its template: see
docs/decisions/0031. A domain's <emulator> is then our controller, which puts libvirt's into a profile; its exec of the
container's init leads into the container's. So each start is confined, and the host's other containers are not touched.
"""

from __future__ import annotations

import os

from onelxc import command, kernelfile
from onelxc.errors import CommandError, HypervisorError

ENABLED = "/sys/module/apparmor/parameters/enabled"
LOADED = "/sys/kernel/security/apparmor/profiles"
SOURCE = "/etc/apparmor.d/onelxc"
CONTROLLER = "/usr/sbin/onelxc-controller"
PRIVILEGED = "-privileged"
"""Ends the name of the controller, and of its profile, for a privileged container."""


def available() -> bool:
    """Whether this kernel confines anything, and `install.sh node` has put the profiles here."""
    return kernelfile.text(ENABLED).strip() == "Y" and os.path.exists(SOURCE) and os.path.exists(CONTROLLER)


def controller(wanted: bool, privileged: bool) -> str:
    """The domain's <emulator>; "" for libvirt's own. HypervisorError if the profiles cannot be loaded."""
    if not wanted or not available():
        return ""
    path = CONTROLLER + (PRIVILEGED if privileged else "")
    if not loaded(f"libvirt-{os.path.basename(path)}"):
        load()
    return path


def loaded(profile: str) -> bool:
    return any(line.split(" ")[0] == profile for line in kernelfile.text(LOADED).splitlines())


def load() -> None:
    """Where AppArmor's own service did not, as after a first installation."""
    try:
        command.run(["apparmor_parser", "-r", SOURCE], timeout_s=60)
    except CommandError as error:
        raise HypervisorError(
            f"Cannot load the AppArmor profiles of {SOURCE}: {(error.stderr or str(error)).strip().splitlines()[-1]};"
            ' mend it, or set APPARMOR = "no" in host.conf'
        ) from error


def label(pid: int) -> str:
    """The profile that a process is in, "" for none."""
    for name in ("apparmor/current", "current"):
        text = kernelfile.text(f"/proc/{pid}/attr/{name}").strip("\0\n ")
        if text:
            return "" if text == "unconfined" else text.rpartition(" (")[0] or text
    return ""


def enter_at_exec(profile: str) -> None:
    """What this process executes next is in that profile."""
    for name in ("apparmor/exec", "exec"):
        try:
            fd = os.open(f"/proc/self/attr/{name}", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.write(fd, f"exec {profile}".encode())
            return
        finally:
            os.close(fd)
    raise HypervisorError(f"Cannot enter the AppArmor profile {profile}")
