"""GDB's remote serial protocol, answered for one machine: packets in, replies out.

A thread of GDB's is a vCPU; thread numbers are the vCPUs' plus 1. While the guest runs, GDB waits
for a stop reply and sends nothing but interrupts. Nothing that the other side may send can harm the
machine: what is malformed or impossible gets an error reply, what is unknown an empty one, as the
protocol wants it.

Source: GDB manual, appendix E (GDB Remote Serial Protocol).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ringfence.engine import StopReason
from ringfence.engine.debug import Access, DebugStop, StopKind, Watchpoint
from ringfence.errors import RingfenceError, UsageError
from ringfence.gdb.monitor import monitor
from ringfence.gdb.packets import PACKET_MAX, escape, unescape
from ringfence.gdb.registers import REGISTERS, RegisterFile, target_description
from ringfence.life import State
from ringfence.memory.ram import PAGE

if TYPE_CHECKING:
    from ringfence.engine import VirtualCpu
    from ringfence.machine import Machine

OK, NOT_SUPPORTED = b"OK", b""
EPERM, EFAULT, EINVAL = b"E01", b"E0e", b"E16"
SIGINT, SIGTRAP = 2, 5
READ_MAX = PACKET_MAX // 2 - 16
ACCESS = {2: Access.WRITE, 3: Access.READ, 4: Access.READ | Access.WRITE}
"""Watchpoints by the number in Z packets."""
WATCH = {Access.WRITE: b"watch", Access.READ: b"rwatch", Access.READ | Access.WRITE: b"awatch"}
EXIT_STATUS = {StopReason.CRASH: 4, StopReason.RESET: 7}


class Refused(Exception):
    """A command can't be carried out; the argument is the reply."""


class Stub:
    """One connection's side of the protocol.

    Parameters
    ----------
    machine : Machine
        What is debugged.

    Attributes
    ----------
    running : bool
        Whether GDB waits for the guest to stop.
    over : bool
        Whether the connection has no purpose any more.
    physical : bool
        Whether memory commands take guest-physical addresses.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.running = False
        self.over = False
        self.acknowledge = True
        self.physical = False
        self._cpu = 0
        self._breakpoints: dict[int, set[int]] = {0: set(), 1: set()}
        """Addresses by kind: software and hardware, which make no difference here."""
        self._watchpoints: set[Watchpoint] = set()
        self._description = target_description()
        self._commands: dict[bytes, Callable[[bytes], bytes | None]] = {
            b"?": lambda rest: self.stop_reply(),
            b"g": self._read_registers,
            b"G": self._write_registers,
            b"p": self._read_register,
            b"P": self._write_register,
            b"m": self._read_memory,
            b"M": self._write_memory,
            b"X": self._write_binary,
            b"H": self._select,
            b"T": self._is_alive,
            b"c": lambda rest: self._go_on(rest, step=False),
            b"s": lambda rest: self._go_on(rest, step=True),
            b"z": lambda rest: self._point(rest, wanted=False),
            b"Z": lambda rest: self._point(rest, wanted=True),
            b"D": self._detach,
            b"k": self._kill,
            b"v": self._verbose,
            b"q": self._query,
            b"Q": self._set,
        }

    @property
    def vcpu(self) -> VirtualCpu:
        """The vCPU of the selected thread; UsageError while the guest runs."""
        return self.machine.vcpus[self._cpu]

    def attach(self) -> None:
        """GDB is there, and expects that nothing moves."""
        if self.machine.state is State.RUNNING:
            self.machine.pause()

    def release(self) -> None:
        """GDB is gone: take back what it asked for, and let the guest go on."""
        self.over = True
        machine = self.machine
        if machine.state is State.RUNNING and self._has_points():
            machine.pause()
        if machine.state is State.ENDED:
            return
        if machine.state is not State.RUNNING:
            self._remove_points()
            machine.go()

    def handle(self, packet: bytes) -> bytes | None:
        """The reply to a packet; None where it comes later, with `stop_reply`, or never."""
        command = self._commands.get(packet[:1])
        if command is None:
            return NOT_SUPPORTED
        try:
            return command(packet[1:])
        except Refused as refusal:
            return bytes(refusal.args[0])
        except IndexError:
            return EFAULT
        except (ValueError, KeyError, OverflowError):
            return EINVAL
        except RingfenceError:
            return EPERM

    def interrupt(self) -> None:
        """GDB's user wants the guest to stop; the stop reply follows."""
        if self.running:
            try:
                self.machine.pause()
            except UsageError:
                return  # it has ended, and that is the reply

    def stop_reply(self) -> bytes:
        """Why the guest stands still."""
        self.running = False
        if self.machine.state is State.ENDED:
            self.over = True
            outcome = self.machine.outcome
            return b"W%02x" % (EXIT_STATUS.get(outcome, 0) if outcome else 0)
        if not self.machine.debug.stops:
            return b"T%02xthread:%x;" % (SIGINT, self._cpu + 1)
        stop = self.machine.debug.stops[0]
        self._cpu = stop.cpu
        return b"T%02xthread:%x;%b" % (SIGTRAP, stop.cpu + 1, self._why(stop))

    def _why(self, stop: DebugStop) -> bytes:
        if stop.kind is StopKind.BREAKPOINT:
            return b"hwbreak:;" if stop.rip in self._breakpoints[1] else b"swbreak:;"
        if stop.watchpoint is not None:
            return b"%b:%x;" % (WATCH[stop.watchpoint.access], stop.watchpoint.address)
        return b""

    # --- registers ---------------------------------------------------------------------------

    def _read_registers(self, rest: bytes) -> bytes:
        file = RegisterFile(self.vcpu)
        values = (file.get(each).to_bytes(each.size, "little") for each in REGISTERS)
        return b"".join(values).hex().encode()

    def _write_registers(self, rest: bytes) -> bytes:
        data = _hex(rest)
        if len(data) != sum(each.size for each in REGISTERS):
            raise ValueError
        file, at = RegisterFile(self.vcpu), 0
        for each in REGISTERS:
            value = int.from_bytes(data[at : at + each.size], "little")
            at += each.size
            if value != file.get(each):
                file.set(each, value)
        return OK

    def _read_register(self, rest: bytes) -> bytes:
        register = REGISTERS[_number(rest)]
        value = RegisterFile(self.vcpu).get(register)
        return value.to_bytes(register.size, "little").hex().encode()

    def _write_register(self, rest: bytes) -> bytes:
        number, _, value = rest.partition(b"=")
        register = REGISTERS[_number(number)]
        data = _hex(value)
        if len(data) != register.size:
            raise ValueError
        RegisterFile(self.vcpu).set(register, int.from_bytes(data, "little"))
        return OK

    # --- memory ------------------------------------------------------------------------------

    def _read_memory(self, rest: bytes) -> bytes:
        """As much as is there, from the first byte on."""
        at, length = _pair(rest)
        length = min(length, READ_MAX)
        found = bytearray()
        while len(found) < length:
            size = min(length - len(found), PAGE - at % PAGE)
            try:
                found += self._read(at, size)
            except IndexError:
                break
            at += size
        if length and not found:
            return EFAULT
        return found.hex().encode()

    def _read(self, address: int, length: int) -> bytes:
        """Bytes within a page; IndexError where they are not RAM."""
        if not self.physical:
            physical = self.vcpu.translate(address)
            if physical is None:
                raise IndexError(address)
            address = physical
        return self.machine.read_physical(address, length)

    def _write(self, address: int, data: bytes) -> bytes:
        if self.physical:
            self.machine.write_physical(address, data)
        else:
            self.machine.write_virtual(address, data, self._cpu)
        return OK

    def _write_memory(self, rest: bytes) -> bytes:
        where, _, data = rest.partition(b":")
        address, length = _pair(where)
        decoded = _hex(data)
        if len(decoded) != length:
            raise ValueError
        return self._write(address, decoded)

    def _write_binary(self, rest: bytes) -> bytes:
        where, _, data = rest.partition(b":")
        address, length = _pair(where)
        decoded = unescape(data)
        if len(decoded) != length:
            raise ValueError
        return self._write(address, decoded)

    # --- threads -----------------------------------------------------------------------------

    def _thread(self, text: bytes) -> int:
        """The vCPU of a thread number; 0 and -1 stand for any, which is the present one."""
        number = -1 if text == b"-1" else _number(text)
        if number in (0, -1):
            return self._cpu
        if number > len(self.machine.vcpus):
            raise Refused(EINVAL)
        return number - 1

    def _select(self, rest: bytes) -> bytes:
        cpu = self._thread(rest[1:])
        if rest[:1] == b"g":
            self._cpu = cpu
        return OK

    def _is_alive(self, rest: bytes) -> bytes:
        self._thread(rest)
        return OK

    # --- running -----------------------------------------------------------------------------

    def _go_on(self, rest: bytes, *, step: bool) -> None:
        """The old commands: all vCPUs run, or the present one steps; from an address perhaps."""
        if rest:
            self.vcpu.set_registers({"rip": _number(rest)})
        everyone = range(len(self.machine.vcpus))
        self._run({self._cpu} if step else set(), set(everyone) - {self._cpu} if step else set())

    def _continue(self, rest: bytes) -> None:
        """vCont: an action for each thread, the first that fits; threads without one stand."""
        count = len(self.machine.vcpus)
        actions: dict[int, bytes] = {}
        for part in rest.split(b";")[1:]:
            action, _, thread = part.partition(b":")
            if action[:1] not in (b"c", b"C", b"s", b"S"):
                raise ValueError
            everyone = thread in (b"", b"-1")
            for cpu in range(count) if everyone else (self._thread(thread),):
                actions.setdefault(cpu, action[:1].lower())
        if not actions:
            raise ValueError
        step = {cpu for cpu, action in actions.items() if action == b"s"}
        self._run(step, set(range(count)) - set(actions))

    def _run(self, step: set[int], hold: set[int]) -> None:
        self.running = True
        try:
            self.machine.debug.go(step=step, hold=hold)
        except BaseException:
            self.running = False
            raise

    def _detach(self, rest: bytes) -> bytes:
        self.release()
        return OK

    def _kill(self, rest: bytes) -> None:
        self.over = True
        self.machine.stop()

    # --- breakpoints and watchpoints ---------------------------------------------------------

    def _point(self, rest: bytes, *, wanted: bool) -> bytes:
        kind, where, length, *_ = rest.partition(b";")[0].split(b",")
        number, address, size = _number(kind), _number(where), _number(length)
        debug = self.machine.debug
        if number in self._breakpoints:
            if wanted:
                debug.breakpoint(address)
                self._breakpoints[number].add(address)
                return OK
            self._breakpoints[number].discard(address)
            if address not in self._breakpoints[1 - number]:
                debug.remove_breakpoint(address)
            return OK
        if number not in ACCESS:
            return NOT_SUPPORTED
        watchpoint = Watchpoint(address, size, ACCESS[number])
        if wanted:
            debug.watchpoint(address, size, ACCESS[number])
            self._watchpoints.add(watchpoint)
        else:
            debug.remove_watchpoint(watchpoint)
            self._watchpoints.discard(watchpoint)
        return OK

    def _has_points(self) -> bool:
        return bool(self._breakpoints[0] or self._breakpoints[1] or self._watchpoints)

    def _remove_points(self) -> None:
        debug = self.machine.debug
        for addresses in self._breakpoints.values():
            for address in addresses:
                debug.remove_breakpoint(address)
            addresses.clear()
        for watchpoint in self._watchpoints:
            debug.remove_watchpoint(watchpoint)
        self._watchpoints.clear()

    # --- what begins in v, q and Q -----------------------------------------------------------

    def _verbose(self, rest: bytes) -> bytes | None:
        if rest == b"Cont?":
            return b"vCont;c;C;s;S"
        if rest.startswith(b"Cont"):
            self._continue(rest[4:])
            return None
        if rest.startswith(b"Kill"):
            self._kill(b"")
            return OK
        return NOT_SUPPORTED

    def _query(self, rest: bytes) -> bytes:
        name, _, argument = rest.partition(b":")
        if name == b"Supported":
            return (
                b"PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;swbreak+;hwbreak+;"
                b"vContSupported+" % PACKET_MAX
            )
        if name == b"Xfer":
            return self._transfer(argument)
        if name == b"fThreadInfo":
            numbers = range(1, len(self.machine.vcpus) + 1)
            return b"m" + b",".join(b"%x" % number for number in numbers)
        if name == b"sThreadInfo":
            return b"l"
        if name == b"C":
            return b"QC%x" % (self._cpu + 1)
        if name == b"Attached":
            return b"1"
        if name == b"Symbol":
            return OK
        if name.startswith(b"ThreadExtraInfo,"):
            return self._describe(self._thread(name.partition(b",")[2])).hex().encode()
        if name.startswith(b"Rcmd,"):
            line = _hex(name[5:]).decode("utf-8", "replace")
            return monitor(self, line).encode()[:READ_MAX].hex().encode() or OK
        return NOT_SUPPORTED

    def _transfer(self, argument: bytes) -> bytes:
        """qXfer: a piece of the target description."""
        what, action, annex, place, *_ = *argument.split(b":"), b"", b"", b"", b""
        if (what, action) != (b"features", b"read"):
            return NOT_SUPPORTED
        if annex != b"target.xml":
            return b"E00"
        offset, length = _pair(place)
        piece = self._description[offset : offset + min(length, READ_MAX)]
        more = offset + len(piece) < len(self._description)
        return (b"m" if more else b"l") + escape(piece)

    def _describe(self, cpu: int) -> bytes:
        values = self.machine.vcpus[cpu].registers()
        return b"vCPU %d, CPL %d" % (cpu, values["cpl"])

    def _set(self, rest: bytes) -> bytes:
        if rest == b"StartNoAckMode":
            self.acknowledge = False
            return OK
        return NOT_SUPPORTED


def _number(text: bytes) -> int:
    """An unsigned hexadecimal number of at most 64 bits; ValueError for anything else."""
    if not text or len(text) > 16 or not text.isalnum():
        raise ValueError(text)
    return int(text, 16)


def _pair(text: bytes) -> tuple[int, int]:
    """Two numbers with a comma between."""
    first, _, second = text.partition(b",")
    return _number(first), _number(second)


def _hex(text: bytes) -> bytes:
    """Bytes in hexadecimal."""
    if not text.isalnum() and text:
        raise ValueError(text)
    return bytes.fromhex(text.decode("ascii"))
