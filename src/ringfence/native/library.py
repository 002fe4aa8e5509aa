"""Compiles a unit of the dialect to machine code, loads it, and remembers the object on disk.

The object code depends on the Python source, the compiler and LLVM only, so it is kept in the
cache folder under their hash; a second start neither parses the sources nor runs LLVM's passes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import inspect
import os
import stat
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llvmlite import binding as llvm

from ringfence.native import dialect, layout


def source_key(modules: Sequence[ModuleType]) -> str:
    """Hash of the sources a unit is made of, of the compiler, and of LLVM's version."""
    digest = hashlib.blake2b(digest_size=16)
    for module in [dialect, layout, sys.modules[__name__], *modules]:
        digest.update(Path(inspect.getfile(module)).read_bytes())
    digest.update(repr((llvm.llvm_version_info, sys.version_info[:2])).encode())
    return digest.hexdigest()


def object_path(folder: Path, modules: Sequence[ModuleType]) -> Path:
    """Where a unit's optimized object is kept in a cache folder."""
    return folder / f"native-{source_key(modules)}.o"


def compile_object(roots: Sequence[Any], assembly: str = "", *, optimize: bool = True) -> bytes:
    """Machine code (an ELF object) of native functions and all that they call.

    ``assembly`` is added to the object as it is; it may refer to the functions by name. Optimizing
    takes more than ten times as long, and the code it makes runs about twice as fast.
    """
    unit = dialect.Unit(roots)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    lines = [f'module asm "{line}"' for line in assembly.splitlines()]
    module = llvm.parse_assembly("\n".join([*lines, unit.ir()]))
    module.verify()
    level = 2 if optimize else 0
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu="x86-64", features=dialect.NO_VECTOR, opt=level, reloc="pic", codemodel="small"
    )
    options = llvm.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = False
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


class Library:
    """Native functions in memory, callable by address or through ctypes.

    Parameters
    ----------
    code : bytes
        An object that `compile_object` made.
    """

    def __init__(self, code: bytes) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu="x86-64", features=dialect.NO_VECTOR, reloc="pic", codemodel="small", jit=True
        )
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Host address of a native function."""
        found = int(self._engine.get_function_address(name))
        if not found:
            raise KeyError(f"no native function {name}")
        return found

    def function(self, name: str, arguments: int) -> Any:
        """The function as a ctypes callable of 64-bit integers."""
        kind = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * arguments)
        return kind(self.address(name))


def read_object(path: Path) -> bytes | None:
    """An object that we wrote ourselves and nothing has changed since, or None."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            regular = stat.S_ISREG(status.st_mode)
            if not regular or status.st_uid != os.getuid() or status.st_mode & 0o022:
                return None
            data = file.read()
    except OSError:
        return None
    digest, code = data[:32], data[32:]
    return code if hashlib.blake2b(code, digest_size=32).digest() == digest else None


def write_object(path: Path, code: bytes) -> None:
    """Write an object and its digest at once; a full disk only costs the next start time."""
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            file.write(hashlib.blake2b(code, digest_size=32).digest() + code)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
