"""How a whole system gets onto a disk: a guest of ours installs it.

Packages are downloaded and unpacked on the host, by `images`; but their scripts have to run as root
on the system that they set up, and no host that we like to run on lets us be that. So a machine is
started for it: a small initramfs writes the tree to the disk, changes its root, and has dpkg
configure it. No privileges, no container, nothing of a package's runs on the host.
"""
