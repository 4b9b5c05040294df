#!/bin/sh
# Puts what makes a Linux tree a sandbox into it: users, sudo, envd, wrenn-init, tini. Used by every way of making an image, so that all
# have the same layout.
#
#   inject.sh TREE ENVD WRENN_INIT [TINI]
#
# The tree may come from a container that somebody else made, and this runs as root: nothing of the tree is run, and nothing is written
# through a symbolic link of it, which could lead to a file of this machine. Where a link stands in the place of a directory that is
# needed, this refuses.
set -eu
tree=$1 envd=$2 init=$3 tini=${4:-}

refuse() {
    echo "inject.sh: $*" >&2
    exit 1
}
[ -d "$tree" ] && [ "$(readlink -f -- "$tree")" != / ] || refuse "$tree is no directory of its own"

# A directory of the tree, made when it is missing; no part of its path is a link.
dir() {
    at=$tree
    rest=$1/
    while [ -n "$rest" ]; do
        at=$at/${rest%%/*}
        rest=${rest#*/}
        if [ -L "$at" ]; then refuse "/${at#"$tree"/} of the tree is a link to $(readlink -- "$at"), where a directory is needed"; fi
        if [ ! -d "$at" ]; then mkdir -- "$at"; fi
    done
}
# A file of the tree with the content of standard input, new: what had the name is not written to.
file() {
    dir "${2%/*}"
    rm -rf -- "${tree:?}/$2"
    cat >"$tree/$2"
    chmod "$1" "$tree/$2"
}
# A line in a file of accounts, before the first one with the same number, so that the number reads as this name.
account() {
    if [ -L "$tree/etc/$1" ]; then refuse "/etc/$1 of the tree is a link"; fi
    touch "$tree/etc/$1"
    awk -F: -v line="$2" -v by="${3:-0}" '
        BEGIN { split(line, want, ":") }
        by && !done && $by == want[by] { print line; done = 1 }
        { print }
        END { if (!done) print line }' "$tree/etc/$1" >"$tree/etc/.$1.new"
    cat "$tree/etc/.$1.new" >"$tree/etc/$1"
    rm "$tree/etc/.$1.new"
}
# The field of an account's line, empty when there is none.
field() { awk -F: -v name="$2" -v field="$3" '$1 == name { print $field; exit }' "$tree/etc/$1" 2>/dev/null || :; }

for path in etc home usr/bin usr/local/bin; do dir "$path"; done

file 755 usr/local/bin/envd <"$envd"
file 755 usr/local/bin/wrenn-init <"$init"
# /sbin is a link to usr/sbin on merged trees (of Arch, both are links to usr/bin): write into the real directory.
sbin=sbin
if [ -L "$tree/sbin" ]; then sbin=usr/sbin; fi
if [ "$sbin" = usr/sbin ] && [ -L "$tree/usr/sbin" ]; then sbin=usr/bin; fi
dir "$sbin"
rm -rf -- "${tree:?}/$sbin/wrenn-init"
ln -s /usr/local/bin/wrenn-init "$tree/$sbin/wrenn-init"
if [ -n "$tini" ]; then
    file 755 usr/bin/tini <"$tini"
elif [ ! -f "$tree/usr/bin/tini" ]; then
    refuse "the tree has no /usr/bin/tini and none was given"
fi

# Users by hand, so that it works for any tree: the same ids everywhere, unless the tree has a user of that name already.
shell=/bin/sh
for path in bin/bash usr/bin/bash; do if [ -e "$tree/$path" ] || [ -L "$tree/$path" ]; then shell=/bin/bash; fi; done
[ -n "$(field passwd root 1)" ] || account passwd "root:x:0:0:root:/root:$shell" 3
[ -n "$(field group root 1)" ] || account group root:x:0: 3
for user in user:1000 wrenn-user:1001; do
    name=${user%:*} id=${user#*:}
    [ -n "$(field group "$name" 1)" ] || account group "$name:x:$id:" 3
    [ -n "$(field passwd "$name" 1)" ] || account passwd "$name:x:$id:$(field group "$name" 3)::/home/$name:$shell" 3
    if [ -f "$tree/etc/shadow" ] && [ -z "$(field shadow "$name" 1)" ]; then account shadow "$name:*:19000:0:99999:7:::"; fi
    id=$(field passwd "$name" 3)
    case $id in '' | *[!0-9]*) refuse "user $name of the tree has no number" ;; esac
    if [ ! -e "$tree/home/$name" ] && [ ! -L "$tree/home/$name" ]; then
        mkdir "$tree/home/$name"
        if [ -d "$tree/etc/skel" ] && [ ! -L "$tree/etc/skel" ]; then cp -RP "$tree/etc/skel/." "$tree/home/$name"; fi
        chown -hR "$id:$(field passwd "$name" 4)" "$tree/home/$name"
        chmod 755 "$tree/home/$name"
    fi
done
dir etc/sudoers.d
file 440 etc/sudoers.d/wrenn <<'END'
user ALL=(ALL:ALL) NOPASSWD: ALL
wrenn-user ALL=(ALL:ALL) NOPASSWD: ALL
Defaults !use_pty
END

for path in dev proc sys run tmp root code; do dir "$path"; done
chmod 1777 "$tree/tmp" "$tree/code"
chmod 700 "$tree/root"
if [ -e "$tree/usr/bin/python3" ] && [ ! -e "$tree/usr/bin/python" ] && [ ! -L "$tree/usr/bin/python" ]; then
    ln -s python3 "$tree/usr/bin/python"
fi

# Identity is given to each sandbox at its start; none is baked in. What a container's runtime had put over these is gone with it.
: | file 444 etc/machine-id
if [ -d "$tree/var" ] && [ ! -L "$tree/var" ] && [ ! -L "$tree/var/lib" ] && [ ! -L "$tree/var/lib/dbus" ]; then
    rm -f "$tree/var/lib/dbus/machine-id"
fi
file 644 etc/hostname <<'END'
sandbox
END
file 644 etc/hosts <<'END'
127.0.0.1 localhost
::1 localhost ip6-localhost ip6-loopback
127.0.1.1 sandbox
END
file 644 etc/resolv.conf <<'END'
nameserver 1.1.1.1
nameserver 8.8.8.8
END
dir etc/chrony
file 644 etc/chrony/wrenn.conf <<'END'
refclock PHC /dev/ptp0 poll 2 dpoll -2 offset 0 stratum 2
makestep 1.0 -1
driftfile /run/chrony.drift
bindcmdaddress /
pidfile /run/chronyd.pid
END

# What a package manager has left behind and can fetch again.
for path in var/cache/apt/archives var/lib/apt/lists; do
    at=$tree plain=yes
    for part in $(echo "$path" | tr / ' '); do
        at=$at/$part
        if [ -L "$at" ] || [ ! -d "$at" ]; then plain=; fi
    done
    if [ -n "$plain" ]; then find "$at" -xdev -type f ! -name lock -delete; fi
done
