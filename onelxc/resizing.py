"""How does a running container get other limits of CPU and memory? The policy of `resize`.

The same values that `domainxml` gives a new container, as parameters of the domain, which libvirt keeps through a
reboot from inside and through its own restart. Memory first, since that is what can fail.
"""

from __future__ import annotations

from onelxc import cgroup, domainxml
from onelxc.errors import HypervisorError, TemplateError
from onelxc.hypervisor import Domain
from onelxc.model import Prepared, Vm

ROOM_KIB = 4 * 1024
"""What is left to the container between its use and its new limit: at the limit itself the kernel kills at once."""


def check_memory(domain: Domain, vm: Vm) -> None:
    """TemplateError for a limit below what is in use: version 2 would take it, and kill to get there."""
    controller = domain.controller_pid()
    if controller is None:
        return
    used = cgroup.memory_kib(cgroup.of(controller, cgroup.mounts()))
    if vm.memory_kib < used + ROOM_KIB:
        raise TemplateError(
            f"Cannot resize VM {vm.vm_id}: it uses {used // 1024} MB of memory, which do not fit into"
            f" {vm.memory_kib // 1024} MB"
        )


def resize(domain: Domain, before: Vm, vm: Vm, prepared: Prepared) -> None:
    """Give the container the limits of `vm`, or leave it those that it had `before`."""
    check_memory(domain, vm)
    _set_memory(domain, vm, prepared)
    try:
        _set_cpu(domain, vm, prepared)
    except HypervisorError:
        _set_memory(domain, before, prepared)
        raise


def apply(domain: Domain, vm: Vm, prepared: Prepared) -> None:
    """Give the container the limits of `vm`, whatever it uses."""
    _set_memory(domain, vm, prepared)
    _set_cpu(domain, vm, prepared)


def _set_memory(domain: Domain, vm: Vm, prepared: Prepared) -> None:
    domain.set_memory(limit_kib=vm.memory_kib, swap_limit_kib=domainxml.swap_hard_limit(vm, prepared))


def _set_cpu(domain: Domain, vm: Vm, prepared: Prepared) -> None:
    domain.set_cpu(
        shares=domainxml.cpu_shares(vm.cpu, prepared.cgroup),
        period_us=domainxml.PERIOD_US,
        quota_us=domainxml.cpu_quota_us(vm.vcpu),
    )
