# shellcheck shell=bash disable=SC2154  # install.sh, files.sh and node.sh set the rest
# One container on this machine, through the real executables, called as oned 3.2.1 calls them.
#
# Under systemd it uses the host's libvirtd, and puts the host's part of OneLXC there for the while if it is not installed;
# elsewhere everything happens in a machine of its own (tests/alone: namespaces, a private libvirtd, an overlay over /).
# Everything below the datastore, which is the user's, is done by a process of that user (owner.sh).
# The VM's number is one that nobody has, it has no network interface, and whatever is made is removed at the end, also
# when something fails or is interrupted. Packages stay.

# shellcheck source=install.d/node.sh
. "$bundle/install.d/node.sh"
needed_packages+=(busybox-static)

# demo [ROOTFS-TARBALL]
demo() {
    [ "$(id -u)" -eq 0 ] || die "the demonstration needs root: sudo ./install.sh demo"
    [ "$dry_run" = no ] || die "demo has no dry run: it removes what it makes"
    local tarball=${1:-}
    [ -z "$tarball" ] || [ -f "$tarball" ] || die "there is no file $tarball"
    [ -z "$tarball" ] || tarball=$(readlink -f -- "$tarball")
    if [ ! -d /run/systemd/system ] && [ "${ONELXC_ALONE:-}" != 1 ]; then
        install_packages
        say "No systemd here: a machine of its own, with a private libvirtd"
        ALONE_BIND="${ALONE_BIND:-} $tarball" exec "$bundle/tests/alone" "$bundle/install.sh" demo ${tarball:+"$tarball"}
    fi
    [ "${ONELXC_ALONE:-}" = 1 ] || install_packages

    base='' made_user=no made_host=no vm_id=''
    trap demo_clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    demo_prepare
    demo_run "$tarball"
}

# A user like oneadmin, the host's part, the remotes as they lie on a host, a free number for the VM.
demo_prepare() {
    if ! getent passwd "$user" >/dev/null; then
        user=onelxc-demo
        getent passwd "$user" >/dev/null || useradd --system --user-group --shell /bin/bash --home-dir /nonexistent "$user"
        made_user=yes
    fi
    if [ ! -e "$node_manifest" ]; then
        made_host=yes
        quietly env ONEADMIN="$user" "$bundle/install.sh" node --no-packages
        say "host: the root helper, sudo's line and libvirt's settings are in place, for the while"
    elif [ "$made_user" = yes ]; then
        put_user_into_group >/dev/null
        put_sudoers_of_demo
    fi
    [ "$("$library/onelxc-root" version)" = "$(bundle_version)" ] ||
        die "this host has OneLXC $("$library/onelxc-root" version), this bundle is $(bundle_version): sudo ./install.sh node"

    local datastore
    datastore=$(cd "$bundle" && /usr/bin/python3 -c 'from onelxc import config; print(config.host().datastores[0])')
    [ -d "$datastore" ] || { made_datastore=$datastore && install -d -o "$user" -m 755 -- "$datastore"; }
    find_owner "$datastore"
    if [ "$part_owner" = root ]; then
        base=$(mktemp -d -- "$datastore/onelxc-demo.XXXXXX")
        chown "$user:" "$base"
        made_base=root
    else
        [ "$part_owner" = "$user" ] || die "$datastore belongs to $part_owner, not to $user"
        base=$(as_user "$user" mktemp -d -- "$datastore/onelxc-demo.XXXXXX")
        made_base=$user
    fi
    remotes=$base/remotes
    publish_bundle
    # shellcheck disable=SC2016 # for the other shell
    as_user "$user" sh -ec 'umask 022; chmod 755 "$1"; cd "$1"; mkdir remotes remotes/im remotes/vmm
        cp -R "$2/onelxc" remotes/onelxc
        cp -R "$2/remotes/vmm/lxc" remotes/vmm/lxc
        cp -R "$2/remotes/im/lxc.d" remotes/im/lxc.d
        printf "%s = \"%s\"\n" FRAMED yes DRIVER lxc ONE_VERSION 3.2.1 >remotes/onelxc/front_end.conf' - "$base" "$published"

    vm_id=4000000
    while [ -e "$state/vms/$vm_id" ] || virsh -q -c lxc:/// dominfo "one-$vm_id" >/dev/null 2>&1; do
        vm_id=$((vm_id + 1))
    done
    images=$base/$vm_id/images
    as_user "$user" mkdir -p "$images"
}

put_sudoers_of_demo() {
    printf '%s ALL=(root) NOPASSWD: %s\n' "$user" "$library/onelxc-root" >/etc/sudoers.d/onelxc-demo.new
    visudo -c -q -f /etc/sudoers.d/onelxc-demo.new >/dev/null || die "visudo refuses the demonstration's line"
    chmod 440 /etc/sudoers.d/onelxc-demo.new
    mv /etc/sudoers.d/onelxc-demo.new /etc/sudoers.d/onelxc-demo
}

demo_run() {
    local archive=$1 here console
    here=$(uname -n)
    if [ -z "$archive" ]; then
        archive=$base/rootfs.tar.gz
        demo_rootfs "$archive"
    fi
    say "image: $archive ($(($(stat -c %s "$archive") / 1024)) KiB), which oned's tm_ssh copies to disk.0"
    if [ "$archive" = "$base/rootfs.tar.gz" ]; then
        as_user "$user" cp -- "$archive" "$images/disk.0"
    else
        as_user "$user" dd "of=$images/disk.0" bs=1M conv=sparse,fsync status=none <"$archive"
    fi
    say

    as_oned "host probe" "im/lxc.d" "" "lxc" 0 "$here"
    demo_template | as_user "$user" dd "of=$images/deployment.0" status=none
    as_oned "deploy" vmm/lxc/deploy "$images/deployment.0" "$images/deployment.0" "$here" "$vm_id" "$here"
    as_oned "poll" vmm/lxc/poll "" "one-$vm_id" "$here" "$vm_id" "$here"
    virsh -q -c lxc:/// list | sed 's/^/      libvirt: /'
    as_oned "reboot" vmm/lxc/reboot "" "one-$vm_id" "$here" "$vm_id" "$here"
    as_oned "poll" vmm/lxc/poll "" "one-$vm_id" "$here" "$vm_id" "$here"
    console=/var/log/onelxc/one-$vm_id.log
    # it runs; what its init says comes a moment later, and is known of our own image only
    for _ in $(seq 100); do
        if [ "$archive" != "$base/rootfs.tar.gz" ] || grep -qs "boot number 2" "$console"; then break; fi
        sleep 0.1
    done
    if [ -s "$console" ]; then
        tr -d '\r' <"$console" | tail -n 6 | tr -cd '[:print:]\n' | sed 's/^/      console: /'
    fi
    as_oned "shutdown" vmm/lxc/shutdown "" "one-$vm_id" "$here" "$vm_id" "$here"
    as_oned "poll" vmm/lxc/poll "" "one-$vm_id" "$here" "$vm_id" "$here"
    as_oned "deploy, from the image that the archive became" vmm/lxc/deploy "$images/deployment.0" \
        "$images/deployment.0" "$here" "$vm_id" "$here"
    as_oned "cancel" vmm/lxc/cancel "" "one-$vm_id" "$here" "$vm_id" "$here"
    say
    demo_leftovers
}

# as_oned TITLE EXECUTABLE STDIN-FILE ARGUMENT...: as the user, through a shell, with the environment that ssh gives and
# nothing of ours. A directory of probes is run as OpenNebula's run_probes does.
as_oned() {
    local title=$1 path=$remotes/$2 stdin=${3:-/dev/null} script began output ended call
    shift 3
    script=$(printf '%q ' "$path" "$@")
    call="${path#"$remotes/"} $*"
    # shellcheck disable=SC2016 # for the other shell
    if [ -d "$path" ]; then
        script=$(printf 'cd %q && for probe in *; do [ ! -x "$probe" ] || ./"$probe" %s || exit; done' "$path" "$*")
    fi
    say "$title: $call"
    began=$(date +%s%N)
    # shellcheck disable=SC2016
    if ! output=$(as_user "$user" env PATH=/usr/local/bin:/usr/bin:/bin:/usr/games USER="$user" \
        bash -c 'exec bash -c "$1" <"$2" 2>&1' - "$script" "$stdin" 2>&1); then
        printf '%s\n' "$output" | sed 's/^/      /'
        die "$title failed"
    fi
    ended=$(date +%s%N)
    [ -z "$output" ] || printf '%s\n' "$output" | fold -s -w 110 | sed 's/^/      /'
    printf '      %d.%02d s\n' $(((ended - began) / 1000000000)) $(((ended - began) / 10000000 % 100))
}

demo_template() {
    printf '<TEMPLATE><CPU><![CDATA[1]]></CPU><DISK><DISK_ID><![CDATA[0]]></DISK_ID><SOURCE><![CDATA[%s]]></SOURCE></DISK>' \
        /opt/nebula/images/lxc.tar.gz
    printf '<MEMORY><![CDATA[128]]></MEMORY><NAME><![CDATA[demo]]></NAME><VCPU><![CDATA[1]]></VCPU><VMID>%d</VMID></TEMPLATE>\n' \
        "$vm_id"
}

# demo_rootfs FILE: busybox, and an inittab that counts the boots.
demo_rootfs() {
    local busybox
    busybox=$(command -v busybox) || die "busybox is missing"
    {
        declare -f make_rootfs
        echo 'set -e; umask 022; make_rootfs "$@"'
    } | as_user "$user" bash -s - "$base/rootfs" "$busybox" "$1"
}

# make_rootfs DIRECTORY BUSYBOX FILE
make_rootfs() {
    local root=$1 busybox=$2 name
    mkdir -p "$root"/{bin,sbin,etc,dev,proc,sys,root,tmp,var/tmp}
    cp "$busybox" "$root/bin/busybox"
    for name in sh cat date echo expr mount ps reboot poweroff sleep uname id hostname; do
        ln -s busybox "$root/bin/$name"
    done
    ln -s ../bin/busybox "$root/sbin/init"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    cat >"$root/etc/inittab" <<'END'
::sysinit:/etc/boot
::respawn:/bin/sleep 3600
END
    cat >"$root/etc/boot" <<'END'
#!/bin/sh
n=$(cat /var/boots 2>/dev/null || echo 0)
n=$((n + 1))
echo $n > /var/boots
echo "busybox: boot number $n of $(hostname), uid 0 inside is uid $(cat /proc/self/uid_map | while read a b c; do echo $b; done) outside"
END
    chmod 755 "$root/etc/boot"
    tar -C "$root" --owner=0 --group=0 --numeric-owner -czf "$3" .
    rm -rf -- "$root"
}

demo_leftovers() {
    local left=''
    ! virsh -q -c lxc:/// dominfo "one-$vm_id" >/dev/null 2>&1 || left+=" domain one-$vm_id"
    ! grep -q "$state/mnt/$vm_id/" /proc/mounts || left+=" mounts"
    ! losetup -a | grep -qF "$images/" || left+=" loop devices"
    [ -z "$left" ] || die "the demonstration left behind:$left"
    say "Nothing is left of it: no domain, no mount, no loop device."
}

# quietly COMMAND...: its output only if it fails.
quietly() {
    local log code=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || cat -- "$log" >&2
    rm -f -- "$log"
    [ "$code" -eq 0 ] || exit "$code"
}

demo_clean_up() {
    local code=$?
    trap - EXIT
    set +e
    if [ -n "$vm_id" ] && [ -d "$state/vms/$vm_id" ]; then
        as_user "$user" "$remotes/vmm/lxc/cancel" "one-$vm_id" localhost "$vm_id" localhost >/dev/null 2>&1
    fi
    if [ -n "$base" ]; then
        as_user "$user" rm -rf --one-file-system -- "$base" 2>/dev/null
        # its directory is root's
        [ "$made_base" != root ] || rmdir -- "$base"
    fi
    [ -z "$published" ] || rm -rf -- "$published"
    [ -z "${made_datastore:-}" ] || rmdir -p --ignore-fail-on-non-empty -- "$made_datastore" 2>/dev/null
    rm -f /etc/sudoers.d/onelxc-demo /etc/sudoers.d/onelxc-demo.new
    if [ "$made_host" = yes ] && [ -e "$node_manifest" ]; then
        quietly env ONEADMIN="$user" "$bundle/install.sh" node --uninstall
    fi
    if [ "$made_user" = yes ]; then userdel "$user" >/dev/null 2>&1; fi
    exit "$code"
}
