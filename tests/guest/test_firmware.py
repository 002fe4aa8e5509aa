"""Firmware, and what it starts: GRUB with Debian's kernel, UEFI's shell, memtest86+."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

from guest import support
from guest.support import BOOT, LONG
from ringfence import Machine
from ringfence.boot.firmware import Firmware
from ringfence.engine import StopReason
from ringfence.errors import ImageError
from ringfence.images.deb import read_files
from ringfence.images.debian import fetch_packages
from ringfence.images.firmware import FirmwareFiles, fetch_firmware
from ringfence.images.store import Image, Store

pytestmark = pytest.mark.boot

GRUB = Path("/usr/lib/grub/i386-pc")
GRUB_CONFIG = """\
serial --unit=0 --speed=115200
terminal_output serial
echo GRUB speaks
linux (hd0,msdos1)/vmlinuz console=ttyS0 panic=-1
initrd (hd0,msdos1)/initrd
boot
"""
GRUB_MODULES = "biosdisk part_msdos ext2 linux serial terminal echo boot"
GUID = "52696e67-6665-6e63-6521-000000000001"
PARTITION = 2048
"""The sector that the partition begins at; GRUB's core is in those before it."""


def firmware(store: Store, name: str) -> Firmware:
    """Debian's firmware."""
    support.require(shutil.which("apt-get"), "apt")
    files: FirmwareFiles = fetch_firmware(name, store)
    variables = files.variables.read_bytes() if files.variables else b""
    return Firmware(files.code.read_bytes(), variables)


@pytest.fixture(scope="module")
def grub_disk(cloud: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with GRUB in its first sectors, and kernel and initrd in an ext2 file system."""
    mkimage = support.require(shutil.which("grub-mkimage"), "grub-mkimage")
    mke2fs = support.require(shutil.which("mke2fs", path="/sbin:/usr/sbin:/usr/bin"), "mke2fs")
    support.require(str(GRUB) if GRUB.is_dir() else None, "GRUB for PCs (grub-pc-bin)")
    assert cloud.initrd is not None
    folder = tmp_path_factory.mktemp("grub")
    config, core, root = folder / "grub.cfg", folder / "core.img", folder / "root"
    disk = folder / "disk.img"
    config.write_text(GRUB_CONFIG)
    command = [mkimage, "-O", "i386-pc", "-p", "/grub", "-c", config, "-o", core]
    subprocess.run([*command, *GRUB_MODULES.split()], check=True)
    root.mkdir()
    shutil.copy(cloud.kernel, root / "vmlinuz")
    shutil.copy(cloud.initrd, root / "initrd")
    with disk.open("wb") as file:
        file.truncate(48 << 20)
    offset = f"offset={PARTITION * 512}"
    command = [mke2fs, "-q", "-t", "ext2", "-d", root, "-E", offset, disk, "46M"]
    subprocess.run(command, check=True, capture_output=True)
    entry = struct.pack("<B3sB3sII", 0x80, b"", 0x83, b"", PARTITION, 46 << 11)
    boot = (GRUB / "boot.img").read_bytes()[:440].ljust(446, b"\0") + entry
    with disk.open("r+b") as file:
        file.write(boot.ljust(510, b"\0") + b"\x55\xaa" + core.read_bytes())
    return disk


def test_grub_boots_debian_from_a_disk(store: Store, grub_disk: Path, cache: Path) -> None:
    with Machine(
        bios=firmware(store, "seabios"), disks=[grub_disk], memory="256M", engine="translate",
        cache_dir=cache,
    ) as machine:  # fmt: skip
        machine.start()
        for text in ("SeaBIOS", "GRUB speaks", "Linux version", "~ # "):
            machine.console.wait_for(text, timeout=BOOT)
        machine.console.send("echo $((6*7)); ls /sys/block; dmesg | grep -c PIIX\n")
        machine.console.wait_for("42\r\nvda", timeout=BOOT)
        machine.console.send("poweroff -f\n")
        assert machine.wait(BOOT) is StopReason.POWER_OFF


def test_uefi_shell_keeps_variables(store: Store, cache: Path, tmp_path: Path) -> None:
    nvram = tmp_path / "vars"
    ovmf = firmware(store, "ovmf")
    with Machine(
        bios=ovmf, nvram=nvram, memory="128M", engine="translate", cache_dir=cache
    ) as machine:
        machine.start()
        machine.console.wait_for("any other key to continue", timeout=2 * BOOT)
        machine.console.send(" ")
        machine.console.wait_for("Shell>", timeout=BOOT)
        machine.console.send(f"setvar RingTest -guid {GUID} -nv -bs =0x4711\r")
        machine.console.wait_for("Shell>", timeout=BOOT)
        machine.console.send("reset -s\r")
        assert machine.wait(BOOT) is StopReason.POWER_OFF
    kept = nvram.read_bytes()
    assert len(kept) == len(ovmf.variables)
    assert "RingTest".encode("utf-16-le") in kept
    stored = kept[kept.index("RingTest".encode("utf-16-le")) :]
    assert stored[18:20] == b"\x11\x47"


@pytest.mark.parametrize("image", ["memtest86+x64.bin", "memtest86+ia32.bin"])
def test_memtest(image: str, store: Store, cache: Path, tmp_path: Path) -> None:
    """The tests that don't wait on purpose; a whole pass with RINGFENCE_TEST_LONG."""
    support.require(shutil.which("apt-get"), "apt")
    (package,) = fetch_packages(["memtest86+"], tmp_path, store=store)
    (kernel,) = (file.data for file in read_files(package.path, lambda path: path.endswith(image)))
    with Machine(
        kernel=kernel, append="console=ttyS0,115200 nosm", memory="8M", engine="translate",
        cache_dir=cache,
    ) as machine:  # fmt: skip
        machine.start()
        machine.console.wait_for("Status: Pass" if LONG else "Bit fade", timeout=600)
        output = machine.console.output
    assert "Errors: 0" in output
    assert "FAIL" not in output


@pytest.mark.parametrize("code", [b"\0", b"\xff", b"\xf4", b"\xea\xf0\xff\0\xf0", None])
def test_roms_that_are_no_firmware(code: bytes | None, cache: Path) -> None:
    """Whatever the CPU finds at its reset vector, the machine can be stopped, or crashes."""
    size = 64 << 10
    content = random.Random(9).randbytes(size) if code is None else (code * size)[:size]
    if code is not None and len(code) > 1:  # a jump to itself
        content = content[:-16] + code.ljust(16, b"\0")
    with Machine(
        bios=Firmware(content), memory="2M", engine="translate", cache_dir=cache
    ) as machine:
        machine.start()
        time.sleep(0.05)
        machine.stop()
        assert machine.outcome in (StopReason.STOPPED, StopReason.CRASH, StopReason.RESET)


def test_bad_firmware_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content, says in ((b"x" * 100, "is it firmware"), (bytes(9 << 20), "at most 8 MiB")):
        file.write_bytes(content)
        with pytest.raises(ImageError, match=says):
            Machine(bios=file)
    with pytest.raises(ImageError, match="ringfence pull ovmf"):
        Machine(bios="ovmf")
    with pytest.raises(ImageError, match="does not exist"):
        Machine(bios=tmp_path / "none")
