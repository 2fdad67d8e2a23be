"""Which VM is meant? OpenNebula's XML, of either generation, into the frozen `model.Vm`.

Roots: `<TEMPLATE>` (3.2.1), `<VM>` and `<VMM_DRIVER_ACTION_DATA>` (6.x, 7.x), plain or in base64. Everything is
checked and every policy decided here: defaults, privilege, what is tolerated with a note, what is refused. `domainxml`
then only writes it down. Touches no disk.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from onelxc import template_disks, template_nics
from onelxc.config import Defaults, HostConfig, Privileged
from onelxc.errors import NotSupportedError
from onelxc.fields import Fields, parse_xml
from onelxc.model import Graphics, Vm

RAW_TYPE = "libvirt-lxc"
"""RAW = [ TYPE="libvirt-lxc", DATA="<features>…" ]: a fragment of libvirt's domain XML. Other types are foreign."""

MEMORY_LEAST_MB = 32
"""libvirt's controller lives in the container's memory cgroup: with 20 MB the whole container was seen to end."""

VIEWER_PORT_LEAST = 1024
"""The server of the viewers runs as oneadmin."""

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")
_PROFILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\Z")
_CPUS = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*\Z")


@dataclass(frozen=True)
class Policy:
    """The operator's defaults and the host's rules, by which a template is read."""

    defaults: Defaults = field(default_factory=Defaults)
    host: HostConfig = field(default_factory=HostConfig)


def parse(data: bytes, vm_id: int, vm_dir: str, policy: Policy) -> Vm:
    """The VM of a template. `vm_dir` is its directory on this host; the errors name the VM and the place."""
    return build(root_of(data, vm_id), vm_id, vm_dir, policy)


def root_of(data: bytes, vm_id: int) -> Any:
    """The root element of what came on stdin; TemplateError if it is none of the three."""
    root = parse_xml(data, f"VM {vm_id}")
    if root.tag not in ("TEMPLATE", "VM", "VMM_DRIVER_ACTION_DATA"):
        raise Fields(root, f"VM {vm_id}").error(f"the template begins with <{root.tag}>, not <TEMPLATE> or <VM>")
    return root


def template_of(root: Any, vm_id: int) -> tuple[Fields, Fields, Fields]:
    """TEMPLATE, USER_TEMPLATE and VM of any root. 3.2.1 has the first alone, which then stands for all."""
    where = f"VM {vm_id}"
    if root.tag == "TEMPLATE":
        return Fields(root, where), Fields(root, where), Fields(root, where)
    vm = root if root.tag == "VM" else root.find("VM")
    if vm is None or vm.find("TEMPLATE") is None:
        raise Fields(root, where).error("no TEMPLATE in the XML")
    user = vm.find("USER_TEMPLATE")
    return Fields(vm.find("TEMPLATE"), where), Fields(vm if user is None else user, where), Fields(vm, where)


def build(root: Any, vm_id: int, vm_dir: str, policy: Policy) -> Vm:
    """The VM of a root element."""
    template, user, outer = template_of(root, vm_id)
    _same_id(template, outer, vm_id)
    notes: list[str] = []
    history = outer.all("HISTORY_RECORDS/HISTORY")
    tm_mad = Fields(history[-1], template.where).text("TM_MAD") if history else ""
    disks = template_disks.disks(template, vm_id, vm_dir, tm_mad)
    if not any(disk.kind == "image" for disk in disks):
        raise template.error("no DISK with an image: a container needs one for its root file system")
    for disk in disks:
        if disk.kind == "swap":
            notes.append(f"DISK {disk.disk_id}: swap is not used: containers share the host's")
    _refuse(template, notes)
    cpuset, nodeset = _pinning(template)
    init, arguments = _init(template, policy.defaults)
    cpu = template.number("CPU", policy.defaults.cpu)
    raw = policy.defaults.raw + _raw(template, policy.host, notes)
    return Vm(
        vm_id=vm_id,
        name=" ".join(outer.text("NAME").split()),
        cpu=cpu,
        vcpu=template.whole("VCPU", least=1, most=4096) or policy.defaults.vcpu or math.ceil(cpu),
        memory_kib=_memory_kib(template, policy.defaults),
        swap_kib=_swap_kib(template, user, policy.defaults),
        init=init,
        init_arguments=arguments,
        init_environment=_environment(template),
        arch=_arch(template, policy.defaults),
        uuid=_uuid(template, notes),
        disks=disks,
        context=template_disks.context_disk(template, disks, vm_dir),
        nics=template_nics.nics(template, vm_id, policy.defaults, notes),
        privileged=_privileged(template, user, policy, notes),
        cpuset=cpuset,
        nodeset=nodeset,
        capabilities=policy.defaults.capabilities,
        graphics=_graphics(template, notes),
        raw=raw,
        profiles=_profiles(template, user, policy.defaults),
        notes=tuple(notes),
    )


def _same_id(template: Fields, outer: Fields, vm_id: int) -> None:
    """The id in the XML, where there is one, has to be that of the arguments."""
    for place, name in ((outer, "ID"), (template, "VMID")):
        found = place.whole(name)
        if found is not None and found != vm_id:
            raise template.error(f"the template is that of VM {found}")


def _memory_kib(template: Fields, defaults: Defaults) -> int:
    megabytes = template.whole("MEMORY", "a number of MB", most=1 << 31)
    if megabytes is None:
        megabytes = defaults.memory_mb
    if megabytes < MEMORY_LEAST_MB:
        raise template.error(f"MEMORY is {megabytes} MB: a container needs {MEMORY_LEAST_MB} MB at least")
    return megabytes * 1024


def _swap_kib(template: Fields, user: Fields, defaults: Defaults) -> int:
    """LXC_SWAP (the stock LXC driver's name) or SWAP, in MB, on top of MEMORY."""
    for place, name in ((template, "LXC_SWAP"), (user, "LXC_SWAP"), (template, "SWAP")):
        found = place.whole(name, "a number of MB", most=1 << 31)
        if found is not None:
            return found * 1024
    return defaults.swap_mb * 1024


def _init(template: Fields, defaults: Defaults) -> tuple[str, tuple[str, ...]]:
    """OS/INIT, or OS/BOOT where it is a path (it is `disk0,nic0` in 7.x, `hd` in 3.x), else the operator's."""
    boot = template.text("OS/BOOT")
    text = template.text("OS/INIT", default=boot if boot.startswith("/") else defaults.init)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise template.error(f"OS/INIT cannot be split into words: {error}: {text!r}") from None
    if not words or not words[0].startswith("/"):
        raise template.error(f"OS/INIT is not an absolute path: {text!r}")
    return words[0], tuple(words[1:])


def _environment(template: Fields) -> tuple[tuple[str, str], ...]:
    """OS/INIT_ENV = "A=1 B='two words'"."""
    text = template.text("OS/INIT_ENV")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise template.error(f"OS/INIT_ENV cannot be split into words: {error}: {text!r}") from None
    pairs = []
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not re.match(r"[A-Za-z_][A-Za-z0-9_]*\Z", name):
            raise template.error(f"OS/INIT_ENV is not NAME=value: {word!r}")
        pairs.append((name, value))
    return tuple(pairs)


def _arch(template: Fields, defaults: Defaults) -> str:
    return template.text("OS/ARCH", "LXC/ARCH", default=defaults.arch)


def _uuid(template: Fields, notes: list[str]) -> str:
    text = template.text("OS/UUID")
    if text and not _UUID.match(text):
        notes.append(f"OS/UUID is not a UUID, libvirt makes one: {text!r}")
        return ""
    return text.lower()


def _privileged(template: Fields, user: Fields, policy: Policy, notes: list[str]) -> bool:
    """LXC_UNPRIVILEGED=no, or the operator's default, as far as the host allows it.

    Where it does not, the container runs unprivileged and the log says so: marketplace templates carry the attribute
    for the stock driver's sake, and nearly all images run unprivileged just as well.
    """
    text = user.text("LXC_UNPRIVILEGED", default=template.text("LXC_UNPRIVILEGED")).lower()
    if text in ("no", "false", "0"):
        wanted = True
    elif text in ("yes", "true", "1"):
        wanted = False
    elif text:
        raise template.error(f"LXC_UNPRIVILEGED is neither yes nor no: {text!r}")
    else:
        wanted = policy.defaults.privileged is Privileged.ALWAYS
    if wanted and policy.defaults.privileged is Privileged.NEVER:
        notes.append("LXC_UNPRIVILEGED=no: the operator allows unprivileged containers only, so it runs as one")
        return False
    if wanted and not policy.host.privileged:
        notes.append("LXC_UNPRIVILEGED=no: this host allows unprivileged containers only, so it runs as one")
        return False
    return wanted


def _profiles(template: Fields, user: Fields, defaults: Defaults) -> tuple[str, ...]:
    """LXC_PROFILES: names of the administrator's files, never paths. The helper holds them to host.conf."""
    text = user.text("LXC_PROFILES", default=template.text("LXC_PROFILES"))
    names = list(defaults.profiles) + text.replace(",", " ").split()
    for name in names:
        if not _PROFILE.match(name):
            raise template.error(f"LXC_PROFILES has a name that no profile can have: {name!r}")
    return tuple(dict.fromkeys(names))


def _raw(template: Fields, host: HostConfig, notes: list[str]) -> tuple[str, ...]:
    fragments = []
    for element in template.all("RAW"):
        fields = Fields(element, f"{template.where}: RAW")
        kind = fields.text("TYPE").lower()
        if kind != RAW_TYPE:
            notes.append(f"RAW of TYPE {kind or 'none'!r} is not for this driver ({RAW_TYPE!r} is): ignored")
        elif not host.raw:
            raise fields.error(f"TYPE={RAW_TYPE!r} in a template is not allowed on this host (RAW in host.conf)")
        else:
            fragments.append(fields.text("DATA"))
    return tuple(fragment for fragment in fragments if fragment)


def _pinning(template: Fields) -> tuple[str, str]:
    """CPUs and memory nodes of all NUMA_NODEs that the scheduler has pinned (TOPOLOGY/PIN_POLICY)."""
    cpus: list[str] = []
    nodes: list[str] = []
    for element in template.all("NUMA_NODE"):
        fields = Fields(element, f"{template.where}: NUMA_NODE")
        for name, list_ in (("CPUS", cpus), ("MEMORY_NODE_ID", nodes)):
            text = fields.text(name).replace(" ", "")
            if text and not _CPUS.match(text):
                raise fields.error(f"{name} is not a list of numbers: {text!r}")
            if text and text not in list_:
                list_.append(text)
    return ",".join(cpus), ",".join(nodes) if cpus else ""


def _refuse(template: Fields, notes: list[str]) -> None:
    """What a container cannot have, in words."""
    if template.has("TOPOLOGY/HUGEPAGE_SIZE") and template.text("TOPOLOGY/HUGEPAGE_SIZE") != "0":
        raise NotSupportedError(
            f"{template.where}: TOPOLOGY/HUGEPAGE_SIZE: a container's memory cannot be made of huge pages: remove it"
        )
    for name in ("INPUT", "VIDEO", "TPM"):
        if template.all(name):
            notes.append(f"{name} is not for containers: ignored")


def _graphics(template: Fields, notes: list[str]) -> Graphics | None:
    for element in template.all("GRAPHICS"):
        fields = Fields(element, f"{template.where}: GRAPHICS")
        kind = fields.text("TYPE").lower()
        if kind != "vnc":
            notes.append(f"GRAPHICS of TYPE {kind or 'none'!r} is not for containers, VNC is: ignored")
            continue
        port = fields.whole("PORT", "a port", least=-1, most=65535)
        if port is None or port < 1:
            notes.append("GRAPHICS has no PORT: ignored")
            continue
        if port < VIEWER_PORT_LEAST:
            notes.append(f"GRAPHICS/PORT is {port}: only root may listen below {VIEWER_PORT_LEAST}: ignored")
            continue
        return Graphics(
            port=port,
            listen=fields.text("LISTEN", default="0.0.0.0"),
            password=fields.text("PASSWD"),
            keymap=fields.text("KEYMAP"),
        )
    return None
