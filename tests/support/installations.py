"""OpenNebula installations for tests: directories, names and modes as OpenNebula's own install.sh makes them.

The contents are the tests' own. Sources of the layout: install.sh at release-3.2.1 and release-7.4.0.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

FRAME = "echo ERROR MESSAGE --8<------\n"

PULL = {
    "etc/oned.conf": 0o644,
    "etc/vmm_exec/vmm_exec_kvm.conf": 0o640,
    "lib/mads/one_vmm_exec": 0o755,
    "lib/ruby/cli/one_helper.rb": 0o644,
    "var/remotes/scripts_common.sh": 0o755,
    "var/remotes/scripts_common.rb": 0o644,
    "var/remotes/im/run_probes": 0o755,
    "var/remotes/im/kvm.d/kvm.rb": 0o755,
    "var/remotes/vmm/kvm/deploy": 0o755,
    "var/remotes/vmm/kvm/cancel": 0o755,
    "var/remotes/vmm/kvm/kvmrc": 0o644,
}

MONITORD = {
    "etc/oned.conf": 0o644,
    "etc/monitord.conf": 0o644,
    "lib/ruby/opennebula/version.rb": 0o644,
    "var/remotes/VERSION": 0o644,
    "var/remotes/scripts_common.sh": 0o644,
    "var/remotes/etc/im/kvm-probes.d/pci.conf": 0o640,
    "var/remotes/etc/im/lxc-probes.d/pci.conf": 0o640,
    "var/remotes/etc/vmm/kvm/kvmrc": 0o640,
    "var/remotes/etc/vmm/lxc/lxcrc": 0o640,
    "var/remotes/im/run_monitord_client": 0o755,
    "var/remotes/im/kvm.d/monitord-client.rb": 0o755,
    "var/remotes/im/kvm.d/monitord-client_control.sh": 0o755,
    "var/remotes/im/kvm-probes.d/host/beacon/monitord-client-shepherd.sh": 0o755,
    "var/remotes/im/kvm-probes.d/host/monitor/linux_usage.rb": 0o755,
    "var/remotes/im/kvm-probes.d/host/monitor/numa_usage.rb": 0o755,
    "var/remotes/im/kvm-probes.d/host/system/architecture.sh": 0o755,
    "var/remotes/im/kvm-probes.d/host/system/machines_models.rb": 0o755,
    "var/remotes/im/kvm-probes.d/host/system/monitor_ds.rb": 0o755,
    "var/remotes/im/kvm-probes.d/host/system/nfs_automounted.rb": 0o755,
    "var/remotes/im/kvm-probes.d/host/system/numa_host.rb": 0o755,
    "var/remotes/im/kvm-probes.d/host/system/pci.rb": 0o755,
    "var/remotes/im/kvm-probes.d/vm/monitor/monitor_ds_vm.rb": 0o755,
    "var/remotes/im/kvm-probes.d/vm/monitor/poll.rb": 0o755,
    "var/remotes/im/kvm-probes.d/vm/status/state.rb": 0o755,
    "var/remotes/im/lxc.d/monitord-client.rb": 0o755,
    "var/remotes/im/lxc.d/monitord-client_control.sh": 0o755,
    "var/remotes/im/lxc-probes.d/host/system/linux_host.rb": 0o755,
    "var/remotes/im/lxc-probes.d/host/system/pci.rb": 0o755,
    "var/remotes/im/lxc-probes.d/vm/monitor/poll.rb": 0o755,
    "var/remotes/im/lxc-probes.d/vm/status/state.rb": 0o755,
    "var/remotes/im/common.d/version.sh": 0o755,
    "var/remotes/vmm/kvm/deploy": 0o755,
    "var/remotes/vmm/lxc/deploy": 0o755,
    "var/remotes/vmm/lxc/cancel": 0o755,
    "var/remotes/vmm/lxc/prereconfigure": 0o755,
}

MONITORD_LINKS = {
    "var/remotes/im/kvm-probes.d/host/system/version.sh": "../../../common.d/version.sh",
    "var/remotes/im/lxc-probes.d/host/system/version.sh": "../../../common.d/version.sh",
    "var/remotes/im/qemu-probes.d": "kvm-probes.d",
}

ONEADMIN = 9869


def pull(root: Path) -> Path:
    """A self-contained OpenNebula 3.2.1 in `root`."""
    _make(root, PULL)
    (root / "var/remotes/scripts_common.sh").write_text(FRAME)
    (root / "lib/ruby/cli/one_helper.rb").write_text("ONE_VERSION=<<EOT\nOpenNebula 3.2.1\nEOT\n")
    return _owned(root)


def monitord(root: Path, version: str = "7.4.0", *, framed: bool = False) -> Path:
    """A self-contained OpenNebula 6 or 7 in `root`."""
    _make(root, MONITORD)
    for path, target in MONITORD_LINKS.items():
        (root / path).symlink_to(target)
    for name in ("kvm", "lxc"):
        for directory in ("host/beacon", "host/monitor", "host/system", "vm/monitor", "vm/status"):
            (root / "var/remotes/im" / f"{name}-probes.d" / directory).mkdir(parents=True, exist_ok=True)
    (root / "var/remotes/VERSION").write_text(version + "\n")
    (root / "var/remotes/scripts_common.sh").write_text(FRAME if framed else "# errors go to stderr\n")
    return _owned(root)


PACKAGED = {"etc": "etc/one", "lib": "usr/lib/one", "var/remotes": "var/lib/one/remotes"}


def packaged(root: Path, kind: Callable[[Path], Path]) -> None:
    """The same as packages lay it out below `root`: configuration is root's, readable by oneadmin's group."""
    made = kind(root / "made")
    for ours, theirs in PACKAGED.items():
        (root / theirs).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made / ours, root / theirs)
    shutil.rmtree(made)
    for path in (root / "etc/one", *(root / "etc/one").rglob("*")):
        os.lchown(path, 0, ONEADMIN)
        path.chmod(0o750 if path.is_dir() else 0o640)


def reachable(directory: Path) -> Path:
    """Let other users pass to it: pytest's own directories are root's alone."""
    for path in (directory, *directory.parents):
        if path.stat().st_uid == os.getuid() and not path.stat().st_mode & 0o001:
            path.chmod(0o755)
    return directory


def snapshot(root: Path, *, but: str = "") -> dict[str, str]:
    """Every path below `root` with kind, mode, owner, link target and contents; without paths that hold `but`."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if but and but in name:
            continue
        seen = path.lstat()
        what = os.readlink(path) if path.is_symlink() else path.read_bytes().hex() if path.is_file() else ""
        found[name] = f"{stat.filemode(seen.st_mode)} {seen.st_uid}:{seen.st_gid} {what}"
    return found


def _make(root: Path, files: dict[str, int]) -> None:
    for name, mode in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# OpenNebula's own {name}\n")
        path.chmod(mode)


def _owned(root: Path) -> Path:
    if os.getuid() == 0:
        for path in (root, *root.rglob("*")):
            os.lchown(path, ONEADMIN, ONEADMIN)
    return root
