"""The few assembly routines between guest code and everything else.

Registers while guest code runs: RAX RCX RDX RBX RBP RSI RDI R8 R12-R15 hold the guest registers of
the same name, R11 holds the guest's RSP, R9 and R10 are scratch (the guest's R9-R11, the least used
ones, live in the block), RSP is the host's, GS points into the block. Status flags are in the
host's flags or, at every transfer between code pages, *parked* in the block (``Vcpu.parked``).

Every routine is reached by ``jmp`` or ``call`` through the block's ``thunks`` array, so emitted
code holds no absolute address. None but ``enter`` and ``leave`` touches vector or x87 state.
"""

from __future__ import annotations

from ringfence.cpu.components import MXCSR, XCOMP_BV
from ringfence.cpu.state import EXIT, FAULT, OK, STATUS_FLAGS
from ringfence.engine.translate.block import EXIT_HOST_FAULT, GS_BIAS, RUN_DIRECT, gs
from ringfence.engine.translate.tables import ONWARD
from ringfence.memory.mmu import IGNORED, WANTED

HOST_OF_GUEST = {
    "rax": 0, "rcx": 1, "rdx": 2, "rbx": 3, "r11": 4, "rbp": 5, "rsi": 6, "rdi": 7, "r8": 8,
    "r12": 12, "r13": 13, "r14": 14, "r15": 15,
}  # fmt: skip
"""Host register -> guest register number, for those that live in host registers."""
CALLER_SAVED = ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r11")

THUNKS = (
    "leave",
    "indirect_miss",
    "lookup",
    "link_local",
    "link_onward",
    "link_page",
    "miss",
    "slow",
    "commit",
    "effect",
    "attention",
    "host_fault",
    "resume",
    "emulate",
    "effect_vector",
    "straddle",
    "find",
    "deliver",
    "careful",
    "stack_miss",
    "link_careful",
    "save_vector",
    "segment",
)
"""Names in the order of the block's ``thunks`` array."""

THUNK = {name: gs("thunks", number) for number, name in enumerate(THUNKS)}
"""Displacement from GS of each thunk's address."""

assert OK == 0


def _field(name: str, index: int = 0, size: str = "qword") -> str:
    return f"{size} ptr gs:[{gs(name, index)}]"


def _save(registers: tuple[str, ...] | dict[str, int]) -> list[str]:
    return [f"mov {_field('gpr', HOST_OF_GUEST[r])}, {r}" for r in registers]


def _load(registers: tuple[str, ...] | dict[str, int]) -> list[str]:
    return [f"mov {r}, {_field('gpr', HOST_OF_GUEST[r])}" for r in registers]


def _call(symbol: str, *setup: str) -> list[str]:
    return [*setup, f"mov rdi, {_field('self_address')}", f"call {symbol}"]


# Between the block's ``parked`` word and ``Cpu.status``; RAX and RCX are free.
_TO_STATUS = [
    f"movzx eax, byte ptr gs:[{gs('parked') + 1}]",
    f"and eax, {STATUS_FLAGS & 0xFF}",
    f"movzx ecx, byte ptr gs:[{gs('parked')}]",
    "shl ecx, 11",
    "or eax, ecx",
    f"mov {_field('status')}, rax",
]
_FROM_STATUS = [
    f"mov rax, {_field('status')}",
    f"mov byte ptr gs:[{gs('parked') + 1}], al",
    "shr eax, 11",
    "and eax, 1",
    f"mov byte ptr gs:[{gs('parked')}], al",
]
# Vector state between the registers and the block; RAX, RCX and RDX are free.
_SAVE_VECTOR = [
    f"mov eax, {_field('xstate_mask', size='dword')}",
    "xor edx, edx",
    f"cmp {_field('xcomp_bv')}, 0",
    "je 8f",
    f"xsavec64 gs:[{gs('xsave')}]",
    f"stmxcsr dword ptr gs:[{gs('xsave') + MXCSR}]",
    f"mov qword ptr gs:[{gs('xsave') + XCOMP_BV}], 0",
    "jmp 9f",
    "8:",
    f"xsave64 gs:[{gs('xsave')}]",
    "9:",
]
_LOAD_VECTOR = [
    f"mov eax, {_field('xstate_mask', size='dword')}",
    "xor edx, edx",
    f"mov rcx, {_field('xcomp_bv')}",
    f"mov qword ptr gs:[{gs('xsave') + XCOMP_BV}], rcx",
    f"xrstor64 gs:[{gs('xsave')}]",
    f"ldmxcsr dword ptr gs:[{gs('xsave') + MXCSR}]",
    f"mov qword ptr gs:[{gs('xsave') + XCOMP_BV}], 0",
]
_PARK = ["mov r9, rax", "lahf", "seto al", f"mov word ptr gs:[{gs('parked')}], ax", "mov rax, r9"]


def assembly() -> str:
    """Source of all routines, in Intel syntax."""
    save_all = [*_save(HOST_OF_GUEST), *_TO_STATUS]
    load_all = _load(HOST_OF_GUEST)
    go = [*load_all, f"jmp {_field('jump_target')}"]

    def miss(function: str) -> list[str]:
        """R9: linear address, R10: size and kind. Returns to the retry of the access."""
        return [
            f"mov {_field('slow_address')}, r9",
            *_save(CALLER_SAVED),
            *_call(function, "mov rsi, r9", "mov rdx, r10", "sub rsp, 8"),
            "add rsp, 8",
            "test eax, eax",
            "jnz 1f",
            *_load(CALLER_SAVED),
            f"mov r9, {_field('slow_address')}",
            "ret",
            "1:",
            "add rsp, 8",
            *_save(tuple(r for r in HOST_OF_GUEST if r not in CALLER_SAVED)),
            "mov edx, eax",
            *_TO_STATUS,
            f"cmp edx, {FAULT}",
            "je rf_deliver",
            *_call("lookup_slow"),
            "jmp rf_decide",
        ]

    routines: dict[str, list[str]] = {
        # int enter(Vcpu *vcpu): run guest code at jump_target until something needs the VMM.
        "enter": [
            *(f"push {r}" for r in ("rbx", "rbp", "r12", "r13", "r14", "r15")),
            "sub rsp, 8",
            f"mov {_field('host_rsp')}, rsp",
            *_LOAD_VECTOR,
            *_FROM_STATUS,
            *go,
        ],
        # Guest registers are saved; return to the VMM.
        "leave": [
            f"mov rsp, {_field('host_rsp')}",
            *_SAVE_VECTOR,
            f"xrstor64 gs:[{gs('host_init')}]",
            "cld",
            "add rsp, 8",
            *(f"pop {r}" for r in ("r15", "r14", "r13", "r12", "rbp", "rbx")),
            f"mov rax, {_field('exit_reason')}",
            "ret",
        ],
        # R9: guest address of an indirect jump's target that the jump table does not know.
        "indirect_miss": [f"mov {_field('rip')}, r9", "jmp rf_lookup"],
        "lookup": [*save_all, *_call("lookup"), "jmp rf_decide"],
        # RIP set: go on in code that shares no look-ups.
        "careful": [*save_all, *_call("lookup_careful"), "jmp rf_decide"],
        # R10: host address of the displacement to patch. Flags are in the host's flags.
        "link_local": [*_PARK, *save_all, "mov edx, 1", "jmp rf_link"],
        "link_onward": [*_PARK, *save_all, f"mov edx, {ONWARD}", "jmp rf_link"],
        "link_page": [*save_all, "xor edx, edx", "jmp rf_link"],
        # The same for the jump to a careful trace; flags are parked.
        "link_careful": [*save_all, *_call("link_careful", "mov rsi, r10"), "jmp rf_decide"],
        "link": [*_call("link", "mov rsi, r10"), "jmp rf_decide"],
        # RAX: OK to go on at jump_target, EXIT to leave.
        "decide": ["test eax, eax", "jnz rf_leave", *go],
        "miss": [*miss("tlb_miss")],
        "stack_miss": [*miss("stack_miss")],
        # R9: offset, R10: size, segment << 16, 1 << 19 for a write. Comes back with R9 = address.
        "segment": [
            f"mov {_field('scratch', 6)}, rax",
            "movzx eax, r10w",
            "shr r10d, 16",
            "add rax, r9",
            f"cmp rax, qword ptr gs:[r10*8 + {gs('seg_top')}]",
            "ja 2f",
            "and r10d, 7",
            f"add r9d, dword ptr gs:[r10*8 + {gs('seg_base')}]",
            f"mov rax, {_field('scratch', 6)}",
            "ret",
            "2:",
            "sub rax, r9",
            "shl r10d, 16",
            "or r10d, eax",
            f"mov rax, {_field('scratch', 6)}",
            *miss("segment_access"),
        ],
        "deliver": [
            *_call("deliver_and_lookup"),
            "mov edx, eax",
            *_FROM_STATUS,
            "mov eax, edx",
            "jmp rf_decide",
        ],
        # R9: linear address, R10: size and kind. Comes back with R9 = host address of the operand.
        "slow": [
            f"pop {_field('resume_pc')}",
            *save_all,
            *_call("slow_access", "mov rsi, r9", "mov rdx, r10"),
            "test eax, eax",
            "jz rf_resume",
            f"cmp eax, {EXIT}",
            "je rf_leave",
            "jmp rf_deliver",
        ],
        "commit": [
            f"pop {_field('resume_pc')}",
            *save_all,
            *_call("slow_commit"),
            "test eax, eax",
            "jnz rf_leave",
            "jmp rf_resume",
        ],
        "resume": [*load_all, f"mov r9, {_field('slow_pointer')}", f"jmp {_field('resume_pc')}"],
        # R10: number of the effect, plus the instruction's length << 16; RIP is the instruction's.
        "effect": [
            *save_all,
            "mov eax, r10d",
            "shr eax, 16",
            f"add rax, {_field('rip')}",
            f"mov {_field('next_rip')}, rax",
            "movzx eax, r10w",
            f"mov byte ptr gs:[{gs('interrupt_shadow')}], 0",  # one cast before ends here
            f"inc {_field('effect_calls')}",
            f"mov {_field('effect_number', size='dword')}, eax",
            f"mov {_field('effect_devices', size='byte')}, {WANTED}",
            f"mov rdi, {_field('self_address')}",
            f"call qword ptr [rdi + rax*8 + {gs('effects') + GS_BIAS}]",
            f"mov {_field('effect_devices', size='byte')}, {IGNORED}",
            f"cmp eax, {EXIT}",
            "je rf_leave",
            f"cmp eax, {FAULT}",
            "je rf_deliver",
            "jmp rf_follow",
        ],
        # The same for an effect on the vector state, which waits in the block.
        "effect_vector": [
            *save_all,
            "mov eax, r10d",
            "shr eax, 16",
            f"add rax, {_field('rip')}",
            f"mov {_field('next_rip')}, rax",
            "movzx eax, r10w",
            f"mov rdi, {_field('self_address')}",
            f"call qword ptr [rdi + rax*8 + {gs('effects') + GS_BIAS}]",
            f"cmp eax, {FAULT}",
            "je rf_deliver",
            *_LOAD_VECTOR,
            "jmp rf_follow",
        ],
        # Called before such an effect; clobbers R9, R10 and flags.
        "save_vector": [
            "mov r9, rax",
            "mov r10, rdx",
            *_SAVE_VECTOR,
            "mov rax, r9",
            "mov rdx, r10",
            "ret",
        ],
        # R10: the number that the page after RIP's must have.
        "straddle": [*save_all, *_call("straddle", "mov rsi, r10"), "jmp rf_decide"],
        # Go to RIP by the jump table, without a look-up where it is known.
        "follow": [
            *_FROM_STATUS,
            f"cmp {_field('stale_code')}, 0",  # and debug_pending behind it
            "jne rf_find",
            f"cmp byte ptr gs:[{gs('unknown_targets')}], 0",
            "jne rf_find",
            f"mov r9, {_field('rip')}",
            "movzx eax, r9w",
            f"mov rcx, {_field('jump_current')}",
            "mov rax, [rcx + rax*8]",
            f"mov {_field('jump_target')}, rax",
            *go,
        ],
        "find": [
            *_call("onward"),
            f"cmp eax, {RUN_DIRECT}",
            "jne rf_decide",
            *_SAVE_VECTOR,
            *_call("run_direct"),
            "mov r12d, eax",
            *_LOAD_VECTOR,
            *_FROM_STATUS,
            f"cmp r12d, {EXIT}",
            "je rf_leave",
            "jmp rf_find",
        ],
        # Called by a trace head, RIP set; returns into the trace, if it still holds.
        "attention": [
            *save_all,
            *_call("attention", "sub rsp, 8"),
            "add rsp, 8",
            "test eax, eax",
            "jnz 1f",
            *load_all,
            "ret",
            "1:",
            f"cmp eax, {EXIT}",
            "je rf_leave",
            "add rsp, 8",
            "jmp rf_find",
        ],
        "emulate": [*save_all, "jmp rf_leave"],
        # The host raised a signal inside guest code; the handler sent the thread here.
        "host_fault": ["pushfq", f"pop {_field('scratch', 5)}", *save_all, "jmp rf_leave"],
        # void handler(int signal, siginfo_t *, ucontext_t *): see engine.translate.signals.
        "signal_handler": [
            f"mov rcx, {_field('self_address')}",
            f"mov rax, [rdx + {UCONTEXT_RIP}]",
            f"cmp rax, [rcx + {gs('code_start') + GS_BIAS}]",
            "jb 1f",
            f"cmp rax, [rcx + {gs('code_end') + GS_BIAS}]",
            "jae 1f",
            f"mov [rcx + {gs('fault_pc') + GS_BIAS}], rax",
            f"mov rax, [rdx + {UCONTEXT_TRAPNO}]",
            f"mov [rcx + {gs('fault_trap') + GS_BIAS}], rax",
            f"mov qword ptr [rcx + {gs('exit_reason') + GS_BIAS}], {EXIT_HOST_FAULT}",
            "lea rax, [rip + rf_host_fault]",
            f"mov [rdx + {UCONTEXT_RIP}], rax",
            "ret",
            "1:",
            "ud2",
        ],
        # set_gs(base): the thread's GS base, by system call as FSGSBASE may be off.
        "set_gs": [
            "mov rsi, rdi",
            "mov edi, 0x1001",
            "mov eax, 158",
            "syscall",
            "ret",
        ],
        # rdtsc for Python.
        "read_tsc": ["rdtsc", "shl rdx, 32", "or rax, rdx", "ret"],
    }
    lines = [".intel_syntax noprefix", ".text"]
    for name, body in routines.items():
        lines += [".p2align 4", f".globl rf_{name}", f"rf_{name}:", *body]
    lines.append(".att_syntax")
    return "\n".join(lines)


# Offsets in ucontext_t on x86-64 Linux: uc_mcontext.gregs starts at 40.
UCONTEXT_RIP = 40 + 16 * 8
UCONTEXT_TRAPNO = 40 + 20 * 8
