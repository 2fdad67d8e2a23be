#!/bin/bash
# Installs OneLXC: on OpenNebula's front-end, on a host, or for a demonstration on this machine alone.
#
# This file reads the command line; what is done lies in install.d/: files.sh (puts and removes files, dry runs included),
# manifest.sh (what was put, and what was there before), owner.sh (as whom), opennebula.sh (which OpenNebula is this),
# frontend.sh, node.sh, demo.sh.
set -eu

# a part of it, run as another user, may reach it by a descriptor only (owner.sh)
if [ "${1:-}" = part ]; then
    bundle=$(dirname -- "${BASH_SOURCE[0]}")
else
    bundle=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
fi

usage() {
    cat <<'END'
Usage: install.sh [front-end] [-d DIR] [--replace] [--dry-run] [--verbose] [--uninstall]
       install.sh node [--dry-run] [--verbose] [--uninstall]
       install.sh demo [ROOTFS-TARBALL]

front-end   beside OpenNebula on this machine (the default): the packaged one (/etc/one), or a self-contained one
            in DIR or $ONE_LOCATION
node        on a host, as root: packages, the root helper, sudo, libvirt's settings; ends with a check of the host
demo        as root: one container through the real executables, as oned calls them; leaves nothing behind

  -d DIR, --directory DIR   the self-contained installation in DIR
      --replace             from 6.0 on: take the name "lxc" from OpenNebula's own driver (kept, and put back by
                            --uninstall)
  -n, --dry-run             say what would be done, and do nothing
  -v, --verbose             a line for every file
  -u, --uninstall           remove what was installed
      --no-packages         node: install no packages, the host has them
  -h, --help                this text
      --version             the bundle's version
END
}

# shellcheck source=install.d/owner.sh
. "$bundle/install.d/owner.sh"
# shellcheck source=install.d/files.sh
. "$bundle/install.d/files.sh"
# shellcheck source=install.d/manifest.sh
. "$bundle/install.d/manifest.sh"
trap 'say_group; [ -z "$published" ] || rm -rf -- "$published" 2>/dev/null || :' EXIT

command=front-end
case ${1:-} in
    part)
        shift
        # shellcheck source=install.d/opennebula.sh
        . "$bundle/install.d/opennebula.sh"
        # shellcheck source=install.d/frontend.sh
        . "$bundle/install.d/frontend.sh"
        part "$@"
        exit
        ;;
    front-end | frontend | node | demo) command=${1/frontend/front-end} && shift ;;
esac

directory=${ONE_LOCATION:-}
uninstall=no
replace=no
packages=yes
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        -d | --directory)
            [ $# -ge 2 ] || die "$1 wants a directory"
            directory=$2
            shift
            ;;
        --directory=*) directory=${1#*=} ;;
        --replace) replace=yes ;;
        -n | --dry-run) dry_run=yes ;;
        -v | --verbose) verbose=yes ;;
        -u | --uninstall) uninstall=yes ;;
        --no-packages) packages=no ;;
        -h | --help)
            usage
            exit 0
            ;;
        --version)
            bundle_version
            exit 0
            ;;
        -*) die "unknown option $1; install.sh --help lists them" ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
[ "$command" = demo ] || [ ${#arguments[@]} -eq 0 ] || die "what is ${arguments[0]}? install.sh --help lists the commands"

case $command in
    front-end)
        # shellcheck source=install.d/opennebula.sh
        . "$bundle/install.d/opennebula.sh"
        # shellcheck source=install.d/frontend.sh
        . "$bundle/install.d/frontend.sh"
        find_places "$directory"
        if [ "$uninstall" = yes ]; then frontend_uninstall; else frontend_install "$replace"; fi
        ;;
    node)
        # shellcheck source=install.d/node.sh
        . "$bundle/install.d/node.sh"
        if [ "$uninstall" = yes ]; then node_uninstall; else node_install "$packages"; fi
        ;;
    demo)
        # shellcheck source=install.d/demo.sh
        . "$bundle/install.d/demo.sh"
        demo "${arguments[@]}"
        ;;
esac
