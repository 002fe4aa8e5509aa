"""Small guests that end badly or not at all, and what the command line says then."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from guest import support
from guest.support import Session
from ringfence.images.builtin import LOAD_ADDRESS, assemble, elf_kernel

pytestmark = pytest.mark.boot


def kernel(folder: Path, source: str) -> Path:
    """An ELF kernel of a few instructions, entered in 64-bit mode with interrupts off."""
    path = folder / "kernel"
    path.write_bytes(elf_kernel(assemble(".intel_syntax noprefix\n.text\n" + source), LOAD_ADDRESS))
    return path


def run(folder: Path, source: str, *arguments: str) -> support.Ended:
    """Run such a kernel with the command line."""
    where = ("--kernel", kernel(folder, source), "--cache-dir", folder / "cache")
    return support.run("run", *where, "--memory", "64M", *arguments)


NO_IDT = "lea rax, [rip + none]\nlidt [rax]\n{}\nnone: .word 0\n.quad 0\n"
NO_HANDLERS = "mov rsp, 0x200000\n" + NO_IDT


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("invalid instruction", NO_IDT.format("mov rbx, 0x1234567890\nud2")),
        ("divide error", NO_HANDLERS.format("mov rbx, 0x1234567890\nxor ecx, ecx\ndiv rcx")),
        (
            "page fault",
            NO_HANDLERS.format("mov rbx, 0x1234567890\nmov rcx, 0x7f1234567000\nmov rax, [rcx]"),
        ),
        (
            "non-canonical",
            NO_HANDLERS.format(
                "mov rbx, 0x1234567890\nmov rcx, 0x8000000000000000\nmov [rcx], rax"
            ),
        ),
        (
            "non-canonical jump",
            NO_HANDLERS.format("mov rbx, 0x1234567890\nmov rcx, 0x8000000000000000\njmp rcx"),
        ),
        ("software interrupt", NO_HANDLERS.format("mov rbx, 0x1234567890\nint 0x80")),
    ],
)
def test_triple_fault_gives_status_4_and_registers(name: str, source: str, tmp_path: Path) -> None:
    ended = run(tmp_path, source, "--timeout", "30")
    assert ended.status == 4, (name, ended)
    first, *dump = ended.errors.splitlines()
    assert first.startswith("ringfence: error: the guest crashed")
    text = "\n".join(dump).lower()
    assert "triple fault" in text
    assert re.search(r"rbx\W+(0x)?0*1234567890\b", text), text
    address = re.search(r"rip\W+(?:0x)?([0-9a-f]+)", text)
    assert address, text
    assert "traceback" not in text


@pytest.mark.parametrize(
    "source",
    ["sti\nstop: hlt\njmp stop", "stop: hlt\njmp stop", "stop: jmp stop", "stop: pause\njmp stop"],
)
def test_timeout_gives_status_5(source: str, tmp_path: Path) -> None:
    ended = run(tmp_path, source, "--timeout", "1")
    assert ended.status == 5, ended
    assert len(ended.errors.splitlines()) == 1
    assert "1 s" in ended.errors
    assert ended.seconds < 30


@pytest.mark.parametrize(
    "source",
    [
        "mov dx, 0xcf9\nmov al, 6\nout dx, al\nstop: hlt\njmp stop",
        "mov al, 0xfe\nout 0x64, al\nstop: hlt\njmp stop",
    ],
)
def test_reset_gives_status_7(source: str, tmp_path: Path) -> None:
    ended = run(tmp_path, source, "--timeout", "30")
    assert ended.status == 7, ended


def test_halted_guest_uses_no_host_cpu(tmp_path: Path) -> None:
    source = kernel(tmp_path, "mov dx, 0x3f8\nmov al, 33\nout dx, al\nstop: hlt\njmp stop")
    session = Session("run", "--kernel", source, "--memory", "64M", "--no-cache")
    try:
        session.wait_for(b"!", support.BOOT)
        time.sleep(0.5)
        before = support.cpu_seconds(session.process.pid)
        time.sleep(2)
        assert support.cpu_seconds(session.process.pid) - before < 0.04
    finally:
        session.close()


ENDLESS_FAULTS = """
mov rsp, 0xf0000000
mov rdi, 0x300000
mov rax, 0x00008e0000100000
mov [rdi + 14 * 16], rax
mov eax, 0x7f00
mov [rdi + 14 * 16 + 8], rax
lea rax, [rip + idt]
lidt [rax]
mov rcx, 0x7f1234567000
mov rax, [rcx]
idt: .word 4095
.quad 0x300000
"""
"""A page-fault handler that can't be fetched, on a stack in no RAM, which takes any push."""


def test_endless_fault_delivery_can_be_stopped(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = run(tmp_path, ENDLESS_FAULTS, "--timeout", "1")
    assert ended.status == 5, ended
    assert time.monotonic() - start < 6
