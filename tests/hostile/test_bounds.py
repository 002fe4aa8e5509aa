"""Whole machines with hostile kernels: storms, resets, damaged files. The owner stays in charge."""

from __future__ import annotations

import gc
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostile.support import code
from kept import kept_code
from ringfence import Machine
from ringfence.engine import StopReason
from ringfence.images.builtin import elf_kernel
from ringfence.native.library import read_image

LOAD = 0x100000
LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
ROUNDS = int(os.environ.get("RINGFENCE_TEST_ROUNDS", "1"))
OFF = "mov dx, 0x604; mov ax, 0x3400; out dx, ax; hlt"
RESET = "mov dx, 0xcf9; mov al, 6; out dx, al; hlt"

IDT = """
    lea rdi, [rip + idt]
    lea rsi, [rip + handler]
    mov ecx, 256
1:
    mov eax, esi
    mov [rdi], ax
    mov word ptr [rdi + 2], 0x10
    mov word ptr [rdi + 4], 0x8e00
    shr rax, 16
    mov [rdi + 6], ax
    mov dword ptr [rdi + 8], 0
    add rdi, 16
    dec ecx
    jnz 1b
    lea rsp, [rip + stack]
    lea rax, [rip + idt]
    mov [rip + idtr + 2], rax
    lidt [rip + idtr]
"""
DATA = """
    .balign 16
idtr:
    .short 4095
    .quad 0
    .balign 4096
idt:
    .zero 4096
    .zero 4096
stack:
    .zero 4096
"""


def kernel(body: str, handler: str = "iretq") -> bytes:
    """A kernel with an IDT whose every vector leads to ``handler``."""
    return elf_kernel(code(f"{IDT}\n{body}\nhandler:\n{handler}\n{DATA}"), LOAD)


def machine(image: bytes, **options: object) -> Machine:
    """A small machine without a disk cache, unless it is asked for."""
    settings: dict[str, object] = {
        "engine": "translate",
        "memory": "16M",
        "cache": False,
        **options,
    }
    return Machine(kernel=image, **settings)  # type: ignore[arg-type]


EOI = f"mov eax, {LAPIC}; mov dword ptr [rax + 0xb0], 0; iretq"
TIMER = f"""
    mov eax, {LAPIC}
    mov dword ptr [rax + 0xf0], 0x1ff
    mov dword ptr [rax + 0x3e0], 0xb
    mov dword ptr [rax + 0x320], MODE
    mov dword ptr [rax + 0x380], 1
"""
STORMS = {
    "jmp $": ("cli; 1: jmp 1b", "iretq"),
    "rep movsb": (
        "cld; 1: mov esi, 0x200000; mov edi, 0x400000; mov rcx, -1; rep movsb; jmp 1b",
        "mov qword ptr [rsp + 8], 0; iretq",
    ),
    "rep scasb": ("1: mov edi, 0x200000; mov rcx, -1; xor eax, eax; repe scasb; jmp 1b", "iretq"),
    "cli hlt": ("cli; 1: hlt; jmp 1b", "iretq"),
    "one-shot": (TIMER.replace("MODE", "0x40") + "1: sti; hlt; jmp 1b",
                 f"mov eax, {LAPIC}; mov dword ptr [rax + 0x380], 1; {EOI}"),
    "periodic": (TIMER.replace("MODE", "0x20040") + "sti; 1: hlt; jmp 1b", EOI),
    "periodic busy": (TIMER.replace("MODE", "0x20040") + "sti; 1: inc rbx; jmp 1b", EOI),
    "no eoi": (TIMER.replace("MODE", "0x20040") + "sti; 1: inc rbx; jmp 1b", "sti; iretq"),
    "pit": ("mov al, 0x34; out 0x43, al; mov al, 1; out 0x40, al; mov al, 0; out 0x40, al;"
            "mov al, 0; out 0x21, al; sti; 1: hlt; jmp 1b", "mov al, 0x20; out 0x20, al; iretq"),
    "pit rate 2": ("mov al, 0x36; out 0x43, al; mov al, 1; out 0x40, al; mov al, 0; out 0x40, al;"
                   "mov al, 0; out 0x21, al; sti; 1: jmp 1b", "mov al, 0x20; out 0x20, al; iretq"),
    "self ipi": (f"mov ebx, {LAPIC}; mov dword ptr [rbx + 0xf0], 0x1ff; sti;"
                 "1: mov dword ptr [rbx + 0x300], 0x40041; jmp 1b", EOI),
    "exceptions": ("ud2", "lea rsp, [rip + stack]; ud2"),
    "mmio": (f"mov ebx, {LAPIC}; 1: mov eax, [rbx + 0x390]; mov [rbx + 0x80], eax; jmp 1b", "hlt"),
    "mmio strings": (f"cld; 1: mov edi, {IOAPIC}; mov esi, {LAPIC}; mov rcx, -1; rep movsd; jmp 1b",
                     "iretq"),
    "ports": ("1: inc edx; in al, dx; out 0x80, al; jmp 1b", "iretq"),
    "port strings": ("1: mov dx, 0x3fd; mov edi, 0x300000; mov ecx, 0x100000; rep insb; jmp 1b",
                     "iretq"),
    "serial": ("mov dx, 0x3f8; 1: out dx, al; jmp 1b", "iretq"),
    "serial strings": ("1: mov dx, 0x3f8; mov esi, 0x300000; mov rcx, -1; rep outsb; jmp 1b",
                       "iretq"),
    "self-modifying": ("1: inc dword ptr [rip + 2f + 1]; 2: mov eax, 0; jmp 1b", "iretq"),
    "new code": ("cld; 1: lea rdi, [rip + stack]; mov al, 0x90; mov ecx, 4000; rep stosb;"
                 "mov al, 0xc3; stosb; inc ebx; mov [rip + stack + 64], bl; lea rax, [rip + stack];"
                 "call rax; jmp 1b", "mov eax, 0x100000; jmp rax"),
    "cr3": ("mov rax, cr3; 1: mov cr3, rax; invlpg [rbx]; add rbx, 4096; jmp 1b", "iretq"),
    "cpuid": ("1: cpuid; inc eax; jmp 1b", "iretq"),
}  # fmt: skip


@pytest.mark.parametrize("name", STORMS)
def test_stop_is_honoured(name: str) -> None:
    """Whatever the guest does, the owner pauses, resumes and stops it within a second each."""
    body, handler = STORMS[name]
    with machine(kernel(body, handler)) as made:
        made.start()
        time.sleep(0.25)
        assert made.outcome is None, made.crash_report
        began = time.monotonic()
        made.pause()
        assert time.monotonic() - began < 1
        made.resume()
        time.sleep(0.05)
        began = time.monotonic()
        made.stop()
        assert time.monotonic() - began < 1
        assert made.wait(1) is StopReason.STOPPED


def test_random_port_and_device_accesses() -> None:
    """Ports of all sizes, devices of all sizes and alignments, in the guest's own random order."""
    skip = {0x604: "power", 0x605: "power", 0xCF9: "reset", 0x64: "reset", 0x92: "reset"}
    source = random.Random(5)
    lines = []
    for _ in range(600 * ROUNDS):
        port = source.choice([source.randrange(0x10000), source.randrange(0x500)])
        if any(port <= bad < port + 4 for bad in skip):
            continue
        lines.append(f"mov edx, {port}; mov eax, {source.getrandbits(32)}")
        lines.append(source.choice(["out dx, al", "out dx, ax", "out dx, eax",
                                    "in al, dx", "in ax, dx", "in eax, dx"]))  # fmt: skip
        base = source.choice([LAPIC, IOAPIC, 0xFED0_0000, 0xFFFF_E000, 0xC000_0000, 0x100_0000])
        address = base + source.choice([source.randrange(0x1000), source.randrange(0x400) & ~15])
        lines.append(f"mov ebx, {address}; mov eax, {source.getrandbits(32)}")
        lines.append(
            source.choice(
                [
                    "mov [rbx], eax", "mov [rbx], rax", "mov [rbx], al", "mov [rbx], ax",
                    "mov eax, [rbx]", "movups xmm0, [rbx]", "movups [rbx], xmm0",
                    "fld tbyte ptr [rbx]",
                    "lock xadd [rbx], eax", "and ebx, -16; fxsave [rbx]", "fnsave [rbx]",
                    "vmovups [rbx], ymm0",
                    "and ebx, -16; cmpxchg16b [rbx]", "push qword ptr [rbx]; pop rax",
                    "and ebx, -64; mov eax, 7; xor edx, edx; xsave [rbx]", "bts dword ptr [rbx], 5",
                    "mov edi, ebx; mov esi, ebx; mov ecx, 9; rep movsw",
                ]
            )
        )  # fmt: skip
    enable = (
        "mov rax, cr0; and eax, -13; mov cr0, rax; mov rax, cr4; or eax, 0x40600; mov cr4, rax;"
    )
    enable += "xor ecx, ecx; mov eax, 7; xor edx, edx; xsetbv; cld"
    body = "\n".join([enable, *lines, OFF])
    with machine(kernel(body, RESET)) as made:
        made.start()
        assert made.wait(20) is StopReason.POWER_OFF


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("way", [RESET, "xor eax, eax; div eax; " + RESET])
def test_reboot_loop(way: str) -> None:
    """Memory and file descriptors stay where they are over many resets."""
    with machine(kernel(f"{way}\n1: hlt; jmp 1b", RESET), on_reset="reboot") as made:
        made.start()

        def resets(count: int) -> tuple[int, int]:
            deadline = time.monotonic() + 30
            while made._resets < count:
                assert time.monotonic() < deadline and made.outcome is None, made.crash_report
                time.sleep(0.01)
            made.pause()
            gc.collect()
            found = resident(), len(list(Path("/proc/self/fd").iterdir()))
            made.resume()
            return found

        first = resets(6)
        later = resets(26)
    assert later[1] <= first[1]
    assert later[0] - first[0] < 24 << 20, f"{(later[0] - first[0]) >> 20} MiB more"


def test_statistics_during_resets() -> None:
    """They can be asked for at any time."""
    with machine(kernel(f"{RESET}\n1: hlt; jmp 1b", RESET), on_reset="reboot") as made:
        made.start()
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            made.stats()


# --- output of a guest that never leaves translated code again ------------------------------------


def test_output_of_a_guest_that_spins() -> None:
    """Console bytes are gathered, but not kept: they come out although nothing exits any more."""
    source = """
        lea rsi, [rip + text]
        mov ecx, 13
    next:
        mov dx, 0x3fd
        in al, dx
        test al, 0x20
        jz next
        mov dx, 0x3f8
        lodsb
        out dx, al
        dec ecx
        jnz next
        cli
        jmp $
    text: .ascii "spinning away"
    """
    with machine(kernel(source.replace("jmp $", "9: jmp 9b"))) as made:
        made.start()
        assert made.console.wait_for("spinning away", 10)


# --- the file that keeps the engine's own code ---------------------------------------------------

GREETING = kernel(
    "mov dx, 0x3f8; mov al, 0x4f; out dx, al; mov al, 0x4b; out dx, al;"
    "mov ecx, 100; 1: lea rax, [rcx + rcx]; dec ecx; jnz 1b;" + OFF
)


def greets(folder: Path) -> Machine:
    """Run a small guest with a cache folder; it says OK."""
    with machine(GREETING, cache=True, cache_dir=folder) as made:
        made.start()
        assert made.wait(20) is StopReason.POWER_OFF
        return made


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the engine's code."""
    folder = tmp_path_factory.mktemp("filled")
    greets(folder)
    kept_code(folder)
    return folder


def damaged(kind: str, path: Path) -> None:
    """Do something to the file."""
    data = bytearray(path.read_bytes())
    source = random.Random(kind)
    path.unlink()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "garbage":
        path.write_bytes(source.randbytes(8192))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bits":
        for _ in range(200):
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        path.write_bytes(data)
    elif kind == "symlink":
        (path.parent / "elsewhere").write_bytes(data)
        path.symlink_to("elsewhere")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "writable":
        path.write_bytes(data)
        path.chmod(0o666)


KINDS = ("truncated", "garbage", "empty", "bits", "symlink", "directory", "fifo", "writable")


@pytest.mark.parametrize("name", ["native-*.o", "answers-*.bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_code(filled: Path, tmp_path: Path, name: str, kind: str) -> None:
    """It is ignored or made anew; the guest does not notice."""
    folder = tmp_path / "cache"
    shutil.copytree(filled, folder)
    (path,) = folder.glob(name)
    damaged(kind, path)
    assert read_image(path) is None
    greets(folder)


def test_read_only_folder(filled: Path, tmp_path: Path) -> None:
    """Nothing can be kept, all works."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    greets(folder)
    (tmp_path / "file").write_text("no folder")
    greets(tmp_path / "file" / "cache")


SCRIPT = """
import os, resource, sys
sys.path[:0] = sys.argv[3].split(":")
from pathlib import Path
limit, none = int(sys.argv[2]) or -1, resource.RLIM_INFINITY
truncate = os.ftruncate
def unlimited(fd, size):  # guest RAM and the code cache are no files of the disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (none, none))
    truncate(fd, size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, none))
os.ftruncate = unlimited
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, none))
from hostile.test_bounds import greets
greets(Path(sys.argv[1]))
print("fine")
"""


def start(folder: Path, limit: int = 0) -> subprocess.Popen[str]:
    """The guest in a process of its own; bytecode cut short would be in other tests' way."""
    where = ":".join(str(Path(p).resolve()) for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(limit), where],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("limit", [4096, 20000, 300_000])
def test_full_disk(tmp_path: Path, limit: int) -> None:
    """No file can grow beyond a limit: the run goes on, nothing half-written is used."""
    child = start(tmp_path / "cache", limit)
    out, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert out == "fine\n" and "Traceback" not in errors
    greets(tmp_path / "cache")


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """What could not be written whole is not left on the disk."""
    child = start(tmp_path / "cache", 4096)
    child.communicate(timeout=60)
    assert not list((tmp_path / "cache").glob("tmp*"))


def test_two_processes(tmp_path: Path) -> None:
    """Both fill the same folder at once."""
    children = [start(tmp_path / "cache") for _ in range(2)]
    for child in children:
        _, errors = child.communicate(timeout=90)
        assert child.returncode == 0, errors
    assert read_image(kept_code(tmp_path / "cache"))
