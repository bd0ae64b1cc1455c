#!/bin/sh
# Boots the test host. Three stages of one script, each in narrower namespaces than the one before:
#   keeper ROOT RUN   holds the host's disk (a tmpfs) over reboots; boots and kills it as told on stdin; cleans up at EOF,
#                     so that nothing stays behind even when the test was killed
#   enter ROOT RUN    the host's PID 1 before it is one: joins the host's cgroup, which becomes its cgroup namespace's root
#   init ROOT RUN     mounts what systemd expects to find, and becomes systemd
# On its stdout (fd 3) it answers: `up PID` (PID as seen from outside), `down`, or `failed`; the rest goes to RUN/console.
set -u
stage=$1 root=$2 run=$3

keeper() {
    trap '' INT TERM HUP
    exec 3>&1 >>"$run/console" 2>&1
    child= init= cg=
    mkdir "$run/disk" "$run/root" &&
        mount -t tmpfs -o mode=755 disk "$run/disk" &&
        mount --bind "$root" "$run/root" || { echo failed >&3; exit 1; }
    mkdir "$run/disk/upper" "$run/disk/work" "$run/disk/merged" "$run/disk/containers"
    cp -a "$root/home" "$run/disk/home"

    hierarchy=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    if [ -z "$hierarchy" ]; then
        mkdir "$run/cgroup2" && mount -t cgroup2 cgroup2 "$run/cgroup2" && hierarchy=$run/cgroup2
    fi
    cg=$hierarchy/${run##*/}
    mkdir "$cg" && ln -s "$cg" "$run/cgroup" || { echo failed >&3; exit 1; }

    while read -r command; do
        case $command in
            boot) boot ;;
            kill) halt; echo down >&3 ;;
        esac
    done
    halt
    rmdir "$cg"
    umount -l "$run/disk" "$run/root"
    rm -rf --one-file-system "$run"
}

boot() {
    # The parent dies with the keeper, the host with its parent: no orphan however this ends.
    setpriv --pdeathsig KILL unshare --fork --kill-child=KILL --pid --mount --uts --ipc --net --propagation private \
        sh "$run/init.sh" enter "$root" "$run" </dev/null >>"$run/console" 2>&1 &
    child=$!
}

halt() {
    [ -n "$child" ] || return 0
    # The parent ends once it has reaped the host's PID 1. Before Linux 5.14 (no cgroup.kill) it is killed, and with it PID 1.
    { echo 1 >"$cg/cgroup.kill"; } 2>/dev/null || kill -KILL "$child"
    wait "$child"
    child=
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        find "$cg" -mindepth 1 -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.1
    done
}

enter() {
    # /proc is still the outer one here, so this is the pid that the outside knows. (Its second field has no space: sh.)
    read -r pid _ </proc/self/stat
    echo "up $pid" >&3
    echo 0 >"$(readlink "$run/cgroup")/cgroup.procs"
    exec unshare --cgroup sh "$run/init.sh" init "$root" "$run" 3>&-
}

init() {
    set -e
    umount -R /sys/fs/cgroup 2>/dev/null || true
    disk=$run/disk
    mount -t overlay -o "lowerdir=$run/root,upperdir=$disk/upper,workdir=$disk/work" host "$disk/merged"
    # Podman's own overlays cannot lie on an overlay: these two come from the disk directly.
    mkdir -p "$disk/merged/var/lib/containers"
    mount --bind "$disk/containers" "$disk/merged/var/lib/containers"
    mount --bind "$disk/home" "$disk/merged/home"
    # The image of test containers: Rootfs=/srv/image:O. (The host's own / would not do: no overlay of a tree with mounts in
    # it for an ordinary user.)
    mkdir -p "$disk/merged/srv/image"
    mount --bind "$run/root" "$disk/merged/srv/image"
    # The machine's own programs, for services that the host itself does not have (src/host/machine.rs).
    mkdir -p "$disk/merged/srv/machine"
    mount --bind /usr "$disk/merged/srv/machine"
    mount -o remount,bind,ro "$disk/merged/srv/machine"
    notify=$run/notify
    cd "$disk/merged"

    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t bpf bpf sys/fs/bpf
    mount -t tmpfs -o mode=755 dev dev
    mkdir dev/pts dev/shm dev/net dev/mqueue
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
    ln -s pts/ptmx dev/ptmx
    mount -t tmpfs -o mode=1777 shm dev/shm
    while read -r node major minor; do
        mknod -m 666 "dev/$node" c "$major" "$minor"
    done <<'N'
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
fuse 10 229
net/tun 10 200
N
    # A console that swallows everything: systemd wants one.
    mknod -m 600 dev/console c 1 3
    ln -s /proc/self/fd dev/fd
    ln -s /proc/self/fd/0 dev/stdin
    ln -s /proc/self/fd/1 dev/stdout
    ln -s /proc/self/fd/2 dev/stderr
    mount -t tmpfs -o mode=755 run run
    mount -t tmpfs -o mode=1777 tmp tmp
    # Where systemd says that it has booted (sd_notify, as systemd-nspawn has it).
    mkdir run/host
    : >run/host/notify
    mount --bind "$notify" run/host/notify

    hostname bro-host
    pivot_root . mnt
    cd /
    umount -l /mnt
    mount --make-rshared /
    exec env -i container=bro-tests NOTIFY_SOCKET=/run/host/notify \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        /lib/systemd/systemd --system --show-status=0
}

"$stage"
