# shellcheck shell=bash disable=SC2034,SC2154  # install.sh, files.sh, manifest.sh and opennebula.sh set the rest
# The front-end: executables, probes and the package into the remotes, which OpenNebula copies to every host.
#
# Never edits oned.conf or monitord.conf: it prints what belongs there. Owners and modes are those of the
# installation's own files. Each part, what lies in etc and what lies in the remotes, is put by its owner and has a
# manifest of its own, so that --uninstall removes that and nothing else, and an upgrade removes what a newer bundle no
# longer has.

data_files=     # owner:group of what is read in the remotes, and its mode
data_mode=
executable_mode=
directory_mode=

frontend_install() {
    local replace=$1
    ask_which_opennebula
    [ "$generation" = monitord ] || [ "$replace" = no ] || die "--replace is for OpenNebula from 6.0 on: $version has no driver named lxc"
    [ -d "$bundle/remotes/vmm/lxc" ] || die "$bundle/remotes is missing: this bundle is incomplete"
    say "OpenNebula $version in ${remotes%/remotes}, OneLXC $(bundle_version)"
    [ "$generation" = monitord ] || as_part etc install_in_etc
    as_part remotes install_in_remotes "$generation" "$version" "$framed" "$replace" "$etc"
}

# What its owner finds out about this OpenNebula. root and etc have their own names: they are put into links and lines.
ask_which_opennebula() {
    local found
    if [ "$(id -u)" -eq 0 ]; then publish_bundle; else refuse_without_rights; fi # before the first subshell
    found=$(as_part remotes find_opennebula "$root") || exit 1
    [[ $found =~ ^[0-9][0-9.]{0,20}\ (pull|monitord)\ (yes|no)$ ]] || die "cannot tell which OpenNebula is in ${remotes%/remotes}"
    read -r version generation framed <<<"$found"
}

manifest_in_etc() {
    manifest_file=$etc/vmm_exec/onelxc.manifest manifest_token=@etc@ manifest_root=$etc backup=
    manifest_owner=$(own_or_mine "$etc") manifest_mode=640 directory_mode=$(mode_of "$etc")
    read_manifest
}

# OpenNebula 3.2: the operator's defaults, at the place that the original's description names.
install_in_etc() {
    manifest_in_etc
    [ "$dry_run" = yes ] || [ -w "$etc" ] || die "cannot write to $etc: run install.sh as root"
    carry_out put_defaults
}

put_defaults() {
    put_directory "$etc/vmm_exec" "$(own_or_mine "$etc")" "$(mode_of "$etc")"
    local conf=$etc/vmm_exec/vmm_exec_lxc.conf sibling=$etc/vmm_exec/vmm_exec_kvm.conf
    [ -f "$sibling" ] || sibling=$etc/oned.conf
    put_configuration "$bundle/etc/vmm_exec_lxc.conf" "$conf" "$(own_or_mine "$sibling")" "$(mode_of "$sibling")"
}

manifest_in_remotes() {
    take_modes
    refuse_without_rights
    manifest_file=$remotes/onelxc/manifest manifest_token=@remotes@ manifest_root=$remotes
    manifest_owner=$data_files manifest_mode=$data_mode
    backup=$(backup_place)
    exec 9<"$remotes"
    flock -n 9 || die "another install.sh is at work in $remotes"
    read_manifest
}

# Beside the remotes, which are copied to the hosts.
backup_place() { case $remotes in */remotes) printf '%s' "${remotes%/remotes}/onelxc-replaced" ;; *) printf '%s' "$remotes/../onelxc-replaced" ;; esac; }

# install_in_remotes GENERATION VERSION FRAMED REPLACE ETC: ETC by its own name.
install_in_remotes() {
    local replace=$4 driver=lxc
    generation=$1 version=$2 framed=$3 named_etc=$5
    manifest_in_remotes
    if [ "$generation" = monitord ] && [ "$replace" = no ]; then
        if [ -d "$backup/vmm/lxc" ]; then
            say "installed with --replace before: it stays so (--uninstall gives the name back)"
        else
            driver=onelxc
        fi
    fi
    # shellcheck source=install.d/monitord.sh
    . "${bundle:?}/install.d/monitord.sh"
    carry_out "install_$generation" "$driver"
    if [ "$changes" -eq 0 ]; then
        say "Everything is in place already."
    elif [ "$generation" = pull ]; then
        # what `onehost sync` does: a newer directory is copied to the hosts at their next monitoring
        [ "$dry_run" = yes ] || try "touch $remotes" touch -- "$remotes"
    else
        say "Hosts that are there already get it by: onehost sync --force"
    fi
    say
    say_what_to_add "$driver"
}

# OpenNebula 3.2: the places that the original's description names. What another driver of that name had there is put
# aside the first time: its probes would run beside ours.
install_pull() {
    local directory how=noted
    [ "$first_time" = no ] || how=all
    for directory in vmm/lxc im/lxc.d; do set_aside "$remotes/$directory" "$how"; done
    put_remote_tree "$bundle/remotes/vmm/lxc" "$remotes/vmm/lxc"
    # oned 3.2 does not merge these defaults into the deployment file of TYPE="xml", so the file itself has to reach the
    # hosts: scp -r follows the link and copies what the operator wrote.
    put_link "$named_etc/vmm_exec/vmm_exec_lxc.conf" "$remotes/vmm/lxc/vmm_exec_lxc.conf" "$data_files"
    put_remote_tree "$bundle/remotes/im/lxc.d" "$remotes/im/lxc.d"
    install_package "$1"
}

# The library. No file of it is executable: run_probes and its like execute whatever is.
install_package() {
    put_tree "$bundle/onelxc" "$remotes/onelxc" "$data_files" "$directory_mode" "$data_mode" "$data_mode"
    put_text "# What install.sh found on the front-end; written by it, read by onelxc/config.py.
FRAMED = \"$framed\"
DRIVER = \"$1\"
ONE_VERSION = \"$version\"" "$remotes/onelxc/front_end.conf" "$data_files" "$data_mode"
}

frontend_uninstall() {
    local in_etc=no left
    ask_which_opennebula
    # also what an installation has left that was broken off at its very beginning
    for left in "$etc"/vmm_exec/onelxc.manifest*; do [ ! -e "$left" ] || in_etc=yes; done
    [ ! -d "$etc/vmm_exec" ] || [ -n "$(find "$etc/vmm_exec/" -mindepth 1 -print -quit)" ] || in_etc=yes
    [ "$(id -u)" -ne 0 ] || [ "$dry_run" = yes ] || drop_caches_of_root "$remotes" onelxc
    as_part remotes uninstall_in_remotes "$generation" "$in_etc"
    [ "$generation" = monitord ] || as_part etc uninstall_in_etc
    say
    say "Remove what you added to $etc/oned.conf$([ "$generation" = pull ] || printf ' and monitord.conf'), and restart oned."
}

# uninstall_in_remotes GENERATION IN-ETC: IN-ETC is yes when something is left there, from what was broken off before.
uninstall_in_remotes() {
    manifest_in_remotes
    if [ "$first_time" = yes ] && [ ! -d "$backup" ] && [ "$2" = no ]; then
        # or broken off before anything was put
        [ -d "$remotes/onelxc" ] && [ -z "$(find "$remotes/onelxc/" -mindepth 1 ! -name manifest.onelxc-new)" ] ||
            die "OneLXC is not installed in ${remotes%/remotes} (no $manifest_file)"
    fi
    drop_installed
    restore_replaced
    [ "$dry_run" = yes ] || try "remove $manifest_file" rm -f -- "$manifest_file.onelxc-new"
    drop_file "$manifest_file"
    drop_directory "$remotes/onelxc"
    if [ "$dry_run" = no ] && [ "$1" = pull ]; then try "touch $remotes" touch -- "$remotes"; fi
}

uninstall_in_etc() {
    manifest_in_etc
    drop_installed
    [ "$dry_run" = yes ] || try "remove $manifest_file" rm -f -- "$manifest_file.onelxc-new"
    drop_file "$manifest_file"
    if [ -n "${shipped[$etc/vmm_exec]:-}" ] || [ "$first_time" = yes ]; then drop_directory "$etc/vmm_exec"; fi
}

put_remote_tree() { put_tree "$1" "$2" "$data_files" "$directory_mode" "$data_mode" "$executable_mode"; }

take_modes() {
    local common=$remotes/scripts_common.sh sample
    data_files=$(own_or_mine "$common")
    data_mode=$(printf '%o' $((0$(mode_of "$common") & 0664)))
    executable_mode=$(printf '%o' $((0$data_mode | (0$data_mode & 0444) >> 2)))
    for sample in "$remotes/vmm/kvm/deploy" "$remotes/vmm/kvm/shutdown"; do
        if [ -f "$sample" ] && [ -x "$sample" ]; then
            executable_mode=$(mode_of "$sample")
            break
        fi
    done
    directory_mode=$(mode_of "$remotes/vmm")
}

# own_or_mine FILE: its owner:group, as far as whoever runs this may give files away.
own_or_mine() {
    local owner
    owner=$(owner_of "$1")
    case $(id -u)," $(id -Gn) " in
        0,*) printf '%s' "$owner" ;;
        *" ${owner#*:} "*) printf '%s' "$(id -un):${owner#*:}" ;;
        *) printf '%s' "$(id -un):$(id -gn)" ;;
    esac
}

refuse_without_rights() {
    local owner me
    [ "$dry_run" = no ] || return 0
    owner=$(owner_of "$remotes")
    owner=${owner%%:*}
    me=$(id -un)
    [ "$(id -u)" -eq 0 ] || [ "$me" = "$owner" ] || die "$remotes belongs to $owner: run install.sh as root or as $owner, not as $me"
    [ -w "$remotes" ] || die "cannot write to $remotes: run install.sh as root"
}

# The stanzas stand in oned.conf.example once; here the part for this version is shown.
say_what_to_add() {
    local part="OpenNebula 3.2"
    if [ "$generation" = monitord ]; then
        part="OpenNebula 6 and 7"
        if [ "$1" = lxc ]; then part="OpenNebula 6 and 7, with --replace"; fi
    fi
    sed -n "/^#### $part: /,/^#### end/{/^#### end/!p}" "$bundle/oned.conf.example" | sed "s|^#### $part: \(.*\)\$|Add to ${named_etc}/\1|"
}
