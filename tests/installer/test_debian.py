"""What is put on a disk besides packages."""

from __future__ import annotations

import json

from ringfence.installer.debian import access_by_ssh, seed
from ringfence.storage.seed import Seed


def test_seed() -> None:
    """The folder has the files that a seed's disk has."""
    packages, files = seed(b"#cloud-config\n")
    assert packages == ("cloud-init",)
    folder = "var/lib/cloud/seed/nocloud/"
    found = {name.removeprefix(folder): files[name] for name in files if name.startswith(folder)}
    assert found == Seed(b"#cloud-config\n").files()
    assert json.loads(found["meta-data"])["instance-id"]
    assert b"NoCloud" in files["etc/cloud/cloud.cfg.d/90_ringfence.cfg"]


def test_access_by_ssh() -> None:
    assert access_by_ssh(b"key") == (("openssh-server",), {"root/.ssh/authorized_keys": b"key"})
