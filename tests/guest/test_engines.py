"""A booted Debian kernel that goes from the translator to this host's KVM, and back."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.support import APPEND, PROGRAMS, require
from ringfence import Machine
from ringfence.engine.kvm.verdict import Kind, verdict
from ringfence.images.root import build_initramfs
from ringfence.images.store import Image
from ringfence.memory.ram import PAGE
from ringfence.state.receive import Allowed
from state.moving import Target

pytestmark = [
    pytest.mark.boot,
    pytest.mark.skipif(verdict().kind is Kind.NONE, reason=f"no KVM: {verdict().detail}"),
]

NOT_EMULATED = frozenset({"CMPXCHG16B"})
"""What a software KVM offers and its emulator lacks, for want of which Linux does otherwise."""


@pytest.fixture(scope="module")
def shared() -> frozenset[str]:
    """Features that both engines carry out."""
    with Machine(image="builtin", engine="kvm", memory="4M") as machine:
        offered = machine.vcpus[0].features
    return offered if verdict().kind is Kind.HARDWARE else offered - NOT_EMULATED


@pytest.fixture
def humble(shared: frozenset[str], cloud: Image, cache: Path, tmp_path: Path) -> Iterator[Machine]:
    """Debian's kernel with a first process that runs wherever that does."""
    compiler = require(shutil.which("gcc"), "a C compiler")
    program = tmp_path / "humble"
    subprocess.run(
        [compiler, "-O1", "-static", "-nostdlib", "-fno-pie", "-no-pie", "-fno-stack-protector",
         "-mgeneral-regs-only", "-o", program, PROGRAMS / "humble.c"],
        check=True,
    )  # fmt: skip
    initrd = tmp_path / "initrd"
    initrd.write_bytes(build_initramfs(cloud.folder / "busybox", init=program.read_bytes()))
    machine = Machine(
        kernel=cloud.kernel,
        initrd=initrd,
        append=APPEND,
        engine="translate",
        memory="96M",
        features=shared,
        cache_dir=cache,
    )
    with machine:
        machine.start()
        machine.console.wait_for("humble", 90)
        yield machine


def turns(machine: Machine) -> int:
    """How often the process has gone over its memory, without finding it changed."""
    machine.pause()
    ram = machine.read_physical(0, machine.config.memory)
    machine.resume()
    pages = [at for at in range(0, len(ram), PAGE) if ram.startswith(b"humble page\0", at)]
    found = [struct.unpack_from("<QQ", ram, at + 16) for at in pages]  # another is the file's
    assert all(wrong == 0 for _, wrong in found)
    return max(turns for turns, _ in found)


def lives(machine: Machine) -> None:
    """The process goes on, and so does the kernel that interrupts it."""
    before = turns(machine)
    while turns(machine) < before + 3:
        assert not machine.ended.wait(0.2), machine.crash_report or machine.console.output
    while not machine.stats()["interrupts"]:
        assert not machine.ended.wait(0.2), machine.crash_report or machine.console.output


def moved(machine: Machine, engine: str, cache: Path) -> Machine:
    target = Target("tcp://127.0.0.1:0", Allowed(engine=engine, cache_dir=cache))
    machine.migrate(target.address)
    machine.close()
    arrived = target.take()
    assert arrived.config.engine == engine
    return arrived


def test_there_and_back(humble: Machine, cache: Path, tmp_path: Path) -> None:
    """By migration, then by snapshots."""
    lives(humble)
    machine = moved(humble, "kvm", cache)
    lives(machine)
    machine = moved(machine, "translate", cache)
    lives(machine)
    for number, engine in enumerate(("kvm", "translate")):
        machine.snapshot(tmp_path / str(number))
        machine.close()
        machine = Machine.restore(tmp_path / str(number), engine=engine, cache_dir=cache)
        machine.start()
        lives(machine)
    machine.close()
