"""The shell scripts around a Debian disk: installing it, configuring it, and starting it.

All are /init of a busybox initramfs but `SETUP`, which runs in the new system's own root. What the
installer is told goes through its serial console, a line each that starts with `MARK`.
"""

from __future__ import annotations

MARK = "ringfence-installer:"

_START = """\
#!/bin/busybox sh
export PATH=/usr/local/bin:/usr/sbin:/usr/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
busybox --install -s
for module in virtio_pci virtio_blk crc32c_generic ext4; do modprobe -q $module; done
"""

INSTALL = (
    _START
    + f"""\
echo 3 > /proc/sys/kernel/printk
end() {{ echo "{MARK} $*"; sync; poweroff -f; sleep 60; }}
echo "{MARK} unpack"
mount -t ext4 -o noatime /dev/vda /mnt || end failed to mount the disk
tar -xp -f /dev/vdb -C /mnt || end failed to unpack: is the disk too small?
echo "{MARK} configure"
mount -t proc proc /mnt/proc
mount -t sysfs sysfs /mnt/sys
mount -t devtmpfs devtmpfs /mnt/dev
mount -t tmpfs tmpfs /mnt/run
chroot /mnt /bin/sh /ringfence-setup || end failed to configure
rm /mnt/ringfence-setup
umount /mnt/run /mnt/dev /mnt/sys /mnt/proc
umount /mnt || end failed to unmount the disk
end done
"""
)

BOOT = (
    _START
    + """\
root=/dev/vda
read -r words < /proc/cmdline
for word in $words; do
    case $word in root=*) root=${word#root=};; esac
done
if ! mount -t ext4 -o rw "$root" /mnt; then
    echo "No root file system on $root."
    exec setsid cttyhack sh -l
fi
umount /proc /sys
mount --move /dev /mnt/dev
exec switch_root /mnt /sbin/init
"""
)

SETUP = """\
set -e
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true
export LC_ALL=C.UTF-8 HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin
printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
for package in $(cat /var/lib/dpkg/tmp.preinst.order); do
    DPKG_MAINTSCRIPT_PACKAGE=$package DPKG_MAINTSCRIPT_NAME=preinst \\
        DPKG_MAINTSCRIPT_ARCH=amd64 /var/lib/dpkg/tmp.preinst/$package install < /dev/null
done
rm -r /var/lib/dpkg/tmp.preinst /var/lib/dpkg/tmp.preinst.order
dpkg --force-unsafe-io --configure --pending < /dev/null
depmod "$(uname -r)"
rm /usr/sbin/policy-rc.d
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service; do
    systemctl disable $unit || true
done
systemctl enable systemd-networkd systemd-resolved
passwd --delete root
: > /etc/machine-id
rm -f /var/lib/dbus/machine-id /var/log/*.log
"""

FILES = {
    "etc/hostname": "ringfence\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 ringfence\n::1 localhost ip6-localhost\n",
    "etc/fstab": "/dev/vda / ext4 noatime,errors=remount-ro 0 1\n",
    "etc/systemd/network/80-ringfence.network": (
        "[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n\n[DHCPv4]\nUseDomains=yes\n"
    ),
}
"""Configuration that is not any package's, by path."""
