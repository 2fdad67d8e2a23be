"""What has the administrator decided? Three small files, all in OpenNebula's syntax, all allowed to be absent.

* `vmm_exec_lxc.conf`, beside the scripts or under `etc/vmm/<driver>`: defaults for VMs, written on the front-end. oned
  does not merge them in for drivers of type xml, so the driver does.
* `onelxc/front_end.conf`, written by install.sh: which OpenNebula this is.
* `/etc/onelxc/host.conf`, root's: the policy of one host. The root helper obeys this file alone.

It reads files and knows names; what a value means for a VM is `template`'s to decide.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from onelxc import optext
from onelxc.errors import ConfigurationError
from onelxc.model import HOST_CONF

CAPABILITY = re.compile(r"[a-z_]+\Z")


class Generation(enum.Enum):
    """How OpenNebula calls: 3.2.1 gives argv only (and XML to deploy), 6.x and 7.x give XML to every action."""

    PULL = "pull"
    MONITORD = "monitord"


class Privileged(enum.Enum):
    """Whether the operator lets containers be privileged, as far as the host allows it: never, if the template asks
    for it (LXC_UNPRIVILEGED=no), or unless it says LXC_UNPRIVILEGED=yes."""

    NEVER = "no"
    ASKED = "yes"
    ALWAYS = "always"


@dataclass(frozen=True)
class FrontEnd:
    """What install.sh found. `framed`: errors have to stand in a frame to reach the user (up to 6.0.2)."""

    framed: bool = False
    driver: str = "lxc"
    version: str = ""

    @property
    def generation(self) -> Generation:
        return Generation.PULL if self.version.startswith(("3.", "2.")) else Generation.MONITORD


@dataclass(frozen=True)
class Defaults:
    """What a VM gets whose template says nothing; times that the actions keep."""

    cpu: float = 1.0
    vcpu: int | None = None
    memory_mb: int = 512
    swap_mb: int = 0
    init: str = "/sbin/init"
    arch: str = ""
    privileged: Privileged = Privileged.ASKED
    nic_bridge: str = ""
    nic_filter: str = ""
    nic_guest: str = "eth"
    capabilities: tuple[tuple[str, bool], ...] = ()
    profiles: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()
    shutdown_timeout_s: float = 60.0
    shutdown_force: bool = True
    reboot_timeout_s: float = 60.0
    lock_timeout_s: float = 300.0
    verbose: bool = False


@dataclass(frozen=True)
class HostConfig:
    """The host's policy. The ids of a VM are ID_BASE + (vm id % ID_COUNT) * 65536 and the 65535 after it."""

    datastores: tuple[str, ...] = ("/var/lib/one",)
    block_devices: tuple[str, ...] = ("/dev/vg-one-*/lv-one-*",)
    """Patterns of paths below /dev that a disk may be a link to; `*` stands for no `/`."""
    id_base: int = 1879048192
    id_count: int = 32768
    privileged: bool = False
    raw: bool = False
    profiles: tuple[str, ...] = ()
    """Names of the profiles that may be used at all."""
    apparmor: bool = True
    import_timeout_s: float = 3600.0
    import_limit_mb: int | None = None
    import_memory_mb: int = 2048
    fsck_timeout_s: float = 600.0
    exec_timeout_s: float = 3600.0
    lease_timeout_s: float = 120.0
    cache_path: str = "/var/lib/onelxc/cache"
    cache_max_mb: int = 20480
    console_log_kib: int = 1024

    def refused(self, profiles: Iterable[str]) -> str:
        """The first of the profiles that this host does not allow, "" if there is none."""
        allowed = {name.removesuffix(".xml") for name in self.profiles}
        return next((name for name in profiles if name.removesuffix(".xml") not in allowed), "")

    def first_id(self, vm_id: int) -> int:
        """The first host id of a VM's own range."""
        return self.id_base + (vm_id % self.id_count) * 65536


def front_end(remotes: str) -> FrontEnd:
    """What install.sh wrote into the bundle whose directory of remotes this is."""
    file = _File.read(os.path.join(remotes, "onelxc", "front_end.conf"))
    file.allow("FRAMED", "DRIVER", "ONE_VERSION")
    return FrontEnd(
        framed=file.yes("FRAMED", FrontEnd.framed),
        driver=file.text("DRIVER", FrontEnd.driver),
        version=file.text("ONE_VERSION", FrontEnd.version),
    )


def defaults(remotes: str, driver: str) -> Defaults:
    """The operator's defaults; `etc/vmm/<driver>` (OpenNebula 5 and later) goes before `vmm/<driver>`."""
    places = [os.path.join(remotes, way, driver, "vmm_exec_lxc.conf") for way in ("etc/vmm", "vmm")]
    file = _File.read(next((place for place in places if os.path.exists(place)), places[0]))
    file.allow("CPU", "VCPU", "MEMORY", "SWAP", "OS", "FEATURES", "NIC", "RAW", "TIMEOUTS", "LXC_PROFILES")
    file.allow_keys("OS", "INIT", "BOOT", "ARCH")
    file.allow_keys("FEATURES", "PRIVILEGED", "VERBOSE", "KEEP", "DROP")
    file.allow_keys("NIC", "BRIDGE", "FILTER", "GUEST")
    file.allow_keys("TIMEOUTS", "SHUTDOWN_TIMEOUT", "SHUTDOWN_FORCE", "REBOOT_TIMEOUT", "LOCK_TIMEOUT")
    standard = Defaults()
    privileged = file.key("FEATURES", "PRIVILEGED", standard.privileged.value).lower()
    if privileged not in [each.value for each in Privileged]:
        raise ConfigurationError(
            f"Cannot use {file.path}: FEATURES/PRIVILEGED is not yes, no or always: {privileged!r}"
        )
    return Defaults(
        cpu=file.number("CPU", standard.cpu),
        vcpu=file.whole("VCPU", 0) or None,
        memory_mb=file.whole("MEMORY", standard.memory_mb),
        swap_mb=file.whole("SWAP", standard.swap_mb),
        init=file.key("OS", "INIT", file.key("OS", "BOOT", standard.init)),
        arch=file.key("OS", "ARCH", standard.arch),
        privileged=Privileged(privileged),
        nic_bridge=file.key("NIC", "BRIDGE", standard.nic_bridge),
        nic_filter=file.key("NIC", "FILTER", standard.nic_filter),
        nic_guest=file.key("NIC", "GUEST", standard.nic_guest),
        capabilities=file.capabilities("FEATURES"),
        profiles=tuple(file.text("LXC_PROFILES", "").replace(",", " ").split()),
        raw=file.raw("RAW"),
        shutdown_timeout_s=file.number_key("TIMEOUTS", "SHUTDOWN_TIMEOUT", standard.shutdown_timeout_s),
        shutdown_force=file.yes_key("TIMEOUTS", "SHUTDOWN_FORCE", standard.shutdown_force),
        reboot_timeout_s=file.number_key("TIMEOUTS", "REBOOT_TIMEOUT", standard.reboot_timeout_s),
        lock_timeout_s=file.number_key("TIMEOUTS", "LOCK_TIMEOUT", standard.lock_timeout_s),
        verbose=file.yes_key("FEATURES", "VERBOSE", standard.verbose),
    )


def host(path: str = HOST_CONF) -> HostConfig:
    """The host's policy."""
    file = _File.read(path)
    file.allow("DATASTORES", "ID_BASE", "ID_COUNT", "PRIVILEGED", "RAW", "PROFILES", "APPARMOR")
    file.allow("IMPORT_TIMEOUT", "IMPORT_LIMIT", "IMPORT_MEMORY", "FSCK_TIMEOUT")
    file.allow("EXEC_TIMEOUT", "LEASE_TIMEOUT", "CACHE", "CONSOLE_LOG_KIB", "BLOCK_DEVICES")
    standard = HostConfig()
    found = HostConfig(
        datastores=file.paths("DATASTORES", standard.datastores),
        block_devices=file.paths("BLOCK_DEVICES", standard.block_devices),
        id_base=file.whole("ID_BASE", standard.id_base),
        id_count=file.whole("ID_COUNT", standard.id_count),
        privileged=file.yes("PRIVILEGED", standard.privileged),
        raw=file.yes("RAW", standard.raw),
        profiles=tuple(file.text("PROFILES", "").replace(",", " ").split()),
        apparmor=file.yes("APPARMOR", standard.apparmor),
        import_timeout_s=file.number("IMPORT_TIMEOUT", standard.import_timeout_s),
        import_limit_mb=file.whole("IMPORT_LIMIT", 0) or None,
        import_memory_mb=file.whole("IMPORT_MEMORY", standard.import_memory_mb),
        fsck_timeout_s=file.number("FSCK_TIMEOUT", standard.fsck_timeout_s),
        exec_timeout_s=file.number("EXEC_TIMEOUT", standard.exec_timeout_s),
        lease_timeout_s=file.number("LEASE_TIMEOUT", standard.lease_timeout_s),
        cache_path=file.path_key("CACHE", "DIRECTORY", standard.cache_path),
        cache_max_mb=file.whole_key("CACHE", "SIZE", standard.cache_max_mb),
        console_log_kib=file.whole("CONSOLE_LOG_KIB", standard.console_log_kib),
    )
    if not 4 <= found.lease_timeout_s <= 3600:
        raise ConfigurationError(f"Cannot use {path}: LEASE_TIMEOUT does not lie between 4 and 3600 seconds")
    for pattern in found.block_devices:
        if not pattern.startswith("/dev/"):
            raise ConfigurationError(f"Cannot use {path}: BLOCK_DEVICES has a path that is not below /dev: {pattern!r}")
    if found.id_base < 65536 or found.id_count < 1 or found.id_base + found.id_count * 65536 >= 2**32:
        raise ConfigurationError(f"Cannot use {path}: ID_BASE and ID_COUNT do not fit between 65536 and 4294967294")
    return found


class _File:
    """One file, and typed looks into it. Every error names the file and the attribute."""

    def __init__(self, path: str, attributes: tuple[optext.Attribute, ...]) -> None:
        self.path = path
        self.attributes = attributes
        self._allowed: set[str] = set()
        self._keys: dict[str, tuple[str, ...]] = {}

    @classmethod
    def read(cls, path: str) -> _File:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return cls(path, optext.parse(file.read(), path))
        except (FileNotFoundError, NotADirectoryError):
            return cls(path, ())
        except OSError as error:
            raise ConfigurationError(f"Cannot read {path}: {error.strerror}") from error

    def allow(self, *names: str) -> None:
        """`names` are known too. `find` holds a file to what was allowed: a name mistyped must not go unheard."""
        self._allowed.update(names)

    def allow_keys(self, name: str, *keys: str) -> None:
        """The vector `name` may have these keys only."""
        self._keys[name] = keys

    def find(self, name: str) -> optext.Attribute | None:
        for attribute in self.attributes:
            if attribute.name not in self._allowed:
                raise self._wrong(attribute.name, f"in line {attribute.line} is no name known here")
            for key, _ in attribute.items if attribute.name in self._keys else ():
                if key not in self._keys[attribute.name]:
                    raise self._wrong(f"{attribute.name}/{key}", f"in line {attribute.line} is no name known here")
        return next((attribute for attribute in reversed(self.attributes) if attribute.name == name), None)

    def text(self, name: str, default: str) -> str:
        found = self.find(name)
        if found is None:
            return default
        if found.vector:
            raise self._wrong(name, "is a vector, not a value")
        return found.value

    def key(self, name: str, key: str, default: str) -> str:
        found = self.find(name)
        if found is None:
            return default
        if not found.vector:
            raise self._wrong(name, f"is a value, not a vector: {name} = [ … ]")
        value = found.get(key)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        return self._number(name, self.text(name, ""), default)

    def number_key(self, name: str, key: str, default: float) -> float:
        return self._number(f"{name}/{key}", self.key(name, key, ""), default)

    def whole(self, name: str, default: int) -> int:
        return self._whole(name, self.text(name, ""), default)

    def whole_key(self, name: str, key: str, default: int) -> int:
        return self._whole(f"{name}/{key}", self.key(name, key, ""), default)

    def yes(self, name: str, default: bool) -> bool:
        return self._yes(name, self.text(name, ""), default)

    def yes_key(self, name: str, key: str, default: bool) -> bool:
        return self._yes(f"{name}/{key}", self.key(name, key, ""), default)

    def path_key(self, name: str, key: str, default: str) -> str:
        text = self.key(name, key, default)
        if not text.startswith("/"):
            raise self._wrong(f"{name}/{key}", f"is not an absolute path: {text!r}")
        return os.path.normpath(text)

    def paths(self, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        found = self.find(name)
        if found is None:
            return default
        values = [value for _, value in found.items] if found.vector else found.value.replace(",", " ").split()
        for value in values:
            if not value.startswith("/"):
                raise self._wrong(name, f"is not an absolute path: {value!r}")
        return tuple(os.path.normpath(value) for value in values) or default

    def capabilities(self, name: str) -> tuple[tuple[str, bool], ...]:
        """FEATURES = [ KEEP = "mknod, sys_time", DROP = "sys_rawio" ], in libvirt's names."""
        found = self.find(name)
        result = []
        for key, text in found.items if found else ():
            if key not in ("KEEP", "DROP"):
                continue
            for word in text.replace(",", " ").lower().split():
                if not CAPABILITY.match(word):
                    raise self._wrong(f"{name}/{key}", f"is no capability: {word!r}")
                result.append((word, key == "KEEP"))
        return tuple(result)

    def raw(self, name: str) -> tuple[str, ...]:
        """Fragments of libvirt XML: RAW = "<devices>…" as in vmm_exec_kvm.conf, or RAW = [ TYPE = …, DATA = … ]."""
        fragments = []
        for attribute in self.attributes:
            if attribute.name == name:
                fragments.append((attribute.get("DATA") if attribute.vector else attribute.value) or "")
        return tuple(fragment for fragment in fragments if fragment.strip())

    def _number(self, name: str, text: str, default: float) -> float:
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            raise self._wrong(name, f"is not a number: {text!r}") from None
        if not 0 < value < float("inf"):
            raise self._wrong(name, f"is not above 0: {text!r}")
        return value

    def _whole(self, name: str, text: str, default: int) -> int:
        if not text:
            return default
        if not (text.isascii() and text.isdigit()):
            raise self._wrong(name, f"is not a whole number: {text!r}")
        return int(text)

    def _yes(self, name: str, text: str, default: bool) -> bool:
        word = text.strip().lower()
        if word not in ("", "yes", "no", "true", "false"):
            raise self._wrong(name, f"is neither yes nor no: {text!r}")
        return word in ("yes", "true") if word else default

    def _wrong(self, name: str, what: str) -> ConfigurationError:
        return ConfigurationError(f"Cannot use {self.path}: {name} {what}")
