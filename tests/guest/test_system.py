"""What a guest sees of its machine looks right: CPU, clocks, interrupts, kernel messages."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, Session, Shell
from ringfence import Machine
from ringfence.images.store import Image

pytestmark = pytest.mark.boot

QEMU = "qemu-system-x86_64"


def test_cpuinfo(shell: Shell) -> None:
    fields: dict[str, str] = {}
    for line in shell.run("cat /proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip():
            assert name.strip() not in fields, "more than one processor"
            fields[name.strip()] = value.strip()
    assert fields["processor"] == "0"
    assert fields["model name"] == "Ringfence virtual CPU"
    flags = set(fields["flags"].split())
    assert {"lm", "nx", "syscall", "sse2", "fxsr", "cx16", "apic", "tsc"} <= flags
    host_flags = re.search(r"flags\s*: (.*)", Path("/proc/cpuinfo").read_text())
    assert host_flags
    extra = {flag for flag in flags if flag.startswith(("avx", "sse", "bmi", "sha", "aes", "fma"))}
    assert extra <= set(host_flags[1].split())
    assert float(fields["cpu MHz"]) > 100
    assert float(fields["bogomips"]) > 100


def test_date_is_right_within_a_second(shell: Shell) -> None:
    before = time.time()
    guest = int(shell.run("date +%s"))
    after = time.time()
    assert int(before) - 1 <= guest <= int(after) + 1


def test_sleep_takes_as_long_as_on_the_host(shell: Shell) -> None:
    shell.run("sleep 0")
    began = time.monotonic()
    shell.run("sleep 1")
    assert 0.98 < time.monotonic() - began < 1.6


def test_clocks_run_at_the_host_s_speed(shell: Shell) -> None:
    def both() -> tuple[float, float]:
        began = time.monotonic()
        uptime = float(shell.run("cat /proc/uptime").split()[0])
        return uptime, (began + time.monotonic()) / 2

    guest, host = both()
    shell.run("i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; sleep 1")
    later_guest, later_host = both()
    assert later_guest - guest == pytest.approx(later_host - host, abs=0.2)


def test_interrupts_are_counted(shell: Shell) -> None:
    def counts() -> dict[str, int]:
        text = shell.run("cat /proc/interrupts")
        rows = (line.split() for line in text.splitlines()[1:])
        return {row[0].rstrip(":") + " " + row[-1]: int(row[1]) for row in rows if len(row) > 1}

    before = counts()
    shell.run("sleep 0.5")
    after = counts()
    serial = [name for name in after if name.endswith("ttyS0")]
    assert serial
    assert after[serial[0]] > before[serial[0]]
    local = [name for name in after if name.startswith("LOC ")]
    assert local
    assert after[local[0]] > before[local[0]]
    assert after.get("ERR 0", 0) == 0
    assert after.get("MIS 0", 0) == 0


def test_paravirtual_clock_is_the_clock_source(shell: Shell) -> None:
    folder = "/sys/devices/system/clocksource/clocksource0"
    assert shell.run(f"cat {folder}/current_clocksource") == "kvm-clock\n"


def test_memory_is_what_was_asked_for(shell: Shell) -> None:
    total = re.search(r"MemTotal:\s*(\d+) kB", shell.run("cat /proc/meminfo"))
    assert total
    assert 440 << 10 < int(total[1]) <= 512 << 10


def warnings(dmesg: str) -> set[str]:
    """The lines of level warning and worse, without what differs from boot to boot."""
    found = set()
    for line in dmesg.replace("\r", "").splitlines():
        match = re.match(r"<(\d+)>\[\s*\d+\.\d+\] (.*)", line)
        if match and int(match[1]) & 7 <= 4:
            text = re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b", "X", match[2])
            found.add(re.sub(r"\d+", "N", text))
    return found


@pytest.fixture(scope="module")
def qemu_warnings(cloud: Image, initrd: Path) -> set[str]:
    """What QEMU's boot of the same kernel warns of."""
    session = Session(
        *("-accel", "tcg", "-m", "512M", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-serial", "stdio", "-monitor", "none", "-kernel", cloud.kernel, "-initrd", initrd),
        *("-append", APPEND),
        program=[support.require(shutil.which(QEMU), QEMU)],
    )
    try:
        session.wait_for(b"~ # ", support.BOOT)
        time.sleep(0.2)
        session.type(b'dmesg -r > /tmp/m; echo "[""["; cat /tmp/m; echo "]""]"\n')
        session.wait_for(b"[[\r\n", 20)
        said = session.wait_for(b"]]\r\n", 20).decode("utf-8", "replace")
        session.type(b"poweroff -f\n")
        session.end(20)
    finally:
        session.close()
    assert "Linux version" in said
    return warnings(said)


def test_no_kernel_warning_that_qemu_s_boot_lacks(shell: Shell, qemu_warnings: set[str]) -> None:
    said = shell.run("dmesg -r")
    assert "Linux version" in said
    for bad in ("Oops", "Call Trace", "BUG:", "WARNING:", "cut here", "stall", "soft lockup"):
        assert bad not in said, bad
    assert warnings(said) - qemu_warnings == set()


def test_nor_one_with_an_empty_cache(
    cloud: Image, initrd: Path, qemu_warnings: set[str], tmp_path: Path
) -> None:
    """The slowest boot there is: the kernel must not doubt its clocks for it."""
    with Machine(
        kernel=cloud.kernel, initrd=initrd, append=APPEND, engine="translate", cache_dir=tmp_path
    ) as machine:
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        assert warnings(shell.run("sleep 2; dmesg -r")) - qemu_warnings == set()
