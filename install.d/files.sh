# shellcheck shell=bash
# How is a file put in place or removed? Every change of install.sh goes through here, so that a dry run says exactly
# what a real one does, and a second run, finding everything as it should be, does nothing.

dry_run=no
changes=0
manifest=()  # what is installed now, an entry "<sha256, link or directory> <path>" each; directories only if we made them
installed=() # the same of the last installation

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

say() { printf '%s\n' "$*"; }

# The step's line, and whether to take it.
step() {
    changes=$((changes + 1))
    if [ "$dry_run" = yes ]; then
        say "would $*"
        return 1
    fi
    say "$*"
}

bundle_version() { sed -n 's/^__version__ = "\(.*\)"$/\1/p' "${bundle:?}/onelxc/__init__.py"; }

digest() { sha256sum <"$1" | cut -d' ' -f1; }

# owner:group and mode as they are, "" where there is nothing.
owner_of() { stat -c %U:%G -- "$1" 2>/dev/null || :; }
mode_of() { stat -c %a -- "$1" 2>/dev/null || :; }

# put_owner PATH OWNER:GROUP MODE: only where they differ.
put_owner() {
    if [ "$(owner_of "$1")" != "$2" ]; then
        if step "chown $2 $1"; then chown -h -- "$2" "$1"; fi
    fi
    if [ ! -L "$1" ] && [ "$(mode_of "$1")" != "$3" ]; then
        if step "chmod $3 $1"; then chmod -- "$3" "$1"; fi
    fi
}

# put_directory PATH OWNER:GROUP MODE: one that exists is left as it is, it may be somebody else's.
put_directory() {
    if [ -d "$1" ] && [ ! -L "$1" ]; then
        [ -z "$(shipped_digest "$1")" ] || manifest+=("directory $1")
        return 0
    fi
    manifest+=("directory $1")
    if [ -e "$1" ] || [ -L "$1" ]; then die "$1 is in the way: a directory belongs there"; fi
    if step "create $1/"; then
        mkdir -- "$1"
        chmod -- "$3" "$1"
        [ "$(owner_of "$1")" = "$2" ] || chown -- "$2" "$1"
    fi
}

# put_file SOURCE PATH OWNER:GROUP MODE: written beside and renamed, so that nobody ever reads half of it.
put_file() {
    local verb=create
    manifest+=("$(digest "$1") $2")
    if [ -f "$2" ] && [ ! -L "$2" ] && cmp -s -- "$1" "$2"; then
        put_owner "$2" "$3" "$4"
        return 0
    fi
    [ ! -d "$2" ] || die "$2 is in the way: a file belongs there"
    if [ -e "$2" ] || [ -L "$2" ]; then verb=update; fi
    if step "$verb $2"; then
        rm -f -- "$2.onelxc-new"
        (umask 077 && cat -- "$1" >"$2.onelxc-new")
        [ "$(owner_of "$2.onelxc-new")" = "$3" ] || chown -- "$3" "$2.onelxc-new"
        chmod -- "$4" "$2.onelxc-new"
        mv -fT -- "$2.onelxc-new" "$2"
    fi
}

# put_text TEXT PATH OWNER:GROUP MODE
put_text() {
    local file
    file=$(mktemp)
    printf '%s\n' "$1" >"$file"
    put_file "$file" "$2" "$3" "$4"
    rm -f -- "$file"
}

# put_configuration SOURCE PATH OWNER:GROUP MODE SHIPPED: a file that the operator edits. SHIPPED is the digest of what
# was installed last time ("" the first time): a file that still has it is replaced, an edited one is kept.
put_configuration() {
    if [ -e "$2" ] && ! cmp -s -- "$1" "$2" && [ "$(digest "$2")" != "$5" ]; then
        manifest+=("${5:-$(digest "$1")} $2")
        say "kept $2, which was edited (this version's own is $1)"
        return 0
    fi
    put_file "$@"
}

# put_link TARGET PATH OWNER:GROUP
put_link() {
    manifest+=("link $2")
    if [ -L "$2" ] && [ "$(readlink -- "$2")" = "$1" ]; then
        [ "$(owner_of "$2")" = "$3" ] || { if step "chown $3 $2"; then chown -h -- "$3" "$2"; fi; }
        return 0
    fi
    [ ! -d "$2" ] || [ -L "$2" ] || die "$2 is in the way: a link to $1 belongs there"
    if step "link $2 -> $1"; then
        ln -sfnT -- "$1" "$2"
        [ "$(owner_of "$2")" = "$3" ] || chown -h -- "$3" "$2"
    fi
}

# put_tree SOURCE PATH OWNER:GROUP DIRECTORY-MODE FILE-MODE EXECUTABLE-MODE: the files below SOURCE, without what
# Python leaves beside them.
put_tree() {
    local name mode
    put_directory "$2" "$3" "$4"
    while IFS= read -r -d '' name; do
        if [ -d "$1/$name" ]; then
            put_directory "$2/$name" "$3" "$4"
        else
            mode=$5
            [ ! -x "$1/$name" ] || mode=$6
            put_file "$1/$name" "$2/$name" "$3" "$mode"
        fi
    done < <(cd "$1" && find . -mindepth 1 -name __pycache__ -prune -o \( -type d -o -type f -o -type l \) ! -name '*.pyc' -printf '%P\0' | sort -z)
}

drop_file() {
    if [ -e "$1" ] || [ -L "$1" ]; then
        if step "remove $1"; then rm -f -- "$1"; fi
    fi
}

# A directory goes when nothing is left in it but Python's cache; it may hold what is not ours.
drop_directory() {
    [ -d "$1" ] && [ ! -L "$1" ] || return 0
    if [ "$dry_run" = yes ]; then
        step "remove $1/ if it is empty then" || return 0
    fi
    rm -rf -- "$1/__pycache__"
    if rmdir -- "$1" 2>/dev/null; then
        changes=$((changes + 1))
        say "remove $1/"
    fi
}

# read_manifest FILE: into the array `installed`, newest first when removing.
read_manifest() {
    installed=()
    if [ -f "$1" ]; then mapfile -t installed <"$1"; fi
}

# shipped_digest PATH: what the last installation put there, nothing if it did not.
shipped_digest() {
    local line
    for line in "${installed[@]}"; do
        [ "${line#* }" != "$1" ] || printf '%s' "${line%% *}"
    done
}

# drop_stale: what the last installation put and this one no longer has.
drop_stale() {
    local line now
    now=$(printf '%s\n' "${manifest[@]#* }")
    for ((i = ${#installed[@]} - 1; i >= 0; i--)); do
        line=${installed[i]}
        grep -qxF -- "${line#* }" <<<"$now" || drop_entry "$line"
    done
}

# drop_entry MANIFEST-LINE
drop_entry() {
    case ${1%% *} in
        directory) drop_directory "${1#* }" ;;
        *) drop_file "${1#* }" ;;
    esac
}
