#!/bin/sh
# Publishes the minimal image anew, with a fresh envd and images/wrenn-init.sh: a new file with a new digest takes the place of the old
# one in WRENN_DIR, and sandboxes that run or are paused keep the image they were made from. When nothing has changed, nothing is done.
#
#   make build-envd && scripts/update-minimal-rootfs.sh [ENVD]
#
# ENVD is the static program to put in: builds/envd when that is there, else it is built. WRENN_DIR is /var/lib/wrenn unless set.
set -eu
# Programs of administrators and of Rust are not on every root's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
case ${1:-} in
-h | --help)
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
if [ "$#" -gt 1 ]; then
    echo "usage: scripts/update-minimal-rootfs.sh [ENVD]" >&2
    exit 64
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "update-minimal-rootfs: images are written as root: run this as root" >&2
    exit 1
fi

envd=
if [ "$#" -eq 1 ]; then
    envd=$(readlink -e -- "$1") || {
        echo "update-minimal-rootfs: there is no $1: \`make build-envd\` makes one" >&2
        exit 1
    }
fi
cd "$(dirname -- "$(readlink -f -- "$0")")/.."
if [ -z "$envd" ] && [ -e builds/envd ]; then envd=builds/envd; fi
publish() { scripts/xtask images --rootfs-only ${envd:+--envd "$envd"} "$@"; }

publish --out "${WRENN_DIR:-/var/lib/wrenn}"
# And where `wrenn up` takes images from, so that its next start does not put the old one back.
publish
