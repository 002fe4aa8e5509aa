"""Test kernels: how they are entered, and the devices that they expect."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from boot.kernels import multiboot_elf, multiboot_flat, pvh_elf
from guest import support
from ringfence import engine as engines
from ringfence.assembly import TestDevices
from ringfence.engine import StopReason
from ringfence.engine.capabilities import Mode
from ringfence.errors import HostError
from ringfence.images.builtin import LOAD_ADDRESS, assemble, elf_kernel
from ringfence.images.store import Image
from ringfence.machine import Machine

PRINT = """
print:  # ESI: text
    lodsb
    test al, al
    jz 9f
    mov edx, 0x3f8
    out dx, al
    mov edx, 0xe9
    out dx, al
    jmp print
9:  ret
"""
LEAVE = "mov edx, 0xf4\nmov eax, {}\nout dx, eax\n1: hlt\njmp 1b\n"
MULTIBOOT = (
    "dec edi\ninc edi\n"  # prefixes in 64-bit mode
    "cmp eax, 0x2badb002\njne 8f\nmov esp, 0x7000\nmov edi, ebx\n"
    "mov esi, [edi + 16]\ncall print\n"  # the command line
    "mov ebx, [edi + 24]\nmov esi, [ebx + 8]\ncall print\nmov esi, [ebx]\ncall print\n"
    + LEAVE.format(21) + "8: " + LEAVE.format(1) + PRINT
)  # fmt: skip
PVH = (
    "cmp dword ptr [ebx], 0x336ec578\njne 8f\nmov esp, 0x7000\n"
    "mov esi, [ebx + 24]\ncall print\n" + LEAVE.format(22) + "8: " + LEAVE.format(1) + PRINT
)


def run(
    kernel: bytes, engine: str, cache: Path, **options: object
) -> tuple[int | None, bytes, bytes]:
    """Run to the end: exit status, console, debug console."""
    said = bytearray()
    test = TestDevices(exit_port=0xF4, console=said.extend, ports=True)
    with Machine(
        kernel=kernel, memory="16M", engine=engine, cache_dir=cache, test=test, append="a b",
        **options,  # type: ignore[arg-type]
    ) as machine:  # fmt: skip
        machine.start()
        outcome = machine.wait(30)
        assert outcome is StopReason.GUEST_EXIT, machine.crash_report
        return machine.exit_status, machine.console.raw, bytes(said)


def kernel64(source: str) -> bytes:
    return elf_kernel(assemble(".intel_syntax noprefix\n.text\n" + source), LOAD_ADDRESS)


@pytest.mark.parametrize(("value", "status"), [(0, 1), (16, 33), (0xFFFF, 255)])
def test_exit_status(value: int, status: int, cache: Path) -> None:
    assert run(kernel64(LEAVE.format(value)), "translate", cache)[0] == status


def test_ports_of_test_kernels(cache: Path) -> None:
    source = (
        "mov eax, 0x11223344\nout 0xe0, eax\nin al, 0xe2\nmov bl, al\nin ax, 0xe0\nmov bh, al\n"
        "mov dx, 0x510\nmov ax, 5\nout dx, ax\ninc dx\nin al, dx\nmov cl, al\n"  # CPUs
        "in al, 0xe9\nout 0xe9, al\n"
        "mov edi, 0xff000000\nmov dword ptr [rdi + 8], 0x55\nmov eax, [rdi + 8]\n"
        "shl eax, 24\nmov al, cl\nshl eax, 16\nmov ax, bx\n"
        "mov rsi, rax\nmov eax, esi\nout 0xe9, al\nshr eax, 8\nout 0xe9, al\nshr eax, 8\n"
        "out 0xe9, al\n"
    )
    status, _, said = run(kernel64(source + LEAVE.format(3)), "translate", cache)
    assert (status, said) == (7, b"\xe9\x22\x44\x01")


@pytest.mark.parametrize("form", ["elf", "flat"])
def test_multiboot(engine: str, form: str, cache: Path, tmp_path: Path) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"<in the module>\0")
    kernel = (multiboot_elf if form == "elf" else multiboot_flat)(MULTIBOOT)
    status, console, said = run(kernel, engine, cache, modules=[f"{module} -x"])
    assert status == 43
    assert console == said == f"kernel a b{module} -x<in the module>".encode()


def test_pvh(engine: str, cache: Path) -> None:
    assert run(pvh_elf(PVH), engine, cache) == (45, b"a b", b"a b")


def test_command_line(cache: Path, tmp_path: Path) -> None:
    """The exit status becomes the command's; the debug console goes to stderr, or to a file."""
    kernel, said = tmp_path / "kernel", tmp_path / "said"
    kernel.write_bytes(kernel64("mov al, 'x'\nout 0xe9, al\n" + LEAVE.format(8)))
    command = support.command("run", "--kernel", kernel)
    command += ["--memory", "32M", "--timeout", "60", "--cache-dir", str(cache)]

    def outcome(*more: str) -> tuple[int, bytes, bytes]:
        done = subprocess.run([*command, *more], env=support.environment(), capture_output=True)
        return done.returncode, done.stdout, done.stderr

    assert outcome("--test-devices") == (17, b"", b"x")
    assert outcome("--debug-exit", "244", "--debugcon", str(said)) == (17, b"", b"")
    assert said.read_bytes() == b"x"
    status, _, error = outcome("--debug-exit", "0x10000")
    assert (status, b"expected a number" in error) == (2, True)
    status, _, error = outcome("--boot", "pvh")
    assert (status, b"no PVH entry point" in error) == (3, True)
    status, _, error = outcome("--debugcon", str(tmp_path / "none" / "file"))
    assert (status, b"No such file" in error) == (2, True)


@pytest.fixture(params=["translate", "kvm"])
def engine(request: pytest.FixtureRequest) -> str:
    """Every engine of the host that runs protected mode."""
    name: str = request.param
    try:
        engines.resolve(name)
    except HostError as error:
        pytest.skip(str(error))
    if Mode.PROTECTED not in engines.capabilities(name).modes:
        pytest.xfail(f"engine {name} offers no protected mode")
    return name


def test_linux_without_acpi(generic: Image, cache: Path) -> None:
    """CPUs and interrupts by the MP tables; the keyboard controller resets."""
    with Machine(
        kernel=generic.kernel, initrd=generic.initrd, memory="256M", cpus=2, engine="translate",
        append="console=ttyS0 quiet acpi=off reboot=k", cache_dir=cache,
    ) as machine:  # fmt: skip
        machine.start()
        machine.console.wait_for("~ # ", support.BOOT)
        machine.console.send("echo cpus $(nproc); grep ttyS0 /proc/interrupts\n")
        said = machine.console.wait_for("ttyS0\r\n", support.BOOT)
        assert "cpus 2" in said
        assert "IO-APIC" in said
        machine.console.send("reboot -f\n")
        assert machine.wait(support.BOOT) is StopReason.RESET
