"""Control and debug registers, table registers, flags, ports: results, refusals, exits."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from ringfence.cpu import control, debug, library, portio, system
from ringfence.cpu.dump import dump
from ringfence.cpu.reset import reset
from ringfence.cpu.state import (
    CR4_DE,
    CR4_FSGSBASE,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_SMAP,
    CR4_TSD,
    CR4_UMIP,
    DB,
    EXIT,
    EXIT_CR8_READ,
    EXIT_CR8_WRITE,
    EXIT_HALT,
    EXIT_HYPERCALL,
    EXIT_PORT_IN,
    EXIT_PORT_OUT,
    EXIT_PORT_STRING,
    FAULT,
    FLAG_IF,
    FLAG_IOPL,
    FLAG_RF,
    FLAG_TF,
    FS,
    GP,
    GS,
    LDTR,
    NO_EXCEPTION,
    OK,
    PF,
    RAX,
    RCX,
    RDX,
    RSP,
    SHADOW_STI,
    SS_FAULT,
    TR,
    UD,
    XSAVE_BYTES,
)

RBX = 3
BAD = 0x8000_0000_0000
CR0 = 0x80050033
MEMORY = 0x20000


@pytest.fixture
def machine(flat_machine: Callable[..., Any]) -> Any:
    made = flat_machine(control, debug, portio, system)
    made.cpu.seg_attr[1] = 0x29B
    return made


def refused(machine: Any, name: str, *operands: int, by: tuple[int, int] = (GP, 0)) -> None:
    """The effect faults in one way, and nothing else has changed."""
    machine.cpu.rip, machine.cpu.next_rip = 0x1000, 0x1002
    before = machine.snapshot()
    assert machine.effect(name, *operands) == FAULT
    assert machine.pending == by
    assert machine.snapshot() == before


def done(machine: Any, name: str, *operands: int) -> None:
    assert machine.effect(name, *operands) == OK
    assert machine.cpu.rip == machine.cpu.next_rip


def to_cr(machine: Any, number: int, value: int) -> None:
    machine.cpu.gpr[RBX] = value
    done(machine, "fx_mov_to_cr", RBX, number)


def cr_refuses(machine: Any, number: int, value: int) -> None:
    machine.cpu.gpr[RBX] = value
    refused(machine, "fx_mov_to_cr", RBX, number)


PRIVILEGED = [
    *("fx_mov_to_cr", "fx_mov_from_cr", "fx_mov_to_dr", "fx_mov_from_dr", "fx_clts", "fx_lmsw"),
    *("fx_lgdt", "fx_lidt", "fx_invlpg", "fx_invpcid", "fx_wbinvd", "fx_hlt", "fx_swapgs"),
]


@pytest.mark.parametrize("name", PRIVILEGED)
def test_user_mode_may_not(machine: Any, name: str) -> None:
    machine.cpu.cpl = 3
    machine.cpu.ea = MEMORY
    refused(machine, name, 0, 0)


@pytest.mark.parametrize("number", [1, 5, 6, 7, 9, 15])
def test_missing_control_registers(machine: Any, number: int) -> None:
    refused(machine, "fx_mov_to_cr", 0, number, by=(UD, 0))
    refused(machine, "fx_mov_from_cr", 0, number, by=(UD, 0))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(CR0 | 1 << 32, id="upper half"),
        pytest.param(CR0 | 1 << 29, id="NW without CD"),
        pytest.param(CR0 & ~1, id="PG without PE"),
        pytest.param(CR0 & ~(1 << 31), id="PG off in 64-bit code"),
    ],
)
def test_cr0_refuses(machine: Any, value: int) -> None:
    cr_refuses(machine, 0, value)


def test_cr0_drops_undefined_bits_and_keeps_et(machine: Any) -> None:
    to_cr(machine, 0, (CR0 | 1 << 6 | 1 << 28) & ~0x10)
    assert machine.cpu.cr0 == CR0
    assert machine.cpu.mode_changes == machine.cpu.flushes_all == 0
    to_cr(machine, 0, CR0 | 8)
    assert (machine.cpu.mode_changes, machine.cpu.flushes_all) == (1, 0)
    to_cr(machine, 0, CR0 & ~(1 << 16))
    assert (machine.cpu.mode_changes, machine.cpu.flushes_all) == (2, 1)


def test_leaving_long_mode_and_coming_back(machine: Any) -> None:
    cpu = machine.cpu
    to_cr(machine, 4, cpu.cr4 & ~(1 << 17))
    cpu.seg_attr[1] = 0x49B
    to_cr(machine, 0, CR0 & ~(1 << 31))
    assert (cpu.cr0, cpu.efer & 0x500) == (CR0 & ~(1 << 31), 0x100)
    to_cr(machine, 0, CR0)
    assert (cpu.cr0, cpu.efer & 0x500) == (CR0, 0x500)
    to_cr(machine, 0, CR0 & ~(1 << 31))
    to_cr(machine, 0, CR0 & ~(1 << 31 | 1))
    assert cpu.cr0 & 1 == 0
    cpu.seg_attr[1] = 0xA9B
    cr_refuses(machine, 0, CR0)  # into long mode with 64-bit code
    cpu.seg_attr[1] = 0x49B
    cpu.cr4 &= ~CR4_PAE
    cr_refuses(machine, 0, CR0)


@pytest.mark.parametrize("bit", [CR4_SMAP, 1 << 12, 1 << 13, 1 << 22, 1 << 23, 1 << 19, 1 << 63])
def test_cr4_refuses_what_is_not_offered(machine: Any, bit: int) -> None:
    cr_refuses(machine, 4, machine.cpu.cr4 | bit)


def test_cr4_keeps_pae(machine: Any) -> None:
    cr_refuses(machine, 4, machine.cpu.cr4 & ~CR4_PAE)


def test_cr4_flushes_only_for_paging(machine: Any) -> None:
    cpu = machine.cpu
    to_cr(machine, 4, cpu.cr4 | CR4_OSXSAVE)
    assert (cpu.mode_changes, cpu.flushes_all) == (1, 0)
    to_cr(machine, 4, cpu.cr4 ^ CR4_PGE)
    assert (cpu.mode_changes, cpu.flushes_all) == (2, 1)


def test_pcid(machine: Any) -> None:
    cpu = machine.cpu
    cr_refuses(machine, 3, 1 << 63 | 0x5000)
    cpu.cr3 = 0x1001
    cr_refuses(machine, 4, cpu.cr4 | CR4_PCIDE)
    cpu.cr3 = 0x1000
    to_cr(machine, 4, cpu.cr4 | CR4_PCIDE)
    to_cr(machine, 3, 1 << 63 | 0x5007)
    assert cpu.cr3 == 0x5007
    assert cpu.flushes_nonglobal == 1
    cr_refuses(machine, 0, CR0 & ~(1 << 31))


@pytest.mark.parametrize("bit", [40, 52, 62])
def test_cr3_refuses_physical_bits_beyond_the_model(machine: Any, bit: int) -> None:
    cr_refuses(machine, 3, 1 << bit)


def test_cr3_and_cr2_round_trip(machine: Any) -> None:
    cpu = machine.cpu
    to_cr(machine, 3, 0xFF_FFFF_F018)
    to_cr(machine, 2, 0xFFFF_8000_DEAD_BEEF)
    assert cpu.flushes_nonglobal == 1
    for number, value in ((0, CR0), (2, cpu.cr2), (3, cpu.cr3), (4, cpu.cr4)):
        done(machine, "fx_mov_from_cr", 15, number)
        assert cpu.gpr[15] == value


def test_cr8_is_for_the_vmm(machine: Any) -> None:
    cpu = machine.cpu
    cr_refuses(machine, 8, 16)
    cpu.gpr[RBX] = 9
    assert machine.effect("fx_mov_to_cr", RBX, 8) == EXIT
    assert (cpu.exit_reason, cpu.exit_data[0], cpu.rip) == (EXIT_CR8_WRITE, 9, 0x1000)
    assert machine.effect("fx_mov_from_cr", 12, 8) == EXIT
    assert (cpu.exit_reason, cpu.exit_data[0], cpu.rip) == (EXIT_CR8_READ, 12, 0x1000)


def test_debug_registers(machine: Any) -> None:
    cpu = machine.cpu
    cpu.gpr[RBX] = 0xFFFF_FFFF
    done(machine, "fx_mov_to_dr", RBX, 6)
    assert cpu.dr[6] == 0xFFFFEFFF
    done(machine, "fx_mov_to_dr", RBX, 4)
    done(machine, "fx_mov_from_dr", RAX, 4)
    assert cpu.gpr[RAX] == cpu.dr[6]
    cpu.gpr[RBX] = 0xFFFF_DFFF
    done(machine, "fx_mov_to_dr", RBX, 5)
    assert cpu.dr[7] == 0xFFFF07FF
    cpu.gpr[RBX] = 1 << 32
    refused(machine, "fx_mov_to_dr", RBX, 6)
    refused(machine, "fx_mov_to_dr", RBX, 7)
    done(machine, "fx_mov_to_dr", RBX, 3)
    assert cpu.dr[3] == 1 << 32
    cpu.cr4 |= CR4_DE
    refused(machine, "fx_mov_to_dr", RBX, 4, by=(UD, 0))
    refused(machine, "fx_mov_from_dr", RBX, 5, by=(UD, 0))
    refused(machine, "fx_mov_from_dr", RBX, 8, by=(UD, 0))


def test_general_detect(machine: Any) -> None:
    cpu = machine.cpu
    cpu.dr[7] = 0x2400
    assert machine.effect("fx_mov_from_dr", RAX, 0) == FAULT
    assert machine.pending == (DB, 0)
    assert cpu.dr[6] & 1 << 13
    assert not cpu.dr[7] & 1 << 13


def test_machine_status_word(machine: Any) -> None:
    cpu = machine.cpu
    done(machine, "fx_lmsw", 0xFFFE)
    assert cpu.cr0 == CR0 | 0xF
    done(machine, "fx_clts")
    assert (cpu.cr0, cpu.mode_changes) == (CR0 | 7, 2)
    for size, expected in ((2, 0xFFFF_FFFF_FFFF_0037), (4, CR0 | 7), (8, CR0 | 7)):
        cpu.gpr[RBX] = (1 << 64) - 1
        done(machine, "fx_smsw", RBX, size)
        assert cpu.gpr[RBX] == expected
    cpu.ea = MEMORY
    done(machine, "fx_smsw_mem")
    assert machine.read(MEMORY) == 0x37


def test_umip(machine: Any) -> None:
    cpu = machine.cpu
    cpu.cpl = 3
    cpu.cr4 |= CR4_UMIP
    cpu.ea = MEMORY
    names = ["smsw", "smsw_mem", "sgdt", "sidt", "sldt", "sldt_mem", "str", "str_mem"]
    for name in names:
        refused(machine, f"fx_{name}", 0, 8)
    cpu.cr4 &= ~CR4_UMIP
    for name in names:
        done(machine, f"fx_{name}", 0, 8)


@pytest.mark.parametrize("table", ["gdt", "idt"])
def test_table_registers(machine: Any, table: str) -> None:
    cpu = machine.cpu
    cpu.ea = MEMORY
    machine.write(MEMORY, 0x7F, 2)
    machine.write(MEMORY + 2, 0xFFFF_FE00_0000_1000)
    done(machine, f"fx_l{table}")
    assert getattr(cpu, f"{table}r_base") == 0xFFFF_FE00_0000_1000
    assert getattr(cpu, f"{table}r_limit") == 0x7F
    cpu.ea = MEMORY + 0x100
    done(machine, f"fx_s{table}")
    assert machine.read(MEMORY + 0x100, 10) == machine.read(MEMORY, 10)
    machine.write(MEMORY + 2, BAD)
    cpu.ea = MEMORY
    refused(machine, f"fx_l{table}")
    cpu.ea = MEMORY - 4
    cpu.flat_hole = MEMORY >> 12
    refused(machine, f"fx_l{table}", by=(PF, 0))
    refused(machine, f"fx_s{table}", by=(PF, 2))


@pytest.mark.parametrize(("name", "segment"), [("sldt", LDTR), ("str", TR)])
def test_selectors(machine: Any, name: str, segment: int) -> None:
    cpu = machine.cpu
    cpu.seg_selector[segment] = 0x40
    for size, expected in ((2, 0xFFFF_FFFF_FFFF_0040), (4, 0x40), (8, 0x40)):
        cpu.gpr[9] = (1 << 64) - 1
        done(machine, f"fx_{name}", 9, size)
        assert cpu.gpr[9] == expected
    cpu.ea = MEMORY
    done(machine, f"fx_{name}_mem")
    assert machine.read(MEMORY) == 0x40


def test_invalidation(machine: Any) -> None:
    cpu = machine.cpu
    cpu.ea = 0x1234_5678
    done(machine, "fx_invlpg")
    assert (cpu.flushes_page, cpu.flushed_page) == (1, 0x1234_5678)
    cpu.ea = BAD
    done(machine, "fx_invlpg")
    assert cpu.flushes_page == 1
    cpu.ea = MEMORY
    machine.write(MEMORY, 0)
    machine.write(MEMORY + 8, 0x5000)
    for kind in range(4):
        cpu.gpr[RAX] = kind
        done(machine, "fx_invpcid", RAX)
    counts = (cpu.flushes_page, cpu.flushed_page, cpu.flushes_nonglobal, cpu.flushes_all)
    assert counts == (2, 0x5000, 2, 1)
    cpu.gpr[RAX] = 4
    refused(machine, "fx_invpcid", RAX)
    cpu.gpr[RAX] = 0
    machine.write(MEMORY + 8, BAD)
    refused(machine, "fx_invpcid", RAX)
    machine.write(MEMORY, 1)
    cpu.gpr[RAX] = 1
    refused(machine, "fx_invpcid", RAX)
    cpu.cr4 |= CR4_PCIDE
    done(machine, "fx_invpcid", RAX)
    machine.write(MEMORY, 1 << 12)
    refused(machine, "fx_invpcid", RAX)


def test_hlt_is_over_when_it_exits(machine: Any) -> None:
    cpu = machine.cpu
    cpu.interrupt_shadow = 1
    assert machine.effect("fx_hlt", length=1) == EXIT
    assert (cpu.exit_reason, cpu.rip, cpu.halted) == (EXIT_HALT, 0x1001, 1)
    assert cpu.interrupt_shadow == 0


def test_segment_bases(machine: Any) -> None:
    cpu = machine.cpu
    cpu.seg_base[GS], cpu.kernel_gs_base = 1, 2
    done(machine, "fx_swapgs")
    assert (cpu.seg_base[GS], cpu.kernel_gs_base) == (2, 1)
    refused(machine, "fx_fsgsbase", RAX, 8, FS, 0, by=(UD, 0))
    cpu.cr4 |= CR4_FSGSBASE
    cpu.cpl = 3
    cpu.gpr[RBX] = 0xFFFF_8000_1234_5678
    done(machine, "fx_fsgsbase", RBX, 8, FS, 1)
    assert cpu.seg_base[FS] == 0xFFFF_8000_1234_5678
    done(machine, "fx_fsgsbase", RAX, 4, FS, 0)
    assert cpu.gpr[RAX] == 0x1234_5678
    done(machine, "fx_fsgsbase", RBX, 4, GS, 1)
    assert cpu.seg_base[GS] == 0x1234_5678
    cpu.gpr[RBX] = BAD
    refused(machine, "fx_fsgsbase", RBX, 8, GS, 1)
    done(machine, "fx_fsgsbase", RBX, 4, GS, 1)
    assert cpu.seg_base[GS] == 0


def test_ports_exit(machine: Any) -> None:
    cpu = machine.cpu
    cpu.gpr[RDX], cpu.gpr[RAX] = 0xABC0_03F8, 0x1122_3344_5566_7788
    assert machine.effect("fx_in", 2, 0x10000) == EXIT
    assert (cpu.exit_reason, *cpu.exit_data[:2]) == (EXIT_PORT_IN, 0x3F8, 2)
    for size, value in ((1, 0x88), (2, 0x7788), (4, 0x5566_7788)):
        assert machine.effect("fx_out", size, 0x64) == EXIT
        assert (cpu.exit_reason, *cpu.exit_data[:3]) == (EXIT_PORT_OUT, 0x64, size, value)
    assert machine.effect("fx_port_string", 4, 1, 1, 7) == EXIT
    assert (cpu.exit_reason, *cpu.exit_data) == (EXIT_PORT_STRING, 0x3F8, 4, 1, 1)
    assert (cpu.op[3], cpu.rip) == (7, 0x1000)


def test_port_permission(machine: Any) -> None:
    cpu = machine.cpu
    cpu.cpl = 3
    cpu.seg_base[TR], cpu.seg_limit[TR] = MEMORY, 0x66
    refused(machine, "fx_in", 1, 0x60)
    cpu.seg_limit[TR] = 0x68 + 0x20
    machine.write(MEMORY + 0x66, 0x68, 2)
    machine.write(MEMORY + 0x68 + 0x60 // 8, 0b1111_1111_1111_1011, 2)
    assert machine.effect("fx_in", 1, 0x62) == EXIT
    refused(machine, "fx_in", 1, 0x61)
    refused(machine, "fx_in", 2, 0x62)
    assert machine.effect("fx_out", 4, 0x78) == EXIT  # its bits are past the ones above: clear
    cpu.gpr[RDX] = 0x6F
    refused(machine, "fx_port_string", 1, 0, 0, 0)
    # The second byte of the pair that is read must be inside the limit, too.
    assert machine.effect("fx_in", 1, 0xF8) == EXIT
    refused(machine, "fx_in", 1, 0x100)
    cpu.flat_hole = MEMORY >> 12
    refused(machine, "fx_in", 1, 0xF8, by=(PF, 0))
    cpu.other_flags = FLAG_IOPL
    assert machine.effect("fx_in", 1, 0x100) == EXIT


def test_cli_and_sti(machine: Any) -> None:
    cpu = machine.cpu
    done(machine, "fx_sti")
    assert (cpu.flag_if, cpu.interrupt_shadow, cpu.interrupt_checks) == (1, SHADOW_STI, 1)
    cpu.interrupt_shadow = 0
    done(machine, "fx_sti")
    assert (cpu.interrupt_shadow, cpu.interrupt_checks) == (0, 1)
    cpu.cpl = 3
    refused(machine, "fx_cli")
    refused(machine, "fx_sti")
    cpu.other_flags = FLAG_IOPL
    done(machine, "fx_cli")
    assert cpu.flag_if == 0


def test_pushf(machine: Any) -> None:
    cpu = machine.cpu
    cpu.status, cpu.other_flags, cpu.flag_if, cpu.flag_df = 0x845, FLAG_RF | 1 << 18, 1, 1
    cpu.gpr[RSP] = MEMORY
    done(machine, "fx_pushf", 8)
    assert cpu.gpr[RSP] == MEMORY - 8
    assert machine.read(MEMORY - 8) == 0x40E47
    done(machine, "fx_pushf", 2)
    assert cpu.gpr[RSP] == MEMORY - 10
    assert machine.read(MEMORY - 10, 2) == 0xE47
    cpu.gpr[RSP] = BAD + 8
    refused(machine, "fx_pushf", 8, by=(SS_FAULT, 0))
    cpu.gpr[RSP] = MEMORY
    cpu.cpl = 3
    cpu.flat_supervisor = 0
    refused(machine, "fx_pushf", 8, by=(PF, 6))


@pytest.mark.parametrize(
    ("cpl", "iopl", "size", "expected"),
    [
        pytest.param(0, 0, 8, 0x247FD7, id="kernel"),
        pytest.param(3, 3, 8, 0x247FD7, id="user with IOPL"),
        pytest.param(3, 0, 8, 0x244DD7, id="user"),
        pytest.param(0, 0, 2, 0x7FD7, id="16 bits"),
    ],
)
def test_popf(machine: Any, cpl: int, iopl: int, size: int, expected: int) -> None:
    cpu = machine.cpu
    cpu.cpl, cpu.other_flags = cpl, iopl << 12
    cpu.gpr[RSP] = MEMORY
    machine.write(MEMORY, (1 << 64) - 1)
    done(machine, "fx_popf", size)
    assert cpu.gpr[RSP] == MEMORY + size
    assert cpu.mode_changes == 1  # TF is set now
    assert cpu.interrupt_checks == bool(expected & FLAG_IF)
    assert cpu.interrupt_shadow == 0
    cpu.other_flags &= ~FLAG_TF
    done(machine, "fx_pushf", 8)
    assert machine.read(MEMORY + size - 8) == expected & ~FLAG_TF


def test_popf_faults(machine: Any) -> None:
    machine.cpu.gpr[RSP] = BAD
    refused(machine, "fx_popf", 8, by=(SS_FAULT, 0))


def test_extended_control_register(machine: Any) -> None:
    cpu = machine.cpu
    cpu.gpr[RAX], cpu.gpr[RCX], cpu.gpr[RDX] = 7, 0, 0
    refused(machine, "fx_xsetbv", by=(UD, 0))
    refused(machine, "fx_xgetbv", by=(UD, 0))
    cpu.cr4 |= CR4_OSXSAVE
    for value in (7, 3, 1):
        cpu.gpr[RAX] = value
        done(machine, "fx_xsetbv")
        assert cpu.xcr0 == value
    assert cpu.mode_changes == 3
    for value in (0, 2, 5, 6, 0xF, 1 << 63 | 1):
        cpu.gpr[RAX], cpu.gpr[RDX] = value & 0xFFFFFFFF, value >> 32
        refused(machine, "fx_xsetbv")
    cpu.cpl = 3
    done(machine, "fx_xgetbv")
    assert (cpu.gpr[RAX], cpu.gpr[RDX]) == (1, 0)
    refused(machine, "fx_xsetbv")
    cpu.gpr[RCX] = 1
    refused(machine, "fx_xgetbv")


def test_time_stamp_counter(machine: Any) -> None:
    cpu = machine.cpu
    cpu.tsc_aux = 0x55
    done(machine, "fx_rdtsc")
    first = cpu.gpr[RDX] << 32 | cpu.gpr[RAX]
    cpu.tsc_offset = 1 << 60
    done(machine, "fx_rdtscp")
    second = cpu.gpr[RDX] << 32 | cpu.gpr[RAX]
    assert 1 << 60 <= (second - first) % (1 << 64) < (1 << 60) + (1 << 40)
    assert cpu.gpr[RCX] == 0x55
    done(machine, "fx_rdpid", 11)
    assert cpu.gpr[11] == 0x55
    cpu.cpl = 3
    done(machine, "fx_rdtsc")
    cpu.cr4 |= CR4_TSD
    refused(machine, "fx_rdtsc")
    refused(machine, "fx_rdtscp")
    refused(machine, "fx_rdpmc")


def test_hypercall(machine: Any) -> None:
    cpu = machine.cpu
    assert machine.effect("fx_vmcall", 1) == EXIT
    assert (cpu.exit_reason, *cpu.exit_data[:2]) == (EXIT_HYPERCALL, 1, 0)


def test_reset(machine: Any) -> None:
    cpu = machine.cpu
    cpu.cpuid_table, cpu.tsc_offset, cpu.gpr[5], cpu.xsave[600] = 0x1234, 99, 7, 1
    reset(cpu)
    assert (cpu.rip, cpu.seg_base[1], cpu.seg_selector[1]) == (0xFFF0, 0xFFFF0000, 0xF000)
    assert (cpu.cr0, cpu.cr4, cpu.efer, cpu.xcr0) == (0x60000010, 0, 0, 1)
    assert cpu.pat == 0x0007040600070406
    assert (cpu.dr[6], cpu.dr[7]) == (0xFFFF0FF0, 0x400)
    assert (cpu.gpr[RDX], cpu.gpr[5]) == (0x00B00F21, 0)
    assert (cpu.exc_vector, cpu.delivering) == (NO_EXCEPTION, NO_EXCEPTION)
    assert (cpu.cpuid_table, cpu.tsc_offset) == (0x1234, 99)
    area = bytes(cpu.xsave)
    assert struct.unpack_from("<H", area, 0) == (0x37F,)
    assert struct.unpack_from("<II", area, 24) == (0x1F80, 0xFFFF)
    assert area[512:XSAVE_BYTES] == bytes(XSAVE_BYTES - 512)


def test_dump(machine: Any) -> None:
    cpu = machine.cpu
    reset(cpu)
    cpu.gpr[8], cpu.status, cpu.flag_if = 0xABC, 0x41, 1
    cpu.exc_vector, cpu.exc_error = GP, 0x18
    text = dump(cpu)
    assert " R8=0000000000000abc" in text
    assert "RFL=00000243 [IF ZF CF] IOPL=0" in text
    assert "CS =f000 00000000ffff0000 0000ffff 009b DPL=0 CS16 [-RA]" in text
    assert "TR =0000 0000000000000000 0000ffff 008b DPL=0 TSS64-busy" in text
    assert "CR0=60000010 [ET NW CD]" in text
    assert text.endswith("PENDING #GP error=18 address=0000000000000000")
    assert max(map(len, text.splitlines())) <= 100


def test_library_has_every_effect() -> None:
    assert library.EFFECTS["fx_hlt"] is system.fx_hlt
    assert {"fx_wrmsr", "fx_cpuid", "fx_in", "fx_iret", "fx_lldt"} <= library.EFFECTS.keys()
    assert {control, portio, system} <= set(library.MODULES)
    assert library not in library.MODULES
