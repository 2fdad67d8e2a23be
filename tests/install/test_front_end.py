"""install.sh on a front-end: each of its promises, on installations as OpenNebula lays them out."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import installations as trees

BUNDLE = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "tests")
PROBE_DIRECTORIES = (
    "host/beacon",
    "host/monitor",
    "host/system",
    "vm/execution",
    "vm/monitor",
    "vm/snapshot",
    "vm/status",
)
GENERIC_PROBES = (
    "host/monitor/numa_usage.rb",
    "host/system/architecture.sh",
    "host/system/monitor_ds.rb",
    "host/system/nfs_automounted.rb",
    "host/system/numa_host.rb",
    "host/system/pci.rb",
    "host/system/version.sh",
    "vm/monitor/monitor_ds_vm.rb",
)
KVM_PROBES = (
    "host/system/machines_models.rb",
    "host/monitor/linux_usage.rb",
    "vm/status/state.rb",
    "vm/monitor/poll.rb",
)

WAYS = pytest.mark.parametrize(("how", "arguments"), [("pull", ()), ("monitord", ()), ("monitord", ("--replace",))])


def install(*arguments: str | Path, ok: bool = True, environment: dict[str, str] | None = None) -> str:
    """install.sh's stdout; its stderr when it is to fail."""
    done = subprocess.run(
        [str(BUNDLE / "install.sh"), *map(str, arguments)],
        env={"PATH": os.environ["PATH"], **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


@pytest.fixture
def pull(tmp_path: Path) -> Path:
    return trees.pull(tmp_path / "one")


@pytest.fixture
def monitord(tmp_path: Path) -> Path:
    return trees.monitord(tmp_path / "one")


# Files end up where the original's description puts them, and every executable of the bundle is there.
def test_pull_places(pull: Path) -> None:
    install("-d", pull)
    remotes = pull / "var/remotes"
    assert (pull / "etc/vmm_exec/vmm_exec_lxc.conf").is_file()
    for name in os.listdir(BUNDLE / "remotes/vmm/lxc"):
        assert (remotes / "vmm/lxc" / name).read_bytes() == (BUNDLE / "remotes/vmm/lxc" / name).read_bytes()
    for name in os.listdir(BUNDLE / "remotes/im/lxc.d"):
        assert os.access(remotes / "im/lxc.d" / name, os.X_OK)
    assert (remotes / "onelxc/model.py").is_file()


# A packaged installation: found without being told where, its configuration stays root's and readable by oneadmin.
@pytest.mark.parametrize("kind", [trees.pull, trees.monitord])
def test_packaged(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    trees.packaged(tmp_path, kind)
    before = trees.snapshot(tmp_path)
    put = ["/etc/one", "/usr/lib/one", "/var/lib/one/remotes"]
    assert not [path for path in put if os.path.exists(path)]
    try:
        for path in put:
            os.makedirs(path)
            subprocess.run(["mount", "--bind", f"{tmp_path}{path}", path], check=True)
        install()
        assert "Everything is in place already." in install()
        if kind is trees.pull:
            conf = Path("/etc/one/vmm_exec/vmm_exec_lxc.conf")
            assert stat.filemode(conf.stat().st_mode) == "-rw-r-----"
            assert (conf.stat().st_uid, conf.stat().st_gid) == (0, trees.ONEADMIN)
            assert os.readlink("/var/lib/one/remotes/vmm/lxc/vmm_exec_lxc.conf") == str(conf)
        else:
            assert Path("/var/lib/one/remotes/etc/vmm/onelxc/vmm_exec_lxc.conf").stat().st_uid == trees.ONEADMIN
            assert trees.snapshot(tmp_path / "etc") == {
                name[len("etc/") :]: what for name, what in before.items() if name.startswith("etc/")
            }
        install("--uninstall")
        assert trees.snapshot(tmp_path) == before
    finally:
        for path in put:
            subprocess.run(["umount", path], check=False)
            os.rmdir(path)


# ONE_LOCATION in the environment is as good as -d, and `front-end` is what install.sh does without a command.
def test_one_location(pull: Path) -> None:
    install("front-end", environment={"ONE_LOCATION": str(pull)})
    assert (pull / "var/remotes/vmm/lxc/poll").is_file()


# An executable finds the package of the remotes that it lies in, from wherever it is called.
@pytest.mark.parametrize("how", ["pull", "monitord"])
def test_executables_find_the_package(how: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root = request.getfixturevalue(how)
    install("-d", root)
    host = tmp_path / "host"
    shutil.copytree(root / "var/remotes", host)  # as scp -r and rsync -L do: links become files
    driver = "lxc" if how == "pull" else "onelxc"
    done = subprocess.run(
        [host / "vmm" / driver / "poll"], cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No module" not in done.stderr


# No file of the package is executable: run_probes executes whatever is.
def test_package_is_not_executable(pull: Path) -> None:
    install("-d", pull)
    assert not [
        path for path in (pull / "var/remotes/onelxc").rglob("*") if path.is_file() and path.stat().st_mode & 0o111
    ]


# What install.sh found is written down for the driver: the frame, the driver's directory, the version.
@pytest.mark.parametrize(
    ("version", "framed", "expected"),
    [
        ("3.2.1", True, 'FRAMED = "yes" DRIVER = "lxc" ONE_VERSION = "3.2.1"'),
        ("6.0.2", True, 'FRAMED = "yes" DRIVER = "onelxc" ONE_VERSION = "6.0.2"'),
        ("7.4.0", False, 'FRAMED = "no" DRIVER = "onelxc" ONE_VERSION = "7.4.0"'),
    ],
)
def test_front_end_conf(tmp_path: Path, version: str, framed: bool, expected: str) -> None:
    root = tmp_path / "one"
    if version == "3.2.1":
        trees.pull(root)
    else:
        trees.monitord(root, version, framed=framed)
    install("-d", root)
    lines = (root / "var/remotes/onelxc/front_end.conf").read_text().splitlines()
    assert " ".join(line for line in lines if not line.startswith("#")) == expected


# 3.2 has no VERSION file; an installation whose files say no version is told by its way of monitoring.
def test_version_from_the_layout(pull: Path) -> None:
    (pull / "lib/ruby/cli/one_helper.rb").unlink()
    assert "OpenNebula 3.2 in" in install("-d", pull)


# A generation that was never tried is refused in one line, and nothing is touched.
@pytest.mark.parametrize("version", ["2.2.1", "4.2.0", "5.12.0"])
def test_other_generations_are_refused(tmp_path: Path, version: str) -> None:
    root = trees.monitord(tmp_path / "one", version)
    before = trees.snapshot(root)
    assert install("-d", root, ok=False) == (
        f"install.sh: this is OpenNebula {version}; OneLXC serves 3.2 and what came from 6.0 on\n"
    )
    assert trees.snapshot(root) == before


# No OpenNebula: one clear line, whichever part is missing.
@pytest.mark.parametrize("gone", ["etc/oned.conf", "var/remotes/vmm", "var/remotes/im", "."])
def test_no_opennebula(pull: Path, gone: str) -> None:
    path = (pull / gone).resolve()
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    error = install("-d", pull, ok=False)
    assert error.count("\n") == 1
    assert error.startswith(f"install.sh: no OpenNebula front-end in {pull}: there is no {pull}/")


# A second run changes nothing: neither a file, nor the times by which oned sees that hosts need a new copy.
@WAYS
def test_idempotent(how: str, arguments: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(how)
    install("-d", root, *arguments)
    before, times = trees.snapshot(root), {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
    assert "Everything is in place already." in install("-d", root, *arguments)
    assert trees.snapshot(root) == before
    assert {path: path.lstat().st_mtime_ns for path in root.rglob("*")} == times


# A dry run says what a real run then does, line for line, and does nothing.
@pytest.mark.parametrize("how", ["pull", "monitord"])
def test_dry_run(how: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(how)
    before = trees.snapshot(root)
    would = [
        line[len("would ") :] for line in install("-d", root, "--dry-run").splitlines() if line.startswith("would ")
    ]
    assert trees.snapshot(root) == before
    said = install("-d", root).splitlines()
    assert would
    assert [line for line in said if line.split(" ")[0] in ("create", "link", "update", "chmod", "chown")] == would


# oned.conf and monitord.conf are never edited; what belongs there is printed.
@pytest.mark.parametrize(
    ("how", "printed"),
    [
        ("pull", ['name       = "vmm_lxc"', 'type       = "xml"']),
        ("monitord", ['"-t 15 -r 0 -p -l exec=exec_by_ssh onelxc"', "LIVE_RESIZE    = "]),
    ],
)
def test_prints_what_to_add(how: str, printed: list[str], request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(how)
    before = trees.snapshot(root / "etc", but="vmm_exec")
    said = install("-d", root)
    assert trees.snapshot(root / "etc", but="vmm_exec") == before
    for text in printed:
        assert text in said


# Owners and modes are those of the installation's own files.
@pytest.mark.skipif(os.getuid() != 0, reason="owners need root")
@pytest.mark.parametrize("how", ["pull", "monitord"])
def test_owners_and_modes(how: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(how)
    (root / "var/remotes/vmm/kvm/deploy").chmod(0o750)
    (root / "var/remotes/scripts_common.sh").chmod(0o640)
    install("-d", root)
    driver = "lxc" if how == "pull" else "onelxc"
    for path in root.rglob("*"):
        assert (path.lstat().st_uid, path.lstat().st_gid) == (trees.ONEADMIN, trees.ONEADMIN), path
    assert (root / "var/remotes/vmm" / driver / "poll").stat().st_mode & 0o777 == 0o750
    assert (root / "var/remotes/onelxc/model.py").stat().st_mode & 0o777 == 0o640
    conf = "etc/vmm_exec" if how == "pull" else "var/remotes/etc/vmm/onelxc"
    assert (root / conf / "vmm_exec_lxc.conf").stat().st_mode & 0o777 == 0o640


# What the operator wrote survives a re-installation, and reaches the hosts: in 3.2 by scp -r, later by rsync -L.
@pytest.mark.parametrize("editor", ["in place", "by renaming"])
@pytest.mark.parametrize("how", ["pull", "monitord"])
def test_edited_defaults(how: str, editor: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root = request.getfixturevalue(how)
    install("-d", root)
    place = "etc/vmm_exec" if how == "pull" else "var/remotes/etc/vmm/onelxc"
    conf = root / place / "vmm_exec_lxc.conf"
    if editor == "in place":
        conf.write_text("MEMORY = 99\n")
    else:  # sed -i, and most editors
        (root / "new").write_text("MEMORY = 99\n")
        (root / "new").rename(conf)
    assert f"kept {conf}, which was edited" in install("-d", root)
    assert conf.read_text() == "MEMORY = 99\n"
    host = tmp_path / "host"
    shutil.copytree(root / "var/remotes", host)
    seen = "vmm/lxc" if how == "pull" else "etc/vmm/onelxc"
    assert (host / seen / "vmm_exec_lxc.conf").read_text() == "MEMORY = 99\n"
    assert "kept" in install("-d", root, "--uninstall")
    assert conf.read_text() == "MEMORY = 99\n"


# Defaults that nobody edited follow the bundle's.
def test_unedited_defaults_are_updated(pull: Path, tmp_path: Path) -> None:
    install("-d", pull)
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE, bundle, ignore=LEFT_OUT)
    (bundle / "etc/vmm_exec_lxc.conf").write_text("# of another version\n")
    subprocess.run([bundle / "install.sh", "-d", pull], check=True, stdout=subprocess.DEVNULL)
    assert (pull / "etc/vmm_exec/vmm_exec_lxc.conf").read_text() == "# of another version\n"


# A new version removes what it no longer has, and nothing that it did not put there.
def test_upgrade_removes_what_is_gone(pull: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE, bundle, ignore=LEFT_OUT)
    (bundle / "onelxc/old_module.py").write_text("")
    subprocess.run([bundle / "install.sh", "-d", pull], check=True, stdout=subprocess.DEVNULL)
    (pull / "var/remotes/vmm/lxc/site-local").write_text("the operator's own\n")
    assert (pull / "var/remotes/onelxc/old_module.py").exists()
    install("-d", pull)
    assert not (pull / "var/remotes/onelxc/old_module.py").exists()
    assert (pull / "var/remotes/vmm/lxc/site-local").exists()


# No dangling link is ever left in the remotes: one stops the monitoring of every host.
@WAYS
def test_no_dangling_links(how: str, arguments: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(how)
    for step in ((), ("--uninstall",)):
        install("-d", root, *(step or arguments))
        assert not [path for path in (root / "var/remotes").rglob("*") if path.is_symlink() and not path.exists()]


# --uninstall leaves the installation as it was found, byte for byte, mode for mode.
@WAYS
def test_uninstall(how: str, arguments: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(how)
    before = trees.snapshot(root)
    install("-d", root, *arguments)
    (root / "var/remotes/onelxc/__pycache__").mkdir()
    (root / "var/remotes/onelxc/__pycache__/model.cpython-311.pyc").write_bytes(b"")
    assert trees.snapshot(root) != before
    said = install("-d", root, "--uninstall", "--dry-run")
    assert "would remove" in said
    install("-d", root, "--uninstall")
    assert trees.snapshot(root) == before
    assert "OneLXC is not installed" in install("-d", root, "--uninstall", ok=False)


# The manifest lies where oneadmin can write: nothing outside of the installation is ever removed on its word.
def test_a_forged_manifest(pull: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("")
    install("-d", pull)
    with (pull / "var/remotes/onelxc/manifest").open("a") as manifest:
        manifest.write(f"00 {victim}\n00 @remotes@/../../../victim\n00 @etc@/../../victim\n")
    install("-d", pull, "--uninstall")
    assert victim.exists()


# Someone who is not the owner of the remotes is told so, in one line, before anything is touched.
@pytest.mark.skipif(os.getuid() != 0, reason="somebody else is made by root")
def test_without_rights() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        bundle = Path(directory) / "bundle"
        shutil.copytree(BUNDLE, bundle, ignore=LEFT_OUT)
        root = trees.pull(Path(directory) / "one")
        before = trees.snapshot(root)
        done = subprocess.run(
            ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", bundle / "install.sh", "-d", root],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        name = pwd.getpwuid(trees.ONEADMIN).pw_name
        assert done.stderr == (
            f"install.sh: {root}/var/remotes belongs to {name}: run install.sh as root or as {name}, not as nobody\n"
        )
        assert trees.snapshot(root) == before


# From 6.0 on: beside the stock driver, of which no byte changes.
def test_beside_the_stock_driver(monitord: Path) -> None:
    before = trees.snapshot(monitord)
    install("-d", monitord)
    after = trees.snapshot(monitord)
    assert {name: after.get(name) for name in before} == before
    assert all("onelxc" in name for name in set(after) - set(before))


# All seven directories of probes exist and are not empty: git, tar and cp must not lose one.
@pytest.mark.parametrize("arguments", [(), ("--replace",)])
def test_all_probe_directories(monitord: Path, arguments: tuple[str, ...]) -> None:
    install("-d", monitord, *arguments)
    probes = monitord / "var/remotes/im" / ("lxc-probes.d" if arguments else "onelxc-probes.d")
    for name in PROBE_DIRECTORIES:
        assert os.listdir(probes / name), name
        assert not os.access(probes / name / "README", os.X_OK)


# Client and generic probes are the installation's own, as files; the ones that are about KVM stay away.
def test_generic_probes(monitord: Path) -> None:
    install("-d", monitord)
    remotes = monitord / "var/remotes"
    stock, ours = remotes / "im/kvm-probes.d", remotes / "im/onelxc-probes.d"
    for name in GENERIC_PROBES:
        assert (ours / name).read_bytes() == (stock / name).read_bytes()
        assert not (ours / name).is_symlink()
        assert os.access(ours / name, os.X_OK)
    for name in KVM_PROBES:
        assert not (ours / name).exists()
    for name in ("monitord-client.rb", "monitord-client_control.sh"):
        assert (remotes / "im/onelxc.d" / name).read_bytes() == (remotes / "im/kvm.d" / name).read_bytes()
    # pci.rb reads etc/im/<its directory's name>/pci.conf
    assert (remotes / "etc/im/onelxc-probes.d/pci.conf").read_bytes() == (
        remotes / "etc/im/kvm-probes.d/pci.conf"
    ).read_bytes()


# After an upgrade of OpenNebula, install.sh again brings its new client, and drops a probe that is no more.
def test_after_an_upgrade_of_opennebula(monitord: Path) -> None:
    install("-d", monitord)
    remotes = monitord / "var/remotes"
    (remotes / "im/kvm.d/monitord-client.rb").write_text("# 7.6\n")
    (remotes / "im/kvm-probes.d/host/system/nfs_automounted.rb").unlink()
    (remotes / "VERSION").write_text("7.6.0\n")
    install("-d", monitord)
    assert (remotes / "im/onelxc.d/monitord-client.rb").read_text() == "# 7.6\n"
    assert not (remotes / "im/onelxc-probes.d/host/system/nfs_automounted.rb").exists()
    assert 'ONE_VERSION = "7.6.0"' in (remotes / "onelxc/front_end.conf").read_text()


# --replace: our files under the stock name, the stock's kept outside of the remotes, where no host sees them.
def test_replace(monitord: Path) -> None:
    install("-d", monitord, "--replace")
    remotes = monitord / "var/remotes"
    assert (remotes / "vmm/lxc/poll").read_bytes() == (BUNDLE / "remotes/vmm/lxc/poll").read_bytes()
    assert not (remotes / "im/lxc-probes.d/vm/status/state.rb").exists()
    assert (monitord / "var/onelxc-replaced/im/lxc-probes.d/vm/status/state.rb").is_file()
    assert (remotes / "etc/vmm/lxc/lxcrc").is_file()
    assert (remotes / "im/lxc.d/monitord-client.rb").is_file()
    assert 'DRIVER = "lxc"' in (remotes / "onelxc/front_end.conf").read_text()


# An upgrade that writes the stock driver over ours: install.sh again, and --uninstall then gives the upgraded one back.
@pytest.mark.parametrize("again", [("--replace",), ()])
def test_replace_survives_an_upgrade(monitord: Path, again: tuple[str, ...]) -> None:
    before = trees.snapshot(monitord)
    install("-d", monitord, "--replace")
    deploy, new = monitord / "var/remotes/vmm/lxc/deploy", monitord / "var/remotes/vmm/lxc/added_by_upgrade"
    ours = deploy.read_bytes() if (BUNDLE / "remotes/vmm/lxc/deploy").exists() else None
    for path in (deploy, new):
        path.write_text("# of 7.6\n")
        path.chmod(0o755)
        if os.getuid() == 0:
            os.chown(path, trees.ONEADMIN, trees.ONEADMIN)
    install("-d", monitord, *again)
    assert not new.exists()
    assert ours is None or deploy.read_bytes() == ours
    install("-d", monitord, "--uninstall")
    after = trees.snapshot(monitord)
    assert deploy.read_text() == new.read_text() == "# of 7.6\n"
    changed = {name for name in set(before) | set(after) if before.get(name) != after.get(name)}
    assert changed == {"var/remotes/vmm/lxc/deploy", "var/remotes/vmm/lxc/added_by_upgrade"}


# 3.2 has no driver called lxc to replace.
def test_replace_is_for_later_versions(pull: Path) -> None:
    assert "--replace is for OpenNebula from 6.0 on" in install("-d", pull, "--replace", ok=False)


# After a change, oned 3.2 sees that the remotes are newer and copies them to the hosts by itself.
def test_a_change_is_seen_by_oned(pull: Path) -> None:
    install("-d", pull)
    os.utime(pull / "var/remotes", (0, 0))
    (pull / "var/remotes/vmm/lxc/poll").write_text("damaged\n")
    install("-d", pull)
    assert (pull / "var/remotes").stat().st_mtime > 0


@pytest.mark.parametrize("arguments", [["--frobnicate"], ["-d"], ["somewhere"]])
def test_bad_arguments(arguments: list[str]) -> None:
    error = install(*arguments, ok=False)
    assert error.startswith("install.sh: ")
    assert error.count("\n") == 1
