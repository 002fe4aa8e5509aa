"""Debian's gdb at its kernel: symbols, breakpoints, backtraces, user programs, several vCPUs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from guest import support
from guest.support import BOOT, PROGRAMS, Session
from ringfence.boot.bzimage import open_kernel
from ringfence.gdb.kallsyms import read_kallsyms
from ringfence.gdb.symbols import symbol_file
from ringfence.images.root import build_initramfs
from ringfence.images.store import Image

pytestmark = pytest.mark.boot
INIT = "#!/bin/sh\nmount -t proc proc /proc\n/test/watched\nnproc\npoweroff -f\n"


@pytest.fixture(scope="module")
def symbols(cloud: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel's symbol file."""
    target = tmp_path_factory.mktemp("symbols") / "kernel"
    done = support.run("symbols", "--kernel", cloud.kernel, "-o", target)
    assert done.status == 0, done.errors
    assert int(re.findall(r": (\d+) symbols of 6", done.text)[0]) > 50_000
    return target


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of the guest's."""
    return support.compile_c(
        PROGRAMS / "watched.c", tmp_path_factory.mktemp("programs") / "watched"
    )


@pytest.fixture(scope="module")
def initrd(cloud: Image, watched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initramfs that runs it and switches the machine off."""
    target = tmp_path_factory.mktemp("initrd") / "initrd"
    extra: dict[str, bytes | Path] = {"/test/watched": watched}
    target.write_bytes(build_initramfs(cloud.folder / "busybox", extra, init=INIT))
    return target


def debug(
    place: str, kernel: Path, initrd: Path, symbols: Path, cache: Path, script: str, *options: str
) -> tuple[str, support.Ended]:
    """What gdb prints for a script, and how the machine ended."""
    gdb = support.require(shutil.which("gdb"), "gdb")
    session = Session(
        *support.boot_arguments(kernel, initrd, cache), "--gdb", f"unix:{place}", "--gdb-wait",
        *options,
    )  # fmt: skip
    try:
        assert session.process.stderr is not None
        assert b"target remote" in session.process.stderr.readline()
        file = symbols.with_suffix(".gdb")
        file.write_text(f"set pagination off\nset confirm off\ntarget remote {place}\n{script}")
        done = subprocess.run(
            [gdb, "-nx", "-batch", "-x", str(file), str(symbols)],
            capture_output=True, text=True, timeout=2 * BOOT, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr, session.end(BOOT)
    finally:
        session.close()


KERNEL = """
break start_kernel
continue
backtrace
delete
break do_sys_openat2
continue
backtrace
delete
watch *(long *) &jiffies
continue
backtrace
stepi
delete
"""
PROGRAM = """
add-symbol-file {program}
hbreak inner
continue
backtrace
p $rdi
delete
watch *(long *) &counter
continue
p *(long *) &counter
delete
set $rax = $rax
continue
"""


def test_kernel_and_program(
    cloud: Image, initrd: Path, symbols: Path, watched: Path, cache: Path, tmp_path: Path
) -> None:
    script = KERNEL + PROGRAM.format(program=watched)
    said, ended = debug(str(tmp_path / "gdb"), cloud.kernel, initrd, symbols, cache, script)
    kernel, _, rest = said.partition("do_sys_openat2 ()")
    assert re.search(r"#0 .* in start_kernel \(\)\n#1 .* in secondary_startup_64", kernel), said
    calls = ("__x64_sys_openat", "do_syscall_64", "entry_SYSCALL_64_after_hwframe")
    assert all(f"in {name} ()" in rest for name in calls), said
    assert re.search(r"Old value = (\d+)\nNew value = ", rest), said
    assert "in __sysvec_apic_timer_interrupt ()" in rest or "in do_timer" in rest, said
    assert re.search(r"#0 .* in inner \(\)\n#1 .* in outer \(\)\n#2 .* in main \(\)", rest), said
    assert "$1 = 42" in rest and "$2 = 42" in rest, said
    assert "exited normally" in rest, said
    assert ended.status == 0 and "outer gives 127" in ended.text, ended


def test_several_vcpus(
    cloud: Image, initrd: Path, symbols: Path, cache: Path, tmp_path: Path
) -> None:
    script = (
        "break start_secondary\ncontinue\ninfo threads\nbacktrace\ndelete\n"
        "break __x64_sys_reboot\ncontinue\ninfo threads\nstepi\nstepi\ndelete\ncontinue\n"
    )
    said, ended = debug(
        str(tmp_path / "gdb"), cloud.kernel, initrd, symbols, cache, script, "--cpus", "2"
    )
    assert re.search(r"\* 2 +Thread 2 \(vCPU 1, CPL 0\).* in start_secondary \(\)", said), said
    assert re.search(r"Thread 1 \(vCPU 0, CPL 0\)", said), said
    assert "in __x64_sys_reboot ()" in said and "exited normally" in said, said
    assert ended.status == 0 and "\n2\n" in ended.text, ended


def test_symbols(cloud: Image) -> None:
    elf = open_kernel(cloud.kernel).elf
    data, count = symbol_file(elf)
    assert data[:4] == b"\x7fELF" and count > 50_000
    by_name = {each.name: each for each in read_kallsyms(bytes(elf))}
    assert by_name["start_kernel"].kind == "T" and by_name["jiffies"].kind in "Dd"
    assert by_name["_text"].address == 0xFFFFFFFF81000000
