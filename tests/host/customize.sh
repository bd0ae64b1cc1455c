#!/bin/sh
# Run by mmdebstrap once the packages are in: turns the fresh Debian under $1 into the test host.
set -eu
root=$1

# Nothing that reaches for the outer machine's hardware, kernel settings or network, and no service before a test asks.
for unit in systemd-networkd.service systemd-networkd-wait-online.service systemd-networkd.socket \
    systemd-firstboot.service systemd-modules-load.service modprobe@.service systemd-sysctl.service \
    systemd-timesyncd.service systemd-udevd.service systemd-udev-trigger.service systemd-pstore.service \
    console-getty.service getty.target sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount \
    nftables.service podman-auto-update.service podman-auto-update.timer \
    podman.socket podman.service podman-restart.service podman-clean-transient.service \
    apt-daily.timer apt-daily.service apt-daily-upgrade.timer fstrim.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service postgresql.service redis-server.service nginx.service haproxy.service systemd-tpm2-setup.service \
    systemd-tpm2-setup-early.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
# Quadlet's units wait for this target, the rootless ones by polling it; on a server something always pulls it in.
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -sf /lib/systemd/system/network-online.target "$root/etc/systemd/system/multi-user.target.wants/"

tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
echo bro-host >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost\n127.0.1.1 bro-host\n' >"$root/etc/hosts"
: >"$root/etc/resolv.conf"

# Podman in a box: limits that are below the outer machine's, no controllers taken for granted, no log daemon needed.
mkdir -p "$root/etc/containers/containers.conf.d" "$root/etc/containers/systemd"
cat >"$root/etc/containers/containers.conf.d/50-test-host.conf" <<'C'
[containers]
default_ulimits=["nofile=1024:4096","nproc=4096:4096"]
pids_limit=0
log_driver="k8s-file"
[engine]
cgroup_manager="systemd"
events_logger="file"
C

# Journald as it is found on a server, except that a test's own log lines are never dropped.
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n' >"$root/etc/systemd/journald.conf.d/50-test-host.conf"

mkdir -p "$root/var/lib/systemd/linger"
uid=1000
for user in test other; do
    chroot "$root" useradd --uid $uid --create-home "$user"
    touch "$root/var/lib/systemd/linger/$user"
    # The container image as this user's rootless Podman needs to have it: owned by the user and its subordinate ids.
    subuid=$(sed -n "s/^$user:\([0-9]*\):65536\$/\1/p" "$root/etc/subuid")
    mkdir -p "$root/srv/images/$user"
    cat >"$root/etc/systemd/system/srv-images-$user.mount" <<M
[Mount]
What=/srv/image
Where=/srv/images/$user
Type=none
Options=bind,X-mount.idmap=b:0:$uid:1 b:1:$subuid:65535
M
    ln -s "../srv-images-$user.mount" "$root/etc/systemd/system/multi-user.target.wants/"
    uid=$((uid + 1))
done

# A database cluster to copy from: initdb takes longer than booting.
chroot "$root" install -d -o postgres -g postgres -m 700 /srv/pgdata
chroot "$root" setpriv --reuid postgres --regid postgres --clear-groups \
    sh -c 'exec /usr/lib/postgresql/*/bin/initdb --pgdata /srv/pgdata --auth trust --encoding UTF8 --locale C --no-sync' >/dev/null
# initdb trusts 127.0.0.1 alone, from where no client of a forwarder comes.
echo 'host all all all trust' >>"$root/srv/pgdata/pg_hba.conf"

# The image that tests import: busybox, and what its applets are called.
mkdir -p "$root/srv/busybox/bin" "$root/srv/busybox/tmp" "$root/srv/busybox/etc"
cp "$root/usr/bin/busybox" "$root/srv/busybox/bin/busybox"
for applet in $("$root/usr/bin/busybox" --list); do
    [ "$applet" = busybox ] || ln -s busybox "$root/srv/busybox/bin/$applet"
done
tar -C "$root/srv/busybox" -cf "$root/srv/busybox.tar" .
rm -r "$root/srv/busybox"
