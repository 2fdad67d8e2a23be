# shellcheck shell=bash disable=SC2034  # what is found is for the others
# Finds the OpenNebula installation, its places and its version, and changes nothing.
#
# Layouts: OpenNebula's own install.sh. Sets root, etc, remotes, lib; then version, generation (pull: 3.2; monitord: from
# 6.0), framed.

# find_places DIR: DIR is "" for the packaged installation. Nothing is looked at yet: that is its owner's to do.
find_places() {
    root=$1 etc=/etc/one remotes=/var/lib/one/remotes lib=/usr/lib/one
    [ -n "$root" ] || return 0
    root=$(realpath -sm -- "$root")
    etc=$root/etc remotes=$root/var/remotes lib=$root/lib
}

# find_opennebula ROOT: prints version, generation and whether errors are framed.
find_opennebula() {
    local root=$1 missing
    missing=$(missing_part)
    [ -z "$missing" ] || die "no OpenNebula front-end ${root:+in }${root:-here}: there is no $missing; if it is elsewhere: install.sh -d DIR"
    find_version
    [ -f "$remotes/scripts_common.sh" ] || die "$remotes/scripts_common.sh is missing: this OpenNebula is incomplete"
    framed=no
    ! grep -q -- '8<------' "$remotes/scripts_common.sh" || framed=yes
    printf '%s\n' "$version $generation $framed"
}

missing_part() {
    local part
    for part in "$etc/oned.conf" "$remotes/vmm" "$remotes/im"; do
        if [ ! -e "$part" ]; then
            printf '%s' "$part"
            break
        fi
    done
}

# remotes/VERSION is there from 3.8 on; before, the version stands in what the commands print. Packages and `oned`
# itself are asked last: they may belong to another installation on the same machine.
find_version() {
    version=
    if [ -s "$remotes/VERSION" ]; then
        version=$(tr -d '[:space:]' <"$remotes/VERSION")
    fi
    [ -n "$version" ] || version=$(first_version "$lib/ruby/opennebula/version.rb" "$lib/ruby/opennebula.rb" \
        "$lib/ruby/cli/one_helper.rb" "$lib/ruby/OpenNebula.rb")
    if [ -z "$version" ] && [ -x "${lib%/lib*}/bin/oned" ]; then
        version=$("${lib%/lib*}/bin/oned" -v 2>/dev/null | sed -n 's/.*OpenNebula \([0-9][0-9.]*[0-9]\).*/\1/p' | head -n 1)
    fi
    if [ -z "$version" ]; then
        # Nothing says it: the way hosts are monitored tells the generation.
        if [ -e "$remotes/im/run_monitord_client" ]; then
            version=6.0
        elif [ -e "$remotes/im/run_probes" ] && [ ! -e "$remotes/im/run_probes.sh" ]; then
            version=3.2
        else
            die "cannot tell which version of OpenNebula this is: no version in $remotes/VERSION or $lib/ruby"
        fi
    fi
    case $version in
        3.2 | 3.2.*) generation=pull ;;
        [6-9].* | [1-9][0-9].*) generation=monitord ;;
        *) die "this is OpenNebula $version; OneLXC serves 3.2 and what came from 6.0 on" ;;
    esac
}

# first_version FILE...: `VERSION = '7.4.0'` or "OpenNebula 3.2.1" in the first file that has one.
first_version() {
    local file found
    for file; do
        [ -f "$file" ] || continue
        found=$(sed -nE "s/.*\b(VERSION *= *['\"]|OpenNebula )([0-9]+(\.[0-9]+)+).*/\2/p" "$file" | head -n 1)
        if [ -n "$found" ]; then
            printf '%s' "$found"
            return 0
        fi
    done
}
