"""Structures, numbers and offsets are those of the kernel's headers."""

from __future__ import annotations

import ctypes
import inspect
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guest.support import require
from ringfence.engine.kvm import abi

HEADER = Path("/usr/include/linux/kvm.h")
CONSTANTS = (
    "API_VERSION", "NR_INTERRUPTS", "MSR_FILTER_MAX_RANGES", "MAX_XCRS", "EXIT_IO_OUT",
    "MEM_LOG_DIRTY_PAGES", "MEM_READONLY", "MSR_EXIT_REASON_INVAL", "MSR_EXIT_REASON_UNKNOWN",
    "MSR_EXIT_REASON_FILTER", "MSR_FILTER_READ", "MSR_FILTER_WRITE", "MSR_FILTER_DEFAULT_DENY",
    "CPUID_FLAG_SIGNIFCANT_INDEX", "VCPU_TSC_CTRL", "VCPU_TSC_OFFSET", "INTERNAL_ERROR_EMULATION",
    "VCPUEVENT_VALID_SHADOW", "GUESTDBG_ENABLE", "GUESTDBG_SINGLESTEP", "GUESTDBG_USE_HW_BP",
    "GUESTDBG_BLOCKIRQ",
)  # fmt: skip
ELSEWHERE = {"X86_SET_MSR_FILTER": "KVM_X86_SET_MSR_FILTER"}


def structures() -> Iterator[tuple[str, type[Any]]]:
    """C names and declarations of all structures that have a name in C."""
    for name, kind in vars(abi).items():
        if inspect.isclass(kind) and issubclass(kind, ctypes.Structure) and name[0] != "_":
            yield "kvm_" + re.sub(r"(?<!^)([A-Z])", r"_\1", name[3:]).lower(), kind


def members(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Names and offsets of all fields, those of inner structures too."""
    for name, inner in kind._fields_:
        if inner is abi._RunDetails:
            yield from members(inner)
            continue
        yield prefix + name, getattr(kind, name).offset
        own = inspect.isclass(inner) and issubclass(inner, ctypes.Structure)
        if own and inner.__name__[0] == "_":
            for deeper, offset in members(inner):
                yield f"{prefix}{name}.{deeper}", getattr(kind, name).offset + offset


def expectations() -> Iterator[tuple[str, int]]:
    """C expressions and what they must be."""
    for c_name, kind in structures():
        yield f"sizeof(struct {c_name})", ctypes.sizeof(kind)
        for field, offset in members(kind):
            if field == "debugreg":
                field = "arch.debugreg"
            if field == "region":
                continue  # the fixed part of a structure that ends with a variable one
            base = abi.KvmRun.details.offset if kind is abi.KvmRun else 0
            inside = field.split(".")[0] not in {name for name, _ in kind._fields_}
            yield f"offsetof(struct {c_name}, {field})", offset + (base if inside else 0)
    for request in abi.Request:
        yield f"KVM_{request.name}", int(request)
    for cap in abi.Cap:
        yield f"KVM_CAP_{cap.name}", int(cap)
    for reason in abi.Exit:
        yield f"KVM_EXIT_{reason.name}", int(reason)
    for name in CONSTANTS:
        yield f"KVM_{name}", getattr(abi, name)


def test_like_the_headers(tmp_path: Path) -> None:
    compiler = require(shutil.which("gcc") or shutil.which("cc"), "a C compiler")
    require(str(HEADER) if HEADER.exists() else None, "linux-libc-dev")
    wanted = dict(expectations())
    lines = "\n".join(f'printf("%lu\\n", (unsigned long)({each}));' for each in wanted)
    source = tmp_path / "abi.c"
    source.write_text(
        "#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f"int main(void) {{ {lines} return 0; }}\n"
    )
    program = tmp_path / "abi"
    built = subprocess.run(
        [compiler, "-o", str(program), str(source)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    got = dict(zip(wanted, map(int, printed), strict=True))
    sizes = {"sizeof(struct kvm_run)"}  # the state that may follow is not declared here
    assert {k: v for k, v in got.items() if k not in sizes} == {
        k: v for k, v in wanted.items() if k not in sizes
    }
