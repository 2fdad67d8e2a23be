# shellcheck shell=bash
# Runs parts of install.sh as the user who owns what they work on.
#
# Whoever owns a directory can exchange what lies in it at any moment: root that works there is sent where that user
# likes, and runs what that user has put there. So root goes down a path as far as it is root's alone, and what begins
# there is left to a process of its owner, which the kernel holds to its rights. That process gets the bundle as a copy,
# root's environment and terminal it does not get.

declare -A shown=()   # what a path begins with in a process of another user: how people know it
part_owner=           # what find_owner found: a user's name, the directory where its part begins, and what follows below
part_top=
part_rest=

# find_owner PATH: the first component that is not root's, links followed; root, if there is none.
find_owner() {
    local path=$1 here=/ name links=0 uid gid mode
    part_owner=root part_top=$1 part_rest=
    while :; do
        path=${path#"${path%%[!/]*}"}
        [ -n "$path" ] || return 0
        name=${path%%/*}
        path=${path#"$name"}
        case $name in
            .) continue ;;
            ..)
                here=${here%/} here=${here%/*}/
                continue
                ;;
        esac
        # whoever makes what is not there is the owner of what it is made in
        read -r uid gid mode < <(stat -c '%u %g %f' -- "$here$name" 2>/dev/null) || return 0
        mode=$((0x$mode))
        if [ "$uid" != 0 ]; then
            part_owner=$(stat -c %U -- "$here$name") part_top=$here$name part_rest=${path#/}
            [ "$part_owner" != UNKNOWN ] || die "$here$name belongs to user $uid, who has no name on this machine"
            return 0
        fi
        case $((mode & 0170000)) in
            $((0120000)))
                links=$((links + 1))
                [ "$links" -le 40 ] || die "$1: too many symbolic links"
                path=$(readlink -- "$here$name")$path
                case $path in /*) here=/ ;; esac
                ;;
            $((0040000)))
                # others could put theirs in root's place, unless the directory is sticky as /tmp
                if [ $((mode & 01002)) -eq 2 ] || { [ $((mode & 01020)) -eq $((020)) ] && [ "$gid" != 0 ]; }; then
                    die "$here$name is root's, but others can write to it: chmod go-w $here$name"
                fi
                here=$here$name/
                ;;
        esac
    done
}

# as_part etc|remotes FUNCTION ARGUMENT...: as the owner of that part of OpenNebula. A process of another user gets what it works on by descriptors, so that no path that only root can pass is in its way.
as_part() {
    local of=$1 user fd=10 name path names=()
    shift
    if [ "$(id -u)" -ne 0 ]; then
        (in_part "$@")
        return
    fi
    find_owner "${!of}"
    user=$part_owner
    if [ "$user" = root ]; then
        refuse_mixed "${!of}"
        (in_part "$@")
        return
    fi
    publish_bundle
    (
        exec 3<"$published"
        names=("/proc/self/fd/3=$bundle")
        for name in etc remotes lib; do
            path=${!name}
            find_owner "$path"
            if [ "$part_owner" != root ]; then
                eval "exec $fd<\"\$part_top\""
                names+=("/proc/self/fd/$fd/..=$(dirname -- "$part_top")" "/proc/self/fd/$fd=$part_top")
                path=/proc/self/fd/$fd${part_rest:+/$part_rest}
                fd=$((fd + 1))
            fi
            names+=("$name:$path")
        done
        exec </dev/null
        as_user "$user" setpriv --no-new-privs bash /proc/self/fd/3/install.sh part "$dry_run" "$verbose" "${names[@]}" -- "$@"
    )
}

# part DRY-RUN VERBOSE NAME... -- FUNCTION ARGUMENT...: the other end of as_part.
part() {
    dry_run=$1 verbose=$2
    shift 2
    while [ "$1" != -- ]; do
        case $1 in
            *=*) shown[${1%%=*}]=${1#*=} ;;
            etc:* | remotes:* | lib:*) printf -v "${1%%:*}" %s "${1#*:}" ;;
        esac
        shift
    done
    shift
    in_part "$@"
}

# in_part FUNCTION ARGUMENT...: in a shell of its own, which ends with the first error.
in_part() {
    set -e
    "$@"
    say_group
}

# as_people_know TEXT: with the paths of descriptors in it as they are called.
as_people_know() {
    local text=$1 path
    for path in "${!shown[@]}"; do
        case $path in */..) text=${text//"$path"/"${shown[$path]}"} ;; esac
    done
    for path in "${!shown[@]}"; do text=${text//"$path"/"${shown[$path]}"}; done
    printf '%s' "$text"
}

# as_user USER COMMAND...: in a session of its own, without root's environment, terminal and groups. It ends with the
# process that called it. Its stdin is what the caller gives it, if that is no terminal.
as_user() (
    user=$1 group=$(id -g -- "$1")
    shift
    set -o pipefail
    if [ -t 0 ]; then exec </dev/null; fi
    {
        {
            setsid -w setpriv --reuid "$user" --regid "$group" --init-groups --inh-caps=-all \
                --pdeathsig TERM env -i PATH="$PATH" HOME=/ LC_ALL=C.UTF-8 "$@" 2>&1 >&4 4>&- | cat >&2
        } 4>&1 | cat
    }
)

# A copy of what install.sh needs of the bundle, which everybody can read and only root can change.
published=
publish_bundle() {
    local name
    [ -z "$published" ] || return 0
    published=$(mktemp -d) || die "Cannot make a temporary directory in ${TMPDIR:-/tmp}"
    for name in install.sh install.d etc remotes onelxc oned.conf.example; do
        [ ! -e "$bundle/$name" ] || try "copy $bundle" cp -R -- "$bundle/$name" "$published/$name"
    done
    try "copy $bundle" chmod -R u=rwX,go=rX -- "$published"
}

# refuse_mixed PATH: root's own tree must not hold directories that others can change; root works in it by path.
refuse_mixed() {
    local found link
    [ -d "$1" ] || return 0
    found=$(find "$1" -type d \( ! -uid 0 -o -perm -002 -o -perm -020 ! -gid 0 \) -print -quit)
    if [ -n "$found" ]; then
        die "$1 is root's, but $found can be changed by $(stat -c 'user %U and group %G' -- "$found"): chown one or the other"
    fi
    while IFS= read -r -d '' link; do
        found=$(readlink -m -- "$link")
        find_owner "$found"
        [ "$part_owner" = root ] || die "$1 is root's, but $link leads to ${part_top}, which belongs to $part_owner"
    done < <(find "$1" -type l -xtype d -print0)
}

# drop_caches_of_root PATH NAME: Python's caches below PATH/NAME that root's own runs left, which their directory's owner
# may not remove. find holds the directories that it is in, and follows no link.
drop_caches_of_root() (
    find_owner "$1"
    [ "$part_owner" != root ] || return 0
    exec 3<"$part_top"
    here=/proc/self/fd/3/ way=()
    rest=$part_rest/$2
    for name in ${rest//\// }; do
        here+=$name
        way+=(-path "$here" -o)
        here+=/
    done
    find /proc/self/fd/3/ -mindepth 1 ! \( "${way[@]}" -path "$here*" \) -prune -o \
        -type d -user root -name __pycache__ -prune -execdir rm -rf -- {} \; 2>/dev/null || :
)
