"""A guest that the project brings along as assembly source: a greeting and a small prompt.

For hosts without apt, and for tests of an engine that should not need Linux. It is entered like
Linux (64-bit mode, identity map, RSI at the zero page), talks to the 16550 UART by polling, and
switches the machine off through ACPI's PM1a control register.

Shape: the source below is assembled at run time by LLVM (as ``module asm``) into one position-
independent section, which :func:`builtin_kernel` wraps into an ELF64 file with one segment. No
binary is kept in the repository.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache

from ringfence.errors import HostError
from ringfence.images.store import Image, Store, write_atomically

LOAD_ADDRESS = 0x100000
UART_BASE = 0x3F8
PM1A_CONTROL = 0x604
SLP_TYP5 = 5
SLP_EN = 1 << 13
"""ACPI 6.5 table 4.13: SLP_TYPx is bits 10-12, SLP_EN bit 13 of the PM1 control register."""
NAME = "builtin"
VERSION = "1"

SOURCE = r"""
.intel_syntax noprefix
.text
start:
    cli
    cld
    lea rsp, [rip + stack_top]
    lea rsi, [rip + greeting]
    call puts

prompt:
    lea rsi, [rip + prompt_text]
    call puts
    call read_line
    cmp byte ptr [rip + line], 0
    je prompt
    lea rbx, [rip + commands]
next_command:                       # rbx: an entry of the table, two distances from its start
    movsxd rdi, dword ptr [rbx]
    test rdi, rdi
    jz unknown
    lea rax, [rip + commands]
    add rdi, rax
    lea rsi, [rip + line]
compare:                            # the name's end must meet the line's end or a space
    mov al, [rdi]
    test al, al
    jz name_ended
    cmp al, [rsi]
    jne no_match
    inc rdi
    inc rsi
    jmp compare
name_ended:
    mov al, [rsi]
    test al, al
    jz matched
    cmp al, ' '
    jne no_match
    inc rsi
matched:                            # rsi: the command's argument
    movsxd rax, dword ptr [rbx + 4]
    lea rdx, [rip + commands]
    add rax, rdx
    call rax
    jmp prompt
no_match:
    add rbx, 8
    jmp next_command
unknown:
    lea rsi, [rip + unknown_text]
    call puts
    jmp prompt

do_help:
    lea rsi, [rip + help_text]
    jmp puts
do_echo:
    call puts
    lea rsi, [rip + newline]
    jmp puts
do_cpuid:                           # leaf 0: the vendor in EBX, EDX, ECX
    push rbx
    xor eax, eax
    xor ecx, ecx
    cpuid
    lea rsi, [rip + line]
    mov [rsi], ebx
    mov [rsi + 4], edx
    mov [rsi + 8], ecx
    mov byte ptr [rsi + 12], 0
    pop rbx
    jmp do_echo
do_poweroff:
    lea rsi, [rip + bye_text]
    call puts
    mov dx, PM1A_CONTROL
    mov ax, SLEEP
    out dx, ax
stop:
    hlt
    jmp stop

read_line:                          # into line, with echo and backspace
    lea rdi, [rip + line]
    xor ecx, ecx
read_more:
    call getc
    cmp al, 13
    je line_done
    cmp al, 10
    je line_done
    cmp al, 8
    je erase
    cmp al, 127
    je erase
    cmp al, 32
    jb read_more
    cmp ecx, 120
    jae read_more
    mov [rdi + rcx], al
    inc ecx
    call putc
    jmp read_more
erase:
    test ecx, ecx
    jz read_more
    dec ecx
    lea rsi, [rip + erase_text]
    call puts
    jmp read_more
line_done:
    mov byte ptr [rdi + rcx], 0
    lea rsi, [rip + newline]
    jmp puts

puts:                               # NUL-ended text at rsi
    lodsb
    test al, al
    jz puts_done
    call putc
    jmp puts
puts_done:
    ret
putc:                               # al, once the transmitter is empty (LSR bit 5)
    push rax
    mov dx, UART + 5
putc_wait:
    in al, dx
    test al, 0x20
    jz putc_wait
    pop rax
    mov dx, UART
    out dx, al
    ret
getc:                               # al, once there is a byte (LSR bit 0)
    mov dx, UART + 5
getc_wait:
    pause
    in al, dx
    test al, 1
    jz getc_wait
    mov dx, UART
    in al, dx
    ret

.balign 4
commands:
    .long help_name - commands, do_help - commands
    .long echo_name - commands, do_echo - commands
    .long cpuid_name - commands, do_cpuid - commands
    .long poweroff_name - commands, do_poweroff - commands
    .long 0
help_name: .asciz "help"
echo_name: .asciz "echo"
cpuid_name: .asciz "cpuid"
poweroff_name: .asciz "poweroff"
greeting: .asciz "Hello from the guest: 64-bit mode, and nobody else is here.\r\nTry 'help'.\r\n"
prompt_text: .asciz "guest> "
help_text: .asciz "help, echo TEXT, cpuid, poweroff\r\n"
unknown_text: .asciz "No such command; try 'help'.\r\n"
bye_text: .asciz "Goodbye.\r\n"
erase_text: .asciz "\b \b"
newline: .asciz "\r\n"
.balign 16
line: .space 128
    .space 2048
stack_top:
"""


def builtin_kernel(
    *, uart: int = UART_BASE, pm1a_control: int = PM1A_CONTROL, slp_typ: int = SLP_TYP5
) -> bytes:
    """The built-in guest as an ELF64 kernel.

    Parameters
    ----------
    uart : int
        First I/O port of the 16550.
    pm1a_control : int
        I/O port of ACPI's PM1a control register.
    slp_typ : int
        The value of its SLP_TYP field that means soft off (S5).
    """
    constants = {
        "UART": uart,
        "PM1A_CONTROL": pm1a_control,
        "SLEEP": slp_typ << 10 | SLP_EN,
    }
    text = assemble("".join(f".set {k}, {v}\n" for k, v in constants.items()) + SOURCE)
    return elf_kernel(text, LOAD_ADDRESS)


@lru_cache(maxsize=16)
def assemble(source: str) -> bytes:
    """The bytes of .text that LLVM makes of x86-64 assembly; only local references are allowed.

    Raises
    ------
    HostError
        The assembler refuses the source, or LLVM has no x86-64 backend here.
    """
    import llvmlite.binding as llvm
    from elftools.elf.elffile import ELFFile

    quoted = "".join(c if c.isalnum() or c in " .,_:[]+-" else f"\\{ord(c):02x}" for c in source)
    triple = "x86_64-unknown-linux-gnu"
    try:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.initialize_native_asmparser()
        machine = llvm.Target.from_triple(triple).create_target_machine()
        module = llvm.parse_assembly(
            f'target triple = "{triple}"\nmodule asm "{quoted}"\nmodule asm "\\0a.att_syntax"\n'
        )
        module.verify()
        file = ELFFile(io.BytesIO(machine.emit_object(module)))
    except RuntimeError as error:
        raise HostError(
            f"LLVM can't assemble the built-in guest ({error}): reinstall llvmlite"
        ) from error
    if file.get_section_by_name(".rela.text") is not None:
        raise HostError("the built-in guest refers to something outside of itself")
    section = file.get_section_by_name(".text")
    if section is None:
        raise HostError("LLVM gave an object without .text: reinstall llvmlite")
    return bytes(section.data())


def elf_program(code: bytes, page: int, entry: int) -> bytes:
    """A static ELF64 program for Linux: position-independent ``code``, entered at an offset.

    ``page`` is where its headers come to lie in memory; they are in its segment, as the kernel maps
    whole pages of the file.
    """
    start = 64 + 56
    identification = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        identification, 2, 62, 1, page + start + entry, 64, 0, 0, 64, 56, 1, 64, 0, 0,
    )  # fmt: skip
    size = start + len(code)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, page, page, size, size, 4096) + code


def elf_kernel(text: bytes, address: int) -> bytes:
    """An ELF64 executable with one segment, ``text`` at physical and virtual ``address``.

    Zeros at the end of ``text`` become memory that is not in the file (ELF: p_memsz > p_filesz).
    """
    stored = text.rstrip(b"\0")
    offset = 64 + 56
    identification = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", identification, 2, 62, 1, address, 64, 0, 0, 64, 56, 1, 64, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 7, offset, address, address, len(stored), len(text), 16)
    return header + segment + stored


def store_builtin(store: Store) -> Image:
    """Put the built-in guest into the image folder, under the name "builtin"."""
    present = store.get(NAME)
    if present is not None and present.kernel_version == VERSION:
        return present
    with store.filling(NAME) as folder:
        write_atomically(folder / "kernel", builtin_kernel())
        store.write_manifest(
            folder, name=NAME, kernel="kernel", initrd=None, cmdline="", kernel_version=VERSION
        )
    return store.find(NAME)
