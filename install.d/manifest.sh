# shellcheck shell=bash disable=SC2034,SC2154  # files.sh and whoever calls set the rest
# What install.sh put, and what was there before: written down before the first thing is put, so that an installation
# that was broken off at any moment can be continued, and undone by --uninstall.
#
# A manifest has a line for each path: "<sha256> PATH", "link PATH", "directory PATH" (those that we made), and
# "replaced PATH" for a file of somebody else's that ours took the place of. Such a file is copied to the directory
# `backup` before. While an installation is under way, the manifest has the lines of the last one and of this one.

manifest=()           # what is installed now, in lines as above
installed=()          # the same of the last installation
declare -A shipped=() # path: " digest digest " of it, "link" or "directory"
declare -A replaced=() # path: yes
manifest_file=        # where it lies, and owner:group and mode
manifest_owner=root:root
manifest_mode=644
manifest_token=       # PATH is "@remotes@/…" for a file below manifest_root: a moved installation still finds its files
manifest_root=
backup=               # the directory for what is not ours; "": nothing is kept
declare -A still=()   # path: yes, of what this version has
first_time=yes        # there is no manifest yet

# read_manifest: whoever owns the place can write it, and it is read by nobody with more rights than that. Nothing
# outside of the root is meant by it.
read_manifest() {
    local line lines=() path
    installed=() shipped=() replaced=() first_time=yes
    [ -f "$manifest_file" ] || return 0
    first_time=no
    mapfile -t lines <"$manifest_file" || die "Cannot read $manifest_file"
    for line in "${lines[@]}"; do
        path=${line#* }
        case $path in
            */../* | */..) continue ;;
            "$manifest_token"/?*) path=$manifest_root${path#"$manifest_token"} ;;
            *) continue ;;
        esac
        installed+=("${line%% *} $path")
        case ${line%% *} in
            replaced) replaced[$path]=yes ;;
            *) shipped[$path]="${shipped[$path]:- }${line%% *} " ;;
        esac
    done
    hold_links "${installed[@]#* }"
}

# hold_links PATH...: below manifest_root a link is followed to what belongs to whoever owns the root, and nowhere else. The
# kernel would hold it, too; here it is said in a line, before anything is done.
hold_links() {
    local path here part rest
    local -A seen_directories=()
    for path; do
        here=${path%/*}
        [ -z "${seen_directories[$here]:-}" ] || continue
        seen_directories[$here]=yes
        rest=${here#"$manifest_root"} here=$manifest_root
        while [ -n "$rest" ]; do
            rest=${rest#/} part=${rest%%/*}
            rest=${rest#"$part"} here+=/$part
            if [ -L "$here" ] && { [ ! -d "$here" ] || [ ! -O "$here" ]; }; then
                die "$here is a link to what does not belong to $(id -un): $path is not touched"
            fi
        done
    done
}

# carry_out COMMAND ARGUMENT...: what COMMAND puts is written down, then put; what an older version put goes at the end.
carry_out() {
    local old=("${installed[@]}") was=$dry_run directory=${manifest_file%/*} line kept=()
    # its own first: a directory with nothing in it is all that is left of an installation broken off before the next line
    [ -n "$(find "$directory/" -mindepth 1 ! -name '*.onelxc-new' -print -quit 2>/dev/null)" ] || put_own_directory "$directory" "$manifest_owner" "${directory_mode:-755}"
    dry_run=yes quiet=yes
    "$@"
    dry_run=$was quiet=no planned=() looked=() digests=() seen=()
    if [ "$dry_run" = yes ]; then planned[$directory]=yes; fi
    hold_links "${manifest[@]#* }"
    write_manifest "${old[@]}" "${manifest[@]}"
    for line in "${old[@]}" "${manifest[@]}"; do case $line in 'replaced '*) kept+=("$line") ;; esac; done
    manifest=("${kept[@]}")
    "$@"
    drop_stale
    write_manifest "${manifest[@]}"
}

# write_manifest LINE...: the file is on the disk before anything that it names.
write_manifest() {
    local line text='' new=$manifest_file.onelxc-new
    [ "$dry_run" = no ] || return 0
    for line; do text+="${line%% *} $manifest_token${line#* "$manifest_root"}"$'\n'; done
    # a directory before what is in it: they go in the reverse order
    text=$(LC_ALL=C sort -k2 <<<"${text%$'\n'}" | uniq) || die "Cannot write $manifest_file: is ${TMPDIR:-/tmp} full?"
    ! [ "$text" = "$(cat -- "$manifest_file" 2>/dev/null)" ] || return 0
    try "write $manifest_file" rm -f -- "$new"
    (umask 077 && printf '%s\n' "$text" >"$new") 2>/dev/null || die "Cannot write $manifest_file: is the disk full?"
    try "write $manifest_file" chmod "$manifest_mode" -- "$new"
    try "write $manifest_file" chown "$manifest_owner" -- "$new"
    try "write $manifest_file" sync -- "$new"
    try "write $manifest_file" mv -fT -- "$new" "$manifest_file"
}

# was_put DIGEST PATH: whether an installation put that there.
was_put() {
    case ${shipped[$2]:-} in *" $1 "*) return 0 ;; esac
    return 1
}

digest_or_link() { if [ -L "$1" ]; then printf link; elif [ -f "$1" ]; then digest "$1"; fi; }

is_ours() { was_put "$(digest_or_link "$1")" "$1"; }

is_there() { [ -e "$1" ] || [ -L "$1" ]; }

backup_of() { printf '%s/%s' "$backup" "${1#"$manifest_root"/}"; }

# keeps PATH: whether what lies there is kept before it goes: not so on a host where only install.sh puts anything.
keeps() { case $1 in "${library:-/nowhere}"/*) return 1 ;; *) [ -n "$backup" ] ;; esac; }

# note_original PATH: what lies there now and is somebody else's is written down as such.
note_original() {
    if keeps "$1" && is_there "$1" && ! is_ours "$1" && ! is_edited "$1"; then manifest+=("replaced $1"); fi
}

# is_edited PATH: a file that is not as we put it, in a place where none of others' can be.
is_edited() {
    [ -n "${shipped[$1]:-}" ] || return 1
    [ -z "${replaced[$1]:-}" ] || grep -qs '^from onelxc' -- "$1"
}

# save_original PATH: before ours takes the place of what is not ours. It stays where it is until then.
save_original() {
    local kept
    if ! keeps "$1" || ! is_there "$1" || is_ours "$1"; then return 0; fi
    if is_edited "$1"; then
        keep_edited "$1"
        return 0
    fi
    kept=$(backup_of "$1")
    [ -d "${kept%/*}" ] || try "make ${kept%/*}" mkdir -p -- "${kept%/*}"
    try "keep $1 in $backup" cp -a -T -- "$1" "$kept.onelxc-new"
    try "keep $1 in $backup" mv -fT -- "$kept.onelxc-new" "$kept"
}

# keep_edited PATH: a file of ours that somebody changed.
keep_edited() {
    local kept=$backup/edited/${1#"$manifest_root"/}
    step "keep $1, which was edited, as $kept" || return 0
    [ -d "${kept%/*}" ] || try "make ${kept%/*}" mkdir -p -- "${kept%/*}"
    try "keep $1" mv --backup=numbered -T -- "$1" "$kept"
}

# set_aside DIRECTORY HOW: what lies there and is not ours goes to the backup. HOW is "all", or "noted" for what the
# first installation, broken off, had written down as somebody else's.
set_aside() {
    local name path
    [ -d "$1" ] || return 0
    [ ! -L "$1" ] || die "$1 is a link: it is not known what it stands for, so it cannot be replaced"
    while IFS= read -r -d '' name; do
        path=$1/$name
        case $name in *.onelxc-new) continue ;; esac
        if is_ours "$path"; then continue; fi
        if [ "$2" = noted ] && { [ -z "${replaced[$path]:-}" ] || is_there "$(backup_of "$path")"; }; then continue; fi
        note_original "$path"
        if step "set aside $path"; then
            save_original "$path"
            try "set aside $path" rm -f -- "$path"
            unset "looked[$path]" "digests[$path]"
        fi
    done < <(cd "$1" && find . -mindepth 1 -name __pycache__ -prune -o ! -type d -printf '%P\0' | sort -z)
}

# drop_stale: what an earlier installation put and this one no longer has.
drop_stale() {
    local line
    for line in "${manifest[@]}"; do still[${line#* }]=yes; done
    drop_installed
}

# drop_installed: what was installed and is not needed still, the last thing first. The manifest's own directory is left.
drop_installed() {
    local i path
    for ((i = ${#installed[@]} - 1; i >= 0; i--)); do
        path=${installed[i]#* }
        if [ -z "${still[$path]:-}" ] && [ "$path" != "${manifest_file%/*}" ]; then drop_entry "${installed[i]}"; fi
    done
}

# drop_entry LINE: a file is removed if it is what was put there. What ours had replaced comes back in its place.
drop_entry() {
    local path=${1#* } kept=
    case ${1%% *} in
        directory) drop_directory "$path" && return 0 ;;
        replaced) return 0 ;;
    esac
    if keeps "$path"; then kept=$(backup_of "$path"); fi
    if [ "$dry_run" = no ] && is_there "$path.onelxc-new"; then try "remove $path.onelxc-new" rm -f -- "$path.onelxc-new"; fi
    if is_there "$path" && ! is_ours "$path"; then
        if is_configuration "$path"; then
            say "kept $path, which was edited"
            return 0
        fi
        if keeps "$path"; then
            if ! is_edited "$path"; then return 0; fi
            keep_edited "$path"
        fi
    fi
    if [ -n "$kept" ] && is_there "$kept"; then
        put_back "$kept" "$path"
    else
        drop_file "$path"
    fi
}

is_configuration() { case $1 in */vmm_exec_lxc.conf | */etc/im/*.conf | /etc/onelxc/* | /etc/apparmor.d/*) ;; *) return 1 ;; esac; }

# put_back KEPT PATH
put_back() {
    step "put back $2" || return 0
    [ -d "${2%/*}" ] || try "make ${2%/*}" mkdir -p -- "${2%/*}"
    try "put back $2" mv -fT -- "$1" "$2"
}

# restore_replaced: what is still in the backup comes back, unless something has come to its place.
restore_replaced() {
    local name
    [ -n "$backup" ] && [ -d "$backup" ] || return 0
    [ ! -L "$backup" ] || [ -O "$backup" ] || die "$backup is a link to what does not belong to $(id -un)"
    while IFS= read -r -d '' name; do
        case $name in *.onelxc-new) rm -f -- "$backup/$name" && continue ;; esac
        hold_links "$manifest_root/$name"
        if is_there "$manifest_root/$name"; then
            say "kept $backup/$name: $manifest_root/$name is not OneLXC's"
        else
            put_back "$backup/$name" "$manifest_root/$name"
        fi
    done < <(cd "$backup" && find . -mindepth 1 -path ./edited -prune -o ! -type d -printf '%P\0' | sort -z)
    if [ -d "$backup/edited" ]; then say "kept $backup/edited, files of OneLXC's that were edited"; fi
    if step "remove $backup/"; then find "$backup" -depth -type d -empty -delete; fi
}
