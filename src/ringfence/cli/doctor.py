"""``ringfence doctor``: what this host offers, and what is missing.

Shape: one small function per question, each returning `Check` rows; the same rows make the table
and the JSON. A row that fails and is *needed* means that guests can't run here (status 6);
anything else only narrows what is possible or how fast it is.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ringfence.errors import HostError
from ringfence.settings import default_cache_dir, host_memory

NEEDED_FEATURES = ("cx16", "fxsr", "lahf_lm", "nx", "sse2", "syscall", "tsc", "xsave")
"""Flags of /proc/cpuinfo without which the translation engine can't run a 64-bit Linux."""
OFFERED_FEATURES = ("avx", "avx2", "bmi1", "bmi2", "fma", "aes", "sha_ni", "constant_tsc", "pcid")
"""Flags that a guest profits from, or that make time exact."""
COMFORTABLE_MEMORY = 1 << 30
COMFORTABLE_FILES = 256


@dataclass(frozen=True, slots=True)
class Check:
    """One answer.

    Attributes
    ----------
    name : str
        The question.
    ok : bool
        Whether the answer is good.
    needed : bool
        Whether guests can't run without it.
    detail : str
        What was found, and where it is not good, what to do.
    """

    name: str
    ok: bool
    needed: bool
    detail: str


def show(*, as_json: bool) -> int:
    """Print all answers; the exit status."""
    checks = examine()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = "ok  " if check.ok else ("FAIL" if check.needed else "note")
            print(f"{mark}  {check.name:<20} {check.detail}")
    good = all(check.ok or not check.needed for check in checks)
    return 0 if good else HostError.exit_status


def examine(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[Check]:
    """Ask everything; the parameter lets a test describe another host."""
    cpu = read_cpuinfo(cpuinfo)
    flags = set(cpu.get("flags", "").split())
    return [
        _host(),
        *_cpu(cpu, flags),
        *_engines(),
        _direct(),
        _memory(),
        _tried("memfd", True, _memfd),
        _tried("W^X dual mapping", True, _dual_mapping),
        _limits(),
        _apt(),
        _mke2fs(),
        _user_network(),
        _tap(),
        _userfault(),
        _tried("cache folder", False, _cache),
    ]


def read_cpuinfo(path: Path) -> dict[str, str]:
    """Fields of the first processor that /proc/cpuinfo describes; empty if unreadable."""
    fields: dict[str, str] = {}
    try:
        text = path.read_text()
    except OSError:
        return fields
    for line in text.split("\n\n")[0].splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields[name.strip()] = value.strip()
    return fields


def _host() -> Check:
    ok = sys.platform == "linux" and platform.machine() == "x86_64"
    found = f"{platform.system()} {platform.release()} on {platform.machine()}"
    return Check("host", ok, True, found if ok else f"{found}; x86-64 Linux is needed")


def _cpu(cpu: dict[str, str], flags: set[str]) -> list[Check]:
    missing = [flag for flag in NEEDED_FEATURES if flag not in flags]
    offered = [flag for flag in OFFERED_FEATURES if flag in flags]
    absent = [flag for flag in OFFERED_FEATURES if flag not in flags]
    model = f"{cpu.get('model name', 'unknown')}, {os.cpu_count()} usable"
    needed = f"lacks {' '.join(missing)}" if missing else "all there"
    return [
        Check("CPU", bool(cpu), False, model),
        Check("features needed", not missing, True, needed),
        Check(
            "features offered",
            not absent,
            False,
            " ".join(offered) + (f"; lacks {' '.join(absent)}" if absent else ""),
        ),
    ]


def _engines() -> list[Check]:
    """What is behind /dev/kvm, and which engine ``--engine auto`` takes here."""
    from ringfence import engine as engines
    from ringfence.engine.kvm.verdict import Kind, verdict

    found = verdict()
    auto = engines.resolve(engines.AUTO)
    most = engines.capabilities(auto).vcpus
    return [
        Check("KVM", found.kind is Kind.HARDWARE, False, found.detail),
        Check("engine", True, True, f"auto takes '{auto}', with up to {most} vCPUs"),
    ]


def _direct() -> Check:
    """Whether user code that computes may have the CPU itself, under translation."""
    from ringfence.engine.direct.host import obstacle

    reason = obstacle()
    return Check(
        "direct execution",
        not reason,
        False,
        f"{reason}; all code is translated" if reason else "works: long computing user code",
    )


def _memory() -> Check:
    total = host_memory()
    available = total
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    detail = f"{available >> 20} MiB available of {total >> 20} MiB"
    ok = available >= COMFORTABLE_MEMORY
    return Check("memory", ok, False, detail if ok else f"{detail}; use a small --memory")


def _limits() -> Check:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    ok = (files == resource.RLIM_INFINITY or files >= COMFORTABLE_FILES) and (
        space == resource.RLIM_INFINITY
    )
    detail = f"open files {_limit(files)}, address space {_limit(space)}"
    return Check("limits", ok, False, detail if ok else f"{detail}; raise them with ulimit")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _apt() -> Check:
    found = shutil.which("apt-get")
    detail = found or "not found: 'ringfence pull' can't fetch Debian's kernel, 'run builtin' works"
    return Check("apt", found is not None, False, detail)


def _mke2fs() -> Check:
    from ringfence.installer.debian import find_mke2fs

    name = "file systems"
    try:
        return Check(name, True, False, find_mke2fs())
    except HostError as error:
        return Check(name, False, False, f"{error} for 'pull debian --disk'")


def _user_network() -> Check:
    from ringfence.network import slirp

    name = "network (user)"
    try:
        return Check(name, True, False, f"libslirp {slirp.version()}")
    except HostError as error:
        return Check(name, False, False, str(error))


def _tap() -> Check:
    from ringfence.network.tap import DEVICE

    ok = os.access(DEVICE, os.R_OK | os.W_OK)
    advice = f"no access to {DEVICE}: --net tap is not possible, --net user doesn't need it"
    return Check("network (tap)", ok, False, f"{DEVICE} accessible" if ok else advice)


def _userfault() -> Check:
    """Whether RAM can follow a machine that comes here."""
    from ringfence.memory.missing import Userfault

    try:
        found = Userfault()
    except HostError as error:
        return Check("userfaultfd", False, False, str(error))
    found.close()
    how = "for user mode only: not with --engine kvm" if found.user_only else "works"
    return Check("userfaultfd", True, False, f"{how} (receive, for migrate --postcopy)")


def _tried(name: str, needed: bool, attempt: Callable[[], str]) -> Check:
    """Do it, and say how it went."""
    try:
        return Check(name, True, needed, attempt())
    except OSError as error:
        return Check(name, False, needed, f"not possible: {error.strerror or error}")


def _memfd() -> str:
    fd = os.memfd_create("ringfence-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 1 << 20)
    finally:
        os.close(fd)
    return "works"


def _dual_mapping() -> str:
    """Write code through one mapping and call it through the other, as the code cache does."""
    fd = os.memfd_create("ringfence-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as writable:
            writable[:6] = bytes.fromhex("b82a000000c3")  # mov eax, 42; ret
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        prot = mmap.PROT_READ | mmap.PROT_EXEC
        code = libc.mmap(None, mmap.PAGESIZE, prot, mmap.MAP_SHARED, fd, 0)
        if code in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            answer = ctypes.CFUNCTYPE(ctypes.c_int)(code)()
        finally:
            libc.munmap(code, mmap.PAGESIZE)
    finally:
        os.close(fd)
    if answer != 42:
        raise OSError(0, f"code returned {answer}, expected 42")
    return "works"


def _cache() -> str:
    folder = default_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    return f"{folder} is writable"
