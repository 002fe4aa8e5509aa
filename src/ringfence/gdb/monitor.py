"""What ``monitor`` in GDB offers: things that GDB has no command for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ringfence.errors import UsageError

if TYPE_CHECKING:
    from ringfence.gdb.stub import Stub

READ_MAX = 4096
HELP = """\
monitor registers            all registers of the selected thread's vCPU
monitor translate ADDRESS    where a virtual address is in physical memory
monitor read ADDRESS LENGTH  physical memory
monitor write ADDRESS HEX    the same, to change
monitor physical on|off      GDB's own memory commands take physical addresses
monitor stats                exits by reason
"""


def monitor(stub: Stub, line: str) -> str:
    """Carry out one line; what there is to say."""
    name, *arguments = line.split() or ["help"]
    command = _COMMANDS.get(name)
    if command is None:
        return f"unknown: {name[:40]}\n{HELP}"
    try:
        return command(stub, *arguments)
    except (TypeError, ValueError):
        return HELP
    except (IndexError, OverflowError) as error:
        return f"{error}\n"
    except UsageError as error:
        return f"{error}\n"


def _registers(stub: Stub) -> str:
    return stub.vcpu.crash_dump() + "\n"


def _translate(stub: Stub, address: str) -> str:
    found = stub.vcpu.translate(int(address, 0))
    return "not mapped\n" if found is None else f"{found:#x}\n"


def _read(stub: Stub, address: str, length: str) -> str:
    at, size = int(address, 0), int(length, 0)
    if not 0 < size <= READ_MAX:
        return f"at most {READ_MAX} bytes\n"
    data = stub.machine.read_physical(at, size)
    lines = (f"{at + n:#014x}  {data[n : n + 16].hex(' ')}" for n in range(0, size, 16))
    return "\n".join(lines) + "\n"


def _write(stub: Stub, address: str, data: str) -> str:
    stub.machine.write_physical(int(address, 0), bytes.fromhex(data))
    return ""


def _physical(stub: Stub, wanted: str) -> str:
    stub.physical = {"on": True, "off": False}.get(wanted, stub.physical)
    return f"memory commands take {'physical' if stub.physical else 'virtual'} addresses\n"


def _stats(stub: Stub) -> str:
    exits = stub.machine.stats()["exits"]
    return "".join(f"{reason:20} {each['count']}\n" for reason, each in exits.items())


def _help(stub: Stub) -> str:
    return HELP


_COMMANDS: dict[str, Callable[..., str]] = {
    "help": _help,
    "physical": _physical,
    "read": _read,
    "registers": _registers,
    "stats": _stats,
    "translate": _translate,
    "write": _write,
}
