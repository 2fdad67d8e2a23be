"""What does OpenNebula write about a VM? The XML of both generations, as their captures have it, from a Python dict.

A value is a text or number, a dict (an element with children) or a list (the element repeated).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def element(name: str, value: Any) -> str:
    """`name` with its value as OpenNebula prints it: text in CDATA."""
    if isinstance(value, (list, tuple)):
        return "".join(element(name, item) for item in value)
    if isinstance(value, Mapping):
        return f"<{name}>{children(value)}</{name}>"
    text = str(value).replace("]]>", "]]]]><![CDATA[>")
    return f"<{name}><![CDATA[{text}]]></{name}>"


def children(values: Mapping[str, Any]) -> str:
    return "".join(element(name, value) for name, value in sorted(values.items()) if value is not None)


def pull_template(vm_id: int, template: Mapping[str, Any]) -> str:
    """3.2.1's deployment file: the bare template."""
    return f"<TEMPLATE>{children({**template, 'VMID': vm_id})}</TEMPLATE>"


def vm_xml(
    vm_id: int,
    template: Mapping[str, Any],
    *,
    name: str,
    deploy_id: str,
    host: str,
    user_template: Mapping[str, Any],
    state: int,
    lcm_state: int,
    ds_id: int,
    tm_mad: str = "ssh",
    extra: str = "",
) -> str:
    """7.x's <VM>."""
    plain = {"ID": vm_id, "UID": 0, "GID": 0, "UNAME": "oneadmin", "GNAME": "oneadmin", "NAME": name}
    plain.update({"STATE": state, "LCM_STATE": lcm_state, "PREV_STATE": state, "PREV_LCM_STATE": lcm_state})
    head = "".join(f"<{key}>{value}</{key}>" for key, value in plain.items())
    history = (
        f"<HISTORY_RECORDS><HISTORY><OID>{vm_id}</OID><SEQ>0</SEQ><HOSTNAME>{host}</HOSTNAME><HID>2</HID><CID>0</CID>"
        f"<VM_MAD><![CDATA[lxc]]></VM_MAD><TM_MAD><![CDATA[{tm_mad}]]></TM_MAD><DS_ID>{ds_id}</DS_ID></HISTORY>"
        "</HISTORY_RECORDS>"
    )
    return (
        f"<VM>{head}<DEPLOY_ID>{deploy_id}</DEPLOY_ID><MONITORING></MONITORING>"
        f"<TEMPLATE>{children({**template, 'VMID': vm_id})}</TEMPLATE>"
        f"<USER_TEMPLATE>{children(user_template)}</USER_TEMPLATE>{history}{extra}</VM>"
    )


def action_xml(vm: str, *, host: str, deploy_id: str, **values: str) -> str:
    """7.x's <VMM_DRIVER_ACTION_DATA> around a <VM>; `values` fills MIGR_HOST, CHECKPOINT_FILE, DISK_TARGET_PATH …"""
    names = ("MIGR_HOST", "DEPLOY_ID", "LOCAL_DEPLOYMENT_FILE", "REMOTE_DEPLOYMENT_FILE", "CHECKPOINT_FILE")
    names += ("TM_COMMAND", "TM_COMMAND_ROLLBACK", "DISK_TARGET_PATH")
    filled = {"DEPLOY_ID": deploy_id, **values}
    body = "".join(f"<{name}>{filled[name]}</{name}>" if filled.get(name) else f"<{name}/>" for name in names)
    return f"<VMM_DRIVER_ACTION_DATA><HOST>{host}</HOST>{body}{vm}</VMM_DRIVER_ACTION_DATA>"
