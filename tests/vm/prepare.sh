#!/bin/sh
# Run by mmdebstrap before the packages are in: what their scripts find on the system under $1.
set -eu
root=$1

# An initramfs of what this machine's disk needs: the whole one takes half a minute to unpack in an emulator.
mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=gzip\nCOMPRESSLEVEL=1\n' >"$root/etc/initramfs-tools/conf.d/emulated"
printf 'virtio_pci\nvirtio_blk\next4\n' >"$root/usr/share/initramfs-tools/modules.d/emulated"
