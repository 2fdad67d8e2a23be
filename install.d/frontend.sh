# shellcheck shell=bash disable=SC2154  # install.sh, files.sh and opennebula.sh set the rest
# The front-end: executables, probes and the package into the remotes, which OpenNebula copies to every host.
#
# Never edits oned.conf or monitord.conf: it prints what belongs there. Owners and modes are those of the
# installation's own files. What was put lies in remotes/onelxc/manifest, so that --uninstall removes that and nothing
# else, and so that an upgrade removes what a newer bundle no longer has.

data_files=     # owner:group of what is read in the remotes, and its mode
data_mode=
executable_mode=
directory_mode=

frontend_install() {
    local replace=$1 driver=lxc
    backup=${remotes%/remotes}/onelxc-replaced
    if [ "$generation" = monitord ] && [ "$replace" = no ]; then
        if [ -d "$backup" ]; then
            say "installed with --replace before: it stays so (--uninstall gives the name back)"
        else
            driver=onelxc
        fi
    fi
    [ "$generation" = monitord ] || [ "$replace" = no ] || die "--replace is for OpenNebula from 6.0 on: $version has no driver named lxc"
    [ -d "$bundle/remotes/vmm/lxc" ] || die "$bundle/remotes is missing: this bundle is incomplete"
    say "OpenNebula $version in ${remotes%/remotes}, OneLXC $(bundle_version)"
    take_modes
    refuse_without_rights
    frontend_manifest=$remotes/onelxc/manifest
    read_frontend_manifest

    case $generation in
        pull) install_pull ;;
        monitord)
            # shellcheck source=install.d/monitord.sh
            . "${bundle:?}/install.d/monitord.sh"
            install_monitord "$driver"
            ;;
    esac
    install_package "$driver"
    drop_stale
    write_frontend_manifest
    if [ "$changes" -eq 0 ]; then
        say "Everything is in place already."
    elif [ "$generation" = pull ]; then
        # what `onehost sync` does: a newer directory is copied to the hosts at their next monitoring
        [ "$dry_run" = yes ] || touch -- "$remotes"
    else
        say "Hosts that are there already get it by: onehost sync --force"
    fi
    say
    say_what_to_add "$driver"
}

# OpenNebula 3.2: the places that the original's description names.
install_pull() {
    put_directory "$etc/vmm_exec" "$(owner_of "$etc")" "$(mode_of "$etc")"
    local conf=$etc/vmm_exec/vmm_exec_lxc.conf sibling=$etc/vmm_exec/vmm_exec_kvm.conf
    [ -f "$sibling" ] || sibling=$etc/oned.conf
    put_configuration "$bundle/etc/vmm_exec_lxc.conf" "$conf" "$(owner_of "$sibling")" "$(mode_of "$sibling")"
    put_remote_tree "$bundle/remotes/vmm/lxc" "$remotes/vmm/lxc"
    # oned 3.2 does not merge these defaults into the deployment file of TYPE="xml", so the file itself has to reach the
    # hosts: scp -r follows the link and copies what the operator wrote.
    put_link "$conf" "$remotes/vmm/lxc/vmm_exec_lxc.conf" "$data_files"
    put_remote_tree "$bundle/remotes/im/lxc.d" "$remotes/im/lxc.d"
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
    local line i conf kept=()
    frontend_manifest=$remotes/onelxc/manifest
    backup=${remotes%/remotes}/onelxc-replaced
    [ -f "$frontend_manifest" ] || die "OneLXC is not installed in ${remotes%/remotes} (no $frontend_manifest)"
    take_modes
    refuse_without_rights
    read_frontend_manifest
    for ((i = ${#installed[@]} - 1; i >= 0; i--)); do
        line=${installed[i]}
        conf=${line#* }
        case $conf in
            */vmm_exec_lxc.conf)
                if [ -f "$conf" ] && [ ! -L "$conf" ] && [ "$(digest "$conf")" != "${line%% *}" ]; then
                    kept+=("$conf")
                    continue
                fi
                ;;
        esac
        [ "$conf" = "$remotes/onelxc" ] || drop_entry "$line"
    done
    drop_file "$frontend_manifest"
    drop_directory "$remotes/onelxc"
    restore_replaced
    for conf in "${kept[@]}"; do say "kept $conf, which was edited"; done
    if [ "$dry_run" = no ] && [ "$generation" = pull ]; then touch -- "$remotes"; fi
    say
    say "Remove what you added to $etc/oned.conf$([ "$generation" = pull ] || printf ' and monitord.conf'), and restart oned."
}

# From --replace: what set_aside moved away comes back.
restore_replaced() {
    local name
    [ -d "$backup" ] || return 0
    while IFS= read -r -d '' name; do
        if step "put back $remotes/$name"; then
            mkdir -p -- "$(dirname -- "$remotes/$name")"
            mv -fT -- "$backup/$name" "$remotes/$name"
        fi
    done < <(cd "$backup" && find . -mindepth 1 ! -type d -printf '%P\0' | sort -z)
    if step "remove $backup/"; then find "$backup" -depth -type d -exec rmdir {} +; fi
}

put_remote_tree() { put_tree "$1" "$2" "$data_files" "$directory_mode" "$data_mode" "$executable_mode"; }

take_modes() {
    local common=$remotes/scripts_common.sh sample
    data_files=$(owner_of "$common")
    data_mode=$(printf '%o' $((0$(mode_of "$common") & 0666)))
    executable_mode=$(printf '%o' $((0$data_mode | (0$data_mode & 0444) >> 2)))
    for sample in "$remotes/vmm/kvm/deploy" "$remotes/vmm/kvm/shutdown"; do
        if [ -f "$sample" ] && [ -x "$sample" ]; then
            executable_mode=$(mode_of "$(readlink -f -- "$sample")")
            break
        fi
    done
    directory_mode=$(mode_of "$remotes/vmm")
}

refuse_without_rights() {
    local owner=${data_files%%:*} me
    [ "$dry_run" = no ] || return 0
    me=$(id -un)
    [ "$(id -u)" -eq 0 ] || [ "$me" = "$owner" ] || die "$remotes belongs to $owner: run install.sh as root or as $owner, not as $me"
    [ -w "$remotes" ] || die "cannot write to $remotes: run install.sh as root"
}

# Kept with @remotes@ and @etc@ for the two roots, so that a moved installation still finds its files. Whoever owns the
# remotes can write it, and root reads it: nothing outside of the two roots is believed.
read_frontend_manifest() {
    local line lines=() ours=()
    if [ -f "$frontend_manifest" ]; then mapfile -t lines <"$frontend_manifest"; fi
    for line in "${lines[@]}"; do
        case $line in
            */../* | */..) ;;
            *' @remotes@/'?*) ours+=("${line%% *} $remotes/${line#* @remotes@/}") ;;
            *' @etc@/'?*) ours+=("${line%% *} $etc/${line#* @etc@/}") ;;
        esac
    done
    remember "${ours[@]}"
}

write_frontend_manifest() {
    local line kind path text=
    for line in "${manifest[@]}"; do
        kind=${line%% *} path=${line#* }
        path=${path/#"$remotes/"/@remotes@/}
        path=${path/#"$etc/"/@etc@/}
        text+="$kind $path"$'\n'
    done
    text=$(awk '!seen[$0]++' <<<"${text%$'\n'}")
    put_text "$text" "$frontend_manifest" "$data_files" "$data_mode"
}

# The stanzas stand in oned.conf.example once; here the part for this version is shown.
say_what_to_add() {
    local part="OpenNebula 3.2"
    if [ "$generation" = monitord ]; then
        part="OpenNebula 6 and 7"
        if [ "$1" = lxc ]; then part="OpenNebula 6 and 7, with --replace"; fi
    fi
    sed -n "/^#### $part: /,/^#### end/{/^#### end/!p}" "$bundle/oned.conf.example" | sed "s|^#### $part: \(.*\)\$|Add to $etc/\1|"
}
