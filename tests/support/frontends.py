"""What does an OpenNebula front-end look like on disk? Directories and stand-ins for what install.sh looks at.

Laid out after OpenNebula's own install.sh at release-3.2.1 and release-7.4.0, self-contained (ONE_LOCATION). The
stand-ins hold only what is looked at: marks, versions, names, modes. Then `install.sh` runs, and the remotes are
brought to the host the way each generation does.
"""

from __future__ import annotations

import os
import shutil
import subprocess

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PULL = "3.2.1"
MONITORD = "7.4.0"
DRIVERS = {PULL: "lxc", MONITORD: "onelxc"}
"""The directory below vmm/ in each generation."""

FRAMED_COMMON = """\
# stand-in for scripts_common.sh
error_message()
{
    (
        echo "ERROR MESSAGE --8<------"
        echo "$1"
        echo "ERROR MESSAGE ------>8--"
    ) 1>&2
}
"""
PLAIN_COMMON = """\
# stand-in for scripts_common.sh
error_message()
{
    echo "$1" 1>&2
}
"""
GENERIC_PROBES = {
    "host/system": ("architecture.sh", "cpu.sh", "name.sh", "numa_host.rb", "pci.rb", "version.sh", "monitor_ds.rb"),
    "host/monitor": ("linux_usage.rb", "numa_usage.rb", "monitor_ds.rb", "nfs_diagnostics.rb"),
    "host/beacon": ("date.sh", "monitord-client-shepherd.sh"),
    "vm/monitor": ("poll.rb", "monitor_ds_vm.rb"),
    "vm/status": ("state.rb",),
    "vm/snapshot": ("recommended.rb",),
    "vm/execution": ("execution.rb",),
}


def _put(path: str, text: str, mode: int = 0o644) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, mode)


def lay_out(location: str, version: str) -> None:
    """A self-contained front-end of `version` in `location`, owned by whoever calls."""
    remotes = os.path.join(location, "var/remotes")
    _put(os.path.join(location, "etc/oned.conf"), "# stand-in\n")
    if version == PULL:
        _put(os.path.join(remotes, "scripts_common.sh"), FRAMED_COMMON)
        _put(os.path.join(location, "etc/vmm_exec/vmm_exec_kvm.conf"), "# stand-in\n")
        _put(os.path.join(location, "lib/ruby/OpenNebula.rb"), f"# stand-in\nVERSION = '{version}'\n")
        _put(os.path.join(remotes, "im/run_probes"), "#!/bin/bash\n", 0o755)
        _put(os.path.join(remotes, "im/kvm.d/cpu.sh"), "#!/bin/sh\n", 0o755)
        _put(os.path.join(remotes, "vmm/kvm/deploy"), "#!/bin/bash\n", 0o755)
        return
    _put(os.path.join(location, "etc/monitord.conf"), "# stand-in\n")
    _put(os.path.join(remotes, "VERSION"), version + "\n")
    _put(os.path.join(remotes, "scripts_common.sh"), PLAIN_COMMON)
    _put(os.path.join(location, "lib/ruby/opennebula/version.rb"), f"# stand-in\nVERSION = '{version}'\n")
    _put(os.path.join(location, "lib/mads/one_vmm_exec.rb"), "# stand-in\n", 0o755)
    _put(os.path.join(remotes, "im/run_monitord_client"), "#!/bin/bash\n", 0o755)
    for driver in ("kvm", "lxc"):
        _put(os.path.join(remotes, f"vmm/{driver}/deploy"), "#!/bin/bash\n", 0o755)
        _put(os.path.join(remotes, f"im/{driver}.d/monitord-client_control.sh"), "#!/bin/bash\n", 0o755)
        _put(os.path.join(remotes, f"im/{driver}.d/monitord-client.rb"), "#!/usr/bin/env ruby\n", 0o755)
        for directory, names in GENERIC_PROBES.items():
            for name in names:
                shell = "#!/bin/sh\n" if name.endswith(".sh") else "#!/usr/bin/env ruby\n"
                _put(os.path.join(remotes, f"im/{driver}-probes.d", directory, name), shell, 0o755)
        _put(os.path.join(remotes, f"etc/vmm/{driver}/{driver}rc"), "# stand-in\n")
        _put(os.path.join(remotes, f"etc/im/{driver}-probes.d/probe_db.conf"), "# stand-in\n")
    _put(os.path.join(remotes, "etc/im/kvm-probes.d/pci.conf"), "# stand-in\n")
    _put(os.path.join(remotes, "im/lib/probe_db.rb"), "# stand-in\n")


def install(location: str, *options: str) -> str:
    """install.sh on the front-end in `location`; what it printed."""
    done = subprocess.run(
        [os.path.join(REPOSITORY, "install.sh"), "front-end", "-d", location, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def push(location: str, version: str, destination: str) -> None:
    """The remotes to the host: 3.2.1's `scp -r` follows links and adds, 7.4.0's `rsync -LRaz --delete` makes equal."""
    if version == MONITORD:
        shutil.rmtree(destination, ignore_errors=True)
    shutil.copytree(os.path.join(location, "var/remotes"), destination, symlinks=False, dirs_exist_ok=True)
