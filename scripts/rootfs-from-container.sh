#!/bin/sh
# Makes the template NAME of what a container of docker or podman holds: its files, with envd, wrenn-init, tini and the users of a
# sandbox put in, as WRENN_DIR/images/NAME/rootfs.ext4. The file is sparse and holds the content alone, whatever the size of the disk.
#
#   scripts/rootfs-from-container.sh [--size-mib N] CONTAINER NAME
#
# The container may be stopped, and is not changed. What its image says beside files (environment, user, working directory, command) does
# not come along. WRENN_DIR is /var/lib/wrenn unless set; CONTAINER_TOOL names the tool when it is not the one that knows the container.
set -eu
# Programs of administrators and of Rust are not on every root's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
root=$(dirname -- "$(readlink -f -- "$0")")/..

refuse() {
    echo "rootfs-from-container: $1" >&2
    exit "${2:-1}"
}
usage='usage: scripts/rootfs-from-container.sh [--size-mib N] CONTAINER NAME'
size=
while [ "$#" -gt 0 ]; do
    case $1 in
    -h | --help)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    --size-mib)
        [ "$#" -ge 2 ] || refuse "$usage" 64
        size=$2
        shift 2
        ;;
    --size-mib=*)
        size=${1#*=}
        shift
        ;;
    -*) refuse "unknown option $1; $usage" 64 ;;
    *) break ;;
    esac
done
[ "$#" -eq 2 ] || refuse "$usage" 64
container=$1 name=$2
# Said before the long work begins; xtask checks it again.
case $name in
minimal | python | node) refuse "$name is made by \`make images\` only: choose another name" 64 ;;
'' | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) refuse "'$name' is no name of a template: letters, digits, '.', '-', '_', a letter or digit first" 64 ;;
esac
case $container in '' | -*) refuse "'$container' is no name of a container" 64 ;; esac
case $size in *[!0-9]*) refuse "--size-mib takes a number" 64 ;; esac
[ "$(id -u)" -eq 0 ] || refuse "images are written as root: run this as root"

tool=${CONTAINER_TOOL:-}
if [ -z "$tool" ]; then
    known=
    for one in docker podman; do
        command -v "$one" >/dev/null || continue
        known="$known $one"
        if "$one" container inspect "$container" >/dev/null 2>&1; then
            tool=$one
            break
        fi
    done
    [ -n "$known" ] || refuse "neither docker nor podman is installed"
    [ -n "$tool" ] || refuse "no container '$container' is known to:$known"
fi

dir=${WRENN_DIR:-/var/lib/wrenn}
mkdir -p "$dir/images"
dir=$(readlink -f -- "$dir")
# Beside the images, because that is where there must be room for them; removed in any case. What a killed run has left is known by its
# lock, which ended with it; a minute's grace is for one that has not locked yet.
find "$dir" -maxdepth 1 -type d -name '.container-*' -mmin +1 -exec flock --nonblock {} rm -rf --one-file-system -- {} ';'
work=$(mktemp -d "$dir/.container-XXXXXXXX")
trap 'rm -rf --one-file-system -- "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
exec 9<"$work"
flock --nonblock 9

echo "rootfs-from-container: exporting $container" >&2
mkdir "$work/tree"
"$tool" export --output "$work/export.tar" "$container"
# Numbers, not names, say who owns what: the names of this machine are others.
tar -C "$work/tree" --numeric-owner --same-permissions --xattrs --xattrs-include='*' -xf "$work/export.tar"
rm -f "$work/export.tar"

echo "rootfs-from-container: writing the image" >&2
"$root/scripts/xtask" image-from-tree --tree "$work/tree" --name "$name" --out "$dir" ${size:+--size-mib "$size"}
