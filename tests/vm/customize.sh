#!/bin/sh
# Run by mmdebstrap once the packages are in: turns the fresh Debian under $1 into the machine that the tests boot.
set -eu
root=$1

# Nothing that works by itself at some time of the day, and no login on the console: the kernel's complaints have it alone.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
    podman-auto-update.timer systemd-tmpfiles-clean.timer getty.target serial-getty@.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
# Quadlet's units wait for this target, the rootless ones by polling it; on a server something always pulls it in.
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -sf /lib/systemd/system/network-online.target "$root/etc/systemd/system/multi-user.target.wants/"

tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
echo bro-machine >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost\n127.0.1.1 bro-machine\n' >"$root/etc/hosts"
: >"$root/etc/resolv.conf"
echo '/dev/vda / ext4 defaults 0 1' >"$root/etc/fstab"
# The journal outlives a reboot, so that in the end it is asked about all boots.
mkdir -p "$root/var/log/journal" "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nRateLimitIntervalSec=0\n' >"$root/etc/systemd/journald.conf.d/50-test-machine.conf"

# Audit messages, AppArmor's among them, are never dropped for being many.
mkdir -p "$root/etc/sysctl.d"
echo 'kernel.printk_ratelimit = 0' >"$root/etc/sysctl.d/50-test-machine.conf"

# The machine's own tree as a root for containers (`Rootfs=/srv/image:O`): a mount by itself, without those below it, which would
# be in the way of an ordinary user's overlay. That one is mapped to the user and the subordinate ids.
chroot "$root" useradd --uid 1000 --create-home --shell /bin/bash test
mkdir -p "$root/var/lib/systemd/linger" "$root/srv/image" "$root/srv/images/test"
touch "$root/var/lib/systemd/linger/test"
subuid=$(sed -n 's/^test:\([0-9]*\):65536$/\1/p' "$root/etc/subuid")
cat >"$root/etc/systemd/system/srv-image.mount" <<'U'
[Mount]
What=/
Where=/srv/image
Type=none
Options=bind
U
cat >"$root/etc/systemd/system/srv-images-test.mount" <<U
[Unit]
Requires=srv-image.mount
After=srv-image.mount
[Mount]
What=/srv/image
Where=/srv/images/test
Type=none
Options=bind,X-mount.idmap=b:0:1000:1 b:1:$subuid:65535
U
ln -s ../srv-images-test.mount "$root/etc/systemd/system/multi-user.target.wants/"

# What the run brings along (packages, agent.py) is a tar archive on the second disk.
cat >"$root/etc/systemd/system/brought.service" <<'U'
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=mkdir -p /run/brought
ExecStart=tar -x --no-same-owner -C /run/brought -f /dev/vdb
U
# For root and for the user: a session as a login makes it, and in it the agent at a virtio-serial port of that name.
cat >"$root/etc/systemd/system/agent@.service" <<'U'
[Unit]
BindsTo=dev-virtio\x2dports-%i.device
Requires=brought.service
Wants=user@1000.service
After=dev-virtio\x2dports-%i.device brought.service user@1000.service
[Service]
User=%i
PAMName=login
WorkingDirectory=~
StandardInput=file:/dev/virtio-ports/%i
StandardOutput=file:/dev/virtio-ports/%i
StandardError=journal
ExecStart=python3 /run/brought/agent.py
U
for user in root test; do
    ln -s ../agent@.service "$root/etc/systemd/system/multi-user.target.wants/agent@$user.service"
done
