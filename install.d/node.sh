# shellcheck shell=bash disable=SC2034,SC2154  # install.sh and files.sh set the rest
# A host: packages, the user's groups, the root helper, its line for sudo, and what libvirt, udev and systemd have to know.
#
# Everything put here is root's own, under the paths that onelxc/model.py names. The administrator's files below
# /etc/onelxc are never overwritten once they were edited, and stay when OneLXC goes.

user=${ONEADMIN:-oneadmin}
library=/usr/lib/onelxc
node_manifest=$library/manifest
sudoers=/etc/sudoers.d/onelxc
hook=/etc/libvirt/hooks/lxc.d/onelxc
state=/var/lib/onelxc

# Debian's names, which are Ubuntu's too. The second row is for kinds of images and features; a distribution that lacks
# one of them still runs containers.
needed_packages=(libvirt-daemon-system libvirt-daemon-driver-lxc libvirt-clients python3-libvirt python3-lxml python3-yaml
    sudo tar util-linux mount e2fsprogs iproute2 kmod gzip xz-utils bzip2)
useful_packages=(zstd lz4 xfsprogs btrfs-progs fdisk qemu-system-common pciutils)

node_install() {
    [ "$(id -u)" -eq 0 ] || [ "$dry_run" = yes ] || die "node has to be run as root, on the host: sudo ./install.sh node"
    say "OneLXC $(bundle_version) on host $(uname -n)"
    read_node_manifest
    if [ "$1" = yes ]; then install_packages; fi
    put_user_into_group
    carry_out put_host
    [ "$changes" -gt 0 ] || say "Everything is in place already."
    if [ "$dry_run" = no ]; then check_host; fi
}

read_node_manifest() {
    manifest_file=$node_manifest manifest_token='' manifest_root='' backup=/var/lib/onelxc-replaced
    read_manifest
}

put_host() {
    put_helper
    put_hook
    put_apparmor
    put_policy
    put_sudoers
    put_units
    put_shims
}

# Those that are missing.
install_packages() {
    local package missing=() useful=()
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        say "This is neither Debian nor Ubuntu; make sure that the host has what these packages hold:"
        say "  ${needed_packages[*]} ${useful_packages[*]}"
        return 0
    fi
    for package in "${needed_packages[@]}"; do
        # the daemon without what wires it into systemd, where there is none
        if [ "$package" = libvirt-daemon-system ] && [ ! -d /run/systemd/system ]; then package=libvirt-daemon; fi
        has_package "$package" || missing+=("$package")
    done
    for package in "${useful_packages[@]}"; do
        has_package "$package" || useful+=("$package")
    done
    [ "${#missing[@]}${#useful[@]}" != 00 ] || return 0
    if step "install packages: ${missing[*]} ${useful[*]}"; then
        apt_get update || say "apt-get update failed; going on with the package lists that are here"
        [ ${#missing[@]} -eq 0 ] || apt_get install "${missing[@]}" || die "apt-get could not install: ${missing[*]}"
        for package in "${useful[@]}"; do
            apt_get install "$package" || say "going on without the package $package"
        done
    fi
}

has_package() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

apt_get() {
    local log code=0
    log=$(mktemp)
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 \
        -o Acquire::Retries=3 "$@" </dev/null >"$log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || tail -n 20 -- "$log" >&2
    rm -f -- "$log"
    return "$code"
}

# Whoever is in group libvirt may use libvirt (Debian's polkit rule, or libvirtd.conf).
put_user_into_group() {
    getent passwd "$user" >/dev/null || return 0 # the check says so
    getent group libvirt >/dev/null || return 0
    case " $(id -Gn "$user") " in
        *' libvirt '*) ;;
        *) if step "add $user to group libvirt"; then gpasswd -a "$user" libvirt >/dev/null; fi ;;
    esac
}

# Nothing here may ever be writable by anybody but root: sudo runs it.
put_helper() {
    put_own_directory "$library" root:root 755
    put_package
    put_file "$bundle/libexec/onelxc-root" "$library/onelxc-root" root:root 755
    put_file "$bundle/libexec/onelxc-hub" "$library/onelxc-hub" root:root 755
    put_file "$bundle/libexec/onelxc-guard" "$library/onelxc-guard" root:root 755
    put_link "$library/onelxc-root" /usr/sbin/onelxc-root root:root
}

# libvirt calls it at each start of a container. What the administrator has there stays, and is called as well.
put_hook() {
    local before=$changes directory
    for directory in /etc/libvirt /etc/libvirt/hooks /etc/libvirt/hooks/lxc.d; do
        put_directory "$directory" root:root 755
    done
    put_file "$bundle/etc/libvirt/lxc-hook" "$hook" root:root 755
    if [ "$changes" -ne "$before" ] && [ "$dry_run" = no ]; then reload_libvirtd; fi
}

# libvirtd looks for hooks when it starts and when it is told to reload; containers do not notice.
reload_libvirtd() {
    local process name here
    here=$(readlink /proc/self/ns/pid)
    for process in /proc/[0-9]*; do
        [ "$(readlink "$process/ns/pid" 2>/dev/null)" = "$here" ] || continue # a container may have its own
        name=$(cat "$process/comm" 2>/dev/null || :)
        case $name in libvirtd | virtlxcd) kill -HUP "${process#/proc/}" 2>/dev/null || : ;; esac
    done
}

# Where AppArmor is: the profiles, and the program that puts libvirt's controller of a container into one. libvirtd's own
# profile lets it execute what lies in /usr/sbin.
put_apparmor() {
    local before=$changes
    put_file "$bundle/libexec/onelxc-controller" /usr/sbin/onelxc-controller root:root 755
    put_link onelxc-controller /usr/sbin/onelxc-controller-privileged root:root
    [ -d /etc/apparmor.d ] || return 0
    put_directory /etc/apparmor.d/abstractions root:root 755
    put_configuration "$bundle/etc/apparmor.d/abstractions/onelxc-container" \
        /etc/apparmor.d/abstractions/onelxc-container root:root 644
    put_configuration "$bundle/etc/apparmor.d/onelxc" /etc/apparmor.d/onelxc root:root 644
    if [ "$changes" -ne "$before" ] && [ "$dry_run" = no ] && has_apparmor; then
        try "load the AppArmor profiles" apparmor_parser -r /etc/apparmor.d/onelxc
    fi
}

has_apparmor() {
    [ "$(cat /sys/module/apparmor/parameters/enabled 2>/dev/null)" = Y ] && command -v apparmor_parser >/dev/null
}

# Made beside the one in use, which actions may be starting from just now.
put_package() {
    local package=$library/onelxc
    stage "$package"
    put_tree "$bundle/onelxc" "$package" root:root 755 644 644
    [ "$dry_run" = no ] || return 0
    # byte code once, instead of at each action's start; Python itself sees when it is out of date
    /usr/bin/python3 -I -m compileall -q -s "$package.new" -p "$package" "$package.new" ||
        die "the package does not compile under /usr/bin/python3"
    exchange
}

put_policy() {
    put_own_directory /etc/onelxc root:root 755
    put_own_directory /etc/onelxc/profiles root:root 755
    put_configuration "$bundle/etc/host.conf" /etc/onelxc/host.conf root:root 644
    put_file "$bundle/etc/profiles-README" /etc/onelxc/profiles/README root:root 644
}

# A file in sudoers.d with a mistake in it locks everybody out of sudo: it is looked at before it goes there.
put_sudoers() {
    local file said
    file=$(mktemp)
    cat >"$file" <<END
# OneLXC's root helper checks everything it is asked for. No terminal, no session of its own: it speaks over pipes.
Defaults!$library/onelxc-root !requiretty, !use_pty
$user ALL=(root) NOPASSWD: $library/onelxc-root, /usr/sbin/lxc-freeze, /usr/sbin/lxc-unfreeze
END
    if command -v visudo >/dev/null; then
        said=$(visudo -c -f "$file" 2>&1) || {
            rm -f -- "$file"
            die "visudo refuses the line for sudo: ${said%%$'\n'*}"
        }
    elif [ "$dry_run" = no ]; then
        die "visudo is missing: install the package sudo"
    fi
    put_directory /etc/sudoers.d root:root 750
    put_file "$file" "$sudoers" root:root 440
    rm -f -- "$file"
}

put_units() {
    local before=$changes unit
    put_link_file
    if [ ! -d /run/systemd/system ]; then
        # a new version of the package is a new hub: the next action, or probe, starts it
        if [ "$changes" -gt 0 ] && [ -s /run/onelxc/hub.pid ]; then stop_hub; fi
        return 0
    fi
    before=$changes
    for unit in libvirtd virtlxcd; do
        if [ "$(libvirt_major)" -lt 11 ] && [ -f "/usr/lib/systemd/system/$unit.service" ]; then
            put_directory "/etc/systemd/system/$unit.service.d" root:root 755
            put_file "$bundle/etc/systemd/libvirtd-stays.conf" "/etc/systemd/system/$unit.service.d/onelxc.conf" root:root 644
        fi
    done
    if [ "$changes" -ne "$before" ] && [ "$dry_run" = no ]; then
        systemctl daemon-reload
        # containers go on while their daemon restarts; one that is not up has nothing to forget
        for unit in libvirtd virtlxcd; do systemctl try-restart "$unit.service" 2>/dev/null || :; done
    fi
    before=$changes
    put_file "$bundle/etc/systemd/onelxc-hub.service" /etc/systemd/system/onelxc-hub.service root:root 644
    if [ "$dry_run" = no ]; then
        [ "$changes" -eq "$before" ] || systemctl daemon-reload
        if ! systemctl -q is-enabled onelxc-hub.service 2>/dev/null; then
            changes=$((changes + 1))
            systemctl -q enable onelxc-hub.service
        fi
        # a new version of the package is a new hub
        if [ "$changes" -gt 0 ] || ! systemctl -q is-active onelxc-hub.service; then systemctl restart onelxc-hub.service; fi
    fi
}

put_link_file() {
    local before=$changes
    put_directory /etc/systemd root:root 755
    put_directory /etc/systemd/network root:root 755
    put_file "$bundle/etc/systemd/10-onelxc.link" /etc/systemd/network/10-onelxc.link root:root 644
    if [ "$changes" -ne "$before" ] && [ "$dry_run" = no ] && [ -S /run/udev/control ]; then udevadm control --reload || :; fi
}

libvirt_major() {
    local major
    major=$(libvirtd --version 2>/dev/null | sed -nE 's/.* ([0-9]+)\.[0-9.]+.*/\1/p')
    printf '%s' "${major:-0}"
}

# OpenNebula's live disk snapshots call `sudo lxc-freeze -n one-N`, which its sudo looks up in /sbin first. Where /usr/sbin
# is /usr/bin, or somebody else's tool lies there, that one moves aside as dpkg wants it.
put_shims() {
    local name path
    for name in lxc-freeze lxc-unfreeze; do
        path=/usr/sbin/$name
        if [ "$(readlink -f /usr/sbin)" = "$(readlink -f /usr/bin)" ] || { [ -e "$path" ] && [ -z "${shipped[$path]:-}" ]; }; then
            if [ -z "$(dpkg-divert --list "$path.distrib" "$path" 2>/dev/null)" ]; then
                if step "divert $path to $path.distrib"; then
                    dpkg-divert --quiet --local --rename --divert "$path.distrib" --add "$path"
                fi
            fi
        fi
        put_file "$bundle/libexec/lxc-freeze" "$path" root:root 755
    done
}

check_host() {
    say
    say "The host:"
    local code=0
    "$library/onelxc-root" check "$user" || code=$?
    [ "$code" -eq 0 ] || die "installed, but containers cannot run on this host yet: see above"
}

node_uninstall() {
    local path name running
    [ "$(id -u)" -eq 0 ] || [ "$dry_run" = yes ] || die "node --uninstall has to be run as root"
    # or broken off before anything was put
    [ -f "$node_manifest" ] || { [ -d "$library" ] && [ -z "$(find "$library" -mindepth 1 ! -name manifest.onelxc-new)" ]; } ||
        die "OneLXC is not installed on this host (no $node_manifest)"
    running=$(virsh -q -c lxc:/// list --name 2>/dev/null | grep -xE 'one-[0-9]+' | tr '\n' ' ' || :)
    [ -z "$running" ] || die "containers run on this host: ${running% }; end them or migrate them first"
    running=$(awk -v under="$state/" 'index($2, under) == 1 { print $2 }' /proc/mounts | head -n 1)
    [ -z "$running" ] || die "$running is still mounted: run onelxc-root reap, and look at its answer"
    read_node_manifest
    if [ -d /run/systemd/system ] && step "stop onelxc-hub.service"; then
        systemctl -q disable --now onelxc-hub.service 2>/dev/null || :
    elif [ "$dry_run" = no ] && [ -s /run/onelxc/hub.pid ]; then
        stop_hub
    fi
    if has_apparmor && [ -f /etc/apparmor.d/onelxc ] && step "unload the AppArmor profiles"; then
        apparmor_parser -R /etc/apparmor.d/onelxc 2>/dev/null || :
    fi
    drop_installed
    restore_replaced
    for name in lxc-freeze lxc-unfreeze; do
        path=/usr/sbin/$name
        if [ -n "$(dpkg-divert --list "$path.distrib" "$path" 2>/dev/null)" ] && step "put back $path"; then
            dpkg-divert --quiet --local --rename --remove "$path"
        fi
    done
    # of an installation that was broken off
    [ "$dry_run" = yes ] || rm -rf -- "$library/onelxc.new" "$library/onelxc.old" "$node_manifest.onelxc-new"
    drop_file "$node_manifest"
    drop_directory "$library"
    for path in "$state" /run/onelxc /var/log/onelxc; do
        if [ -d "$path" ] && step "remove $path/"; then
            find "$path" -xdev -mindepth 1 -delete
            rmdir -- "$path" 2>/dev/null || say "left $path/, which is a mount point"
        fi
    done
    if [ -d /run/systemd/system ] && [ "$dry_run" = no ]; then systemctl daemon-reload; fi
    say "Packages, and $user's membership in group libvirt, stay."
}

stop_hub() {
    local pid
    pid=$(head -n 1 /run/onelxc/hub.pid)
    case $(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" || :) in
        *onelxc-hub*) if step "stop onelxc-hub (process $pid)"; then kill "$pid"; fi ;;
    esac
}
