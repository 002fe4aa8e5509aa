"""A hypervisor as the guest: Xen with Debian as its first domain, which Xen keeps in ring 3.

Xen is a multiboot kernel that starts its CPUs by code in low memory, goes back to real mode on its
way, and runs the domain's kernel deprivileged, with segments and page tables of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guest import support
from guest.support import BOOT
from ringfence import Machine
from ringfence.engine import StopReason
from ringfence.errors import HostError
from ringfence.images.deb import read_files
from ringfence.images.debian import fetch_packages
from ringfence.images.store import Image, Store

pytestmark = pytest.mark.boot

PACKAGE = "xen-hypervisor-4.17-amd64"


def test_xen_boots_debian(store: Store, generic: Image, cache: Path, tmp_path: Path) -> None:
    try:
        (package,) = fetch_packages([PACKAGE], tmp_path, store=store)
    except HostError:
        support.require(None, PACKAGE)
    (xen,) = (file.data for file in read_files(package.path, lambda path: path.endswith(".gz")
              and path.startswith("boot/")))  # fmt: skip
    with Machine(
        kernel=xen, append="console=com1 com1=115200 loglvl=all noreboot",
        modules=[f"{generic.kernel} console=hvc0 quiet", str(generic.initrd)],
        memory="512M", cpus=2, engine="translate", cache_dir=cache,
    ) as machine:  # fmt: skip
        machine.start()
        for text in ("Brought up 2 CPUs", "~ # "):
            machine.console.wait_for(text, timeout=BOOT)
        machine.console.send("cat /sys/hypervisor/type; echo cpus $(nproc)\n")
        machine.console.wait_for(re.compile(r"\nxen\s+cpus 2"), timeout=BOOT)
        machine.console.send("poweroff -f\n")
        assert machine.wait(BOOT) is StopReason.POWER_OFF
