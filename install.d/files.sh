# shellcheck shell=bash
# Puts files in place and removes them. Every change of install.sh goes through here, so that a dry run says exactly what
# a real one does, and a second run, finding everything as it should be, does nothing. What has been put is written down
# beforehand, see manifest.sh.

dry_run=no
quiet=no             # plan what would be done, without a word
changes=0
declare -A planned=() # directories that a dry run would have made
declare -A digests=() # path: sha256, looked up by `look` for many files at once
declare -A looked=()  # path: "yes", after look
declare -A seen=()    # path: "owner:group mode", likewise
verbose=no
group=                # "create /usr/lib/onelxc/" of the steps that have not been said yet, and their files
group_files=()
staged=               # a directory, all of whose changes are made in its copy DIRECTORY.new (see stage)

die() {
    say_group
    printf 'install.sh: %s\n' "$(as_people_know "$*")" >&2
    exit 1
}

say() {
    [ "$quiet" = no ] || return 0
    say_group
    as_people_know "$*"$'\n'
}

# try WHAT COMMAND...: what a program says when it fails is the cause in our line, not a line of its own.
try() {
    local what=$1 said
    shift
    said=$(LC_ALL=C.UTF-8 "$@" 2>&1) && return 0
    said=${said%%$'\n'*}
    die "Cannot $what: ${said##*: }; what is done so far is written down: run install.sh again, or with --uninstall"
}

# Steps of one kind in one directory, one after the other, are one line, unless --verbose wants each.
say_group() {
    case ${#group_files[@]} in
        0) if [ -n "$group" ]; then as_people_know "$group"$'\n'; fi ;;
        1) as_people_know "$group${group_files[0]}"$'\n' ;;
        *) as_people_know "$group (${#group_files[@]} files)"$'\n' ;;
    esac
    group='' group_files=()
}

# The step's line, and whether to take it.
step() {
    local line="$*" directory
    [ "$quiet" = no ] || return 1
    changes=$((changes + 1))
    [ "$dry_run" = no ] || line="would $line"
    directory=${line%/*}/
    case $verbose,$line in
        *' if it is empty then') say "$line" ;;
        no,*'create /'* | no,*'update /'* | no,*'remove /'*)
            if [ "$directory" != "$group" ]; then
                say_group
                group=$directory
            fi
            [ "$line" = "$directory" ] || group_files+=("${line##*/}")
            ;;
        *) say "$line" ;;
    esac
    [ "$dry_run" = no ]
}

bundle_version() { sed -n 's/^__version__ = "\(.*\)"$/\1/p' "${bundle:?}/onelxc/__init__.py"; }

digest() { sha256sum <"$1" | cut -d' ' -f1; }

# owner:group and mode as they are, "" where there is nothing. Of what a link leads to: a link's own mode is 777.
owner_of() { stat -L -c %U:%G -- "$1" 2>/dev/null || :; }
mode_of() { stat -L -c %a -- "$1" 2>/dev/null || :; }
link_owner() { stat -c %U:%G -- "$1"; }

# look PATH...: digests, owners and modes of these files, as far as they are there, with two processes for all of them.
look() {
    local path rest paths=()
    for path; do
        looked[$path]=yes
        if [ -f "$path" ]; then paths+=("$path"); fi
    done
    [ ${#paths[@]} -gt 0 ] || return 0
    while read -r rest path; do digests[$path]=$rest; done < <(sha256sum -- "${paths[@]}" 2>/dev/null)
    while read -r rest path; do seen[$path]=$rest; done < <(stat -c '%U:%G,%a %n' -- "${paths[@]}")
}

# put_directory PATH OWNER:GROUP MODE: one that exists is left as it is, it may be somebody else's.
put_directory() {
    if [ -n "${planned[$1]:-}" ]; then return 0; fi
    if [ -d "$1" ] && { [ ! -L "$1" ] || [ -O "$1" ]; }; then
        [ -z "${shipped[$1]:-}" ] || manifest+=("directory $1")
        return 0
    fi
    manifest+=("directory $1")
    if [ -e "$1" ] || [ -L "$1" ]; then die "$1 is in the way: a directory belongs there"; fi
    planned[$1]=yes
    if step "create $1/"; then try "make $1/" install -d -o "${2%:*}" -g "${2#*:}" -m "$3" -- "$(place "$1")"; fi
}

# put_own_directory PATH OWNER:GROUP MODE: one that is ours by its name, whoever made it: it goes when it is empty.
put_own_directory() {
    shipped[$1]=directory
    put_directory "$@"
}

# put_file SOURCE PATH OWNER:GROUP MODE: written beside and renamed, so that nobody ever reads half of it.
put_file() {
    local verb=create path
    if [ -z "${looked[$1]:-}" ] || [ -z "${looked[$2]:-}" ]; then look "$1" "$2"; fi
    [ -n "${digests[$1]:-}" ] || die "Cannot read $1: it belongs into $2"
    manifest+=("${digests[$1]} $2")
    if [ "${digests[$1]}" = "${digests[$2]:-}" ] && [ ! -L "$2" ]; then
        if [ "${seen[$2]%,*}" != "$3" ] && step "chown $3 $2"; then try "chown $2" chown -- "$3" "$(place "$2")"; fi
        if [ "${seen[$2]#*,}" != "$4" ] && step "chmod $4 $2"; then try "chmod $2" chmod -- "$4" "$(place "$2")"; fi
        return 0
    fi
    [ ! -d "$2" ] || [ -L "$2" ] || die "$2 is in the way: a file belongs there"
    if [ -e "$2" ] || [ -L "$2" ]; then verb=update; fi
    note_original "$2"
    if step "$verb $2"; then
        save_original "$2"
        path=$(place "$2")
        try "write $2" install -o "${3%:*}" -g "${3#*:}" -m "$4" -T -- "$1" "$path.onelxc-new"
        try "write $2" mv -fT -- "$path.onelxc-new" "$path"
    fi
}

# stage DIRECTORY: what is put below it from now on goes into a copy beside it, until exchange.
stage() {
    [ "$dry_run" = no ] || return 0
    staged=$1
    try "remove $1.new" rm -rf -- "$1.new"
    [ ! -d "$1" ] || try "copy $1" cp -a -- "$1" "$1.new"
}

# Where a file is written that belongs at PATH.
place() {
    case ${staged:+in}$1/ in
        "in$staged"/*) printf '%s' "$staged.new${1#"$staged"}" ;;
        *) printf '%s' "$1" ;;
    esac
}

# exchange: the copy takes the directory's place, in one step: whoever starts to read there sees the old one or the new.
exchange() {
    local directory=$staged
    staged=
    if [ ! -d "$directory" ]; then
        mv -T -- "$directory.new" "$directory"
    elif ! /usr/bin/python3 -I -c 'import ctypes, os, sys
at_fdcwd, rename_exchange = -100, 2
old, new = map(os.fsencode, sys.argv[1:])
sys.exit(ctypes.CDLL(None).renameat2(at_fdcwd, old, at_fdcwd, new, rename_exchange) != 0)' "$directory" "$directory.new"; then
        # a file system that cannot, as ZFS before 2.2
        mv -T -- "$directory" "$directory.old"
        mv -T -- "$directory.new" "$directory"
    fi
    rm -rf -- "$directory.new" "$directory.old"
}

# put_text TEXT PATH OWNER:GROUP MODE
put_text() {
    local file
    file=$(mktemp) || die "Cannot make a temporary file in ${TMPDIR:-/tmp}"
    { printf '%s\n' "$1" >"$file"; } 2>/dev/null || die "Cannot write $file: is ${TMPDIR:-/tmp} full?"
    put_file "$file" "$2" "$3" "$4"
    unset "looked[$file]"
    try "remove $file" rm -f -- "$file"
}

# put_configuration SOURCE PATH OWNER:GROUP MODE: a file that the operator edits. One that still is what the last
# installation put there is replaced, an edited one is kept.
put_configuration() {
    look "$1" "$2"
    [ -n "${digests[$1]:-}" ] || die "Cannot read $1: it belongs into $2"
    if [ -e "$2" ] && [ "${digests[$2]:-}" != "${digests[$1]}" ] && ! was_put "${digests[$2]:-}" "$2"; then
        manifest+=("${digests[$1]} $2")
        say "kept $2, which was edited (this version's own is $1)"
        return 0
    fi
    put_file "$@"
}

# put_link TARGET PATH OWNER:GROUP
put_link() {
    manifest+=("link $2")
    if [ -L "$2" ] && [ "$(readlink -- "$2")" = "$1" ]; then
        if [ "$(link_owner "$2")" != "$3" ] && step "chown $3 $2"; then try "chown $2" chown -h -- "$3" "$2"; fi
        return 0
    fi
    if [ -d "$2" ] && [ ! -L "$2" ]; then die "$2 is in the way: a link to $1 belongs there"; fi
    note_original "$2"
    if step "link $2 -> $1"; then
        save_original "$2"
        try "write $2" ln -sfnT -- "$1" "$2.onelxc-new"
        [ "$(link_owner "$2.onelxc-new")" = "$3" ] || try "chown $2" chown -h -- "$3" "$2.onelxc-new"
        try "write $2" mv -fT -- "$2.onelxc-new" "$2"
    fi
}

# put_tree SOURCE PATH OWNER:GROUP DIRECTORY-MODE FILE-MODE EXECUTABLE-MODE: the files below SOURCE, without what
# Python leaves beside them.
put_tree() {
    local name mode names=()
    # a directory's files before the directories in it
    mapfile -d '' names < <(cd "$1" && find . -mindepth 1 -name __pycache__ -prune -o -name '*.pyc' -o \
        -type d -printf '%p/\t\t%P\0' -o -printf '%h/\t%f\t%P\0' | sort -z | sed -z 's/.*\t//')
    look "${names[@]/#/"$1/"}" "${names[@]/#/"$2/"}"
    put_directory "$2" "$3" "$4"
    for name in "${names[@]}"; do
        if [ -d "$1/$name" ]; then
            put_directory "$2/$name" "$3" "$4"
        else
            mode=$5
            [ ! -x "$1/$name" ] || mode=$6
            put_file "$1/$name" "$2/$name" "$3" "$mode"
        fi
    done
}

drop_file() {
    if [ -e "$1" ] || [ -L "$1" ]; then
        if step "remove $1"; then try "remove $1" rm -f -- "$1"; fi
    fi
}

# A directory goes when nothing is left in it but Python's cache; it may hold what is not ours.
drop_directory() {
    [ -d "$1" ] && [ ! -L "$1" ] || return 0
    if [ "$dry_run" = yes ]; then
        step "remove $1/ if it is empty then" || return 0
    fi
    [ ! -d "$1/__pycache__" ] || try "remove $1/__pycache__" rm -rf -- "$1/__pycache__"
    if [ -z "$(find "$1/" -mindepth 1 -print -quit)" ]; then
        try "remove $1/" rmdir -- "$1"
        changes=$((changes + 1))
        say "remove $1/"
    fi
}
