#!/bin/sh
# Makes an image that was copied from another one more than that: installs Debian packages and runs a recipe in it.
#
#   derive.sh IMAGE RECIPE      RECIPE: a directory with `packages`, one a line, and perhaps `setup.sh`
#
# The image is our own, so it may be mounted. All of that is done in namespaces of its own for mounts and processes, which end with whoever
# called this: the kernel then ends what still runs in them, unmounts, and gives the loop device back. No trap could, after a kill.
set -eu
if [ "${3:-}" != inside ]; then
    exec setpriv --pdeathsig KILL \
        unshare --mount --propagation private --pid --fork --kill-child -- "$0" "$1" "$2" inside
fi
image=$1 recipe=$2
# Beside the image, where whoever made the copy tidies up also after a kill.
tree=$image.tree
mkdir "$tree"
mount -o loop,noatime "$image" "$tree"
mount -t proc proc "$tree/proc"
mount --rbind /dev "$tree/dev"
mount -t tmpfs tmpfs "$tree/run"
# From the image's own sources, by the names that this machine knows and through its proxy.
mkdir "$tree/run/apt"
cp -L /etc/resolv.conf "$tree/run/resolv.conf"
mount --bind "$tree/run/resolv.conf" "$tree/etc/resolv.conf"
apt-config dump | grep -E '^(Acquire|APT::Get|DPkg::Lock)' >"$tree/run/apt/host.conf" || :
# Nothing of a package is started here.
printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d"
chmod 755 "$tree/usr/sbin/policy-rc.d"

inside() {
    chroot "$tree" env DEBIAN_FRONTEND=noninteractive LC_ALL=C APT_CONFIG=/run/apt/host.conf HOME=/root \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@" </dev/null
}
inside apt-get -qq update
# Nobody needs the image before it is whole: without a sync for each file it takes half the time.
without="-o DPkg::Options::=--force-unsafe-io"
for name in doc man locale info; do without="$without -o DPkg::Options::=--path-exclude=/usr/share/$name/*"; done
# shellcheck disable=SC2046,SC2086 # one word each
inside apt-get -qq -y --no-install-recommends $without install $(cat "$recipe/packages")
if [ -f "$recipe/setup.sh" ]; then
    cp "$recipe/setup.sh" "$tree/run/setup.sh"
    inside /bin/sh -eu /run/setup.sh
fi
rm -rf "$tree/usr/sbin/policy-rc.d" "$tree"/var/lib/apt/lists/* "$tree"/var/cache/apt/*.bin "$tree"/var/cache/apt/archives/*.deb \
    "$tree"/var/log/apt "$tree"/var/log/dpkg.log "$tree"/var/lib/dpkg/*-old
umount "$tree/etc/resolv.conf"
umount -R "$tree/run" "$tree/dev" "$tree/proc"
# What was written and removed again takes no room in the file; before it is committed to the journal, the kernel would not give it up.
sync -f "$tree"
fstrim "$tree"
# Not by the end of the namespace: what cannot be unmounted is not whole.
umount "$tree"
rmdir "$tree"
