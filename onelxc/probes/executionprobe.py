"""Which commands in containers have ended, and how? vm/execution, every five seconds; each is told once.

sudo is asked only when there is something to tell: it writes each call into the host's log.
"""

from __future__ import annotations

from onelxc import executions, helperinfo


def run() -> str:
    """vm/execution's text, in the words of KVM's (im/lib/kvm_qemu_ga.rb, vm_to_exec)."""
    if not executions.pending():
        return ""
    return "".join(
        f'VM = [ ID="{vm["id"]}", PID="{vm["pid"]}", STATUS="{vm["status"]}", RETURN_CODE="{vm["code"]}",'
        f' STDOUT="{vm["stdout"]}", STDERR="{vm["stderr"]}" ]\n'
        for vm in helperinfo.ask("executions")["vms"]
    )
