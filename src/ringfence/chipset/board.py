"""The board: all chips, wired as on a PC, behind the few calls that a vCPU's loop makes.

Wiring: ISA interrupt n reaches both the 8259 pair and the I/O APIC (0 at pin 2, the others at their
own number); the 8259s' output is every local APIC's LINT0. One lock guards all state of the
chipset; every public method takes it, and timers fire with it held. What makes an interrupt
deliverable ends in the CPU's wake callback, from whatever thread it came.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ringfence.chipset.apicbus import ApicBus, Delivery
from ringfence.chipset.bus import MmioBus, PortBus
from ringfence.chipset.clock import Clock, TimerQueue
from ringfence.chipset.generation import BASE as GENERATION_BASE
from ringfence.chipset.generation import ID_BYTES, GenerationId
from ringfence.chipset.generation import LENGTH as GENERATION_LENGTH
from ringfence.chipset.i8042 import I8042
from ringfence.chipset.i8042 import IRQ as KEYBOARD_IRQ
from ringfence.chipset.ioapic import BASE as IOAPIC_BASE
from ringfence.chipset.ioapic import LENGTH as IOAPIC_LENGTH
from ringfence.chipset.ioapic import IoApic
from ringfence.chipset.lapic import (
    APIC_BASE,
    PAGE,
    TSC_DEADLINE,
    X2APIC_FIRST,
    X2APIC_LAST,
    Lapic,
)
from ringfence.chipset.lapic_timer import TscLine
from ringfence.chipset.pci.device import PciDevice
from ringfence.chipset.pci.host import PciHost
from ringfence.chipset.pci.hotplug import BASE as HOTPLUG_BASE
from ringfence.chipset.pci.hotplug import LENGTH as HOTPLUG_LENGTH
from ringfence.chipset.pci.hotplug import SLOTS as HOTPLUG_SLOTS
from ringfence.chipset.pci.hotplug import HotPlug
from ringfence.chipset.pic import PicPair
from ringfence.chipset.pit import Pit
from ringfence.chipset.pm import SCI_IRQ, Gpe, PowerManagement, ResetControl
from ringfence.chipset.rtc import BASE as RTC_BASE
from ringfence.chipset.rtc import LENGTH as RTC_LENGTH
from ringfence.chipset.rtc import Rtc
from ringfence.chipset.spare import SpareTime
from ringfence.chipset.state import Saved, State, check_version
from ringfence.chipset.uart import BASE as UART_BASE
from ringfence.chipset.uart import IRQ as UART_IRQ
from ringfence.chipset.uart import LENGTH as UART_LENGTH
from ringfence.chipset.uart import LSR, Uart
from ringfence.cpu.faults import GeneralProtection
from ringfence.errors import ImageError, UsageError
from ringfence.memory.registers import RegisterMap
from ringfence.memory.summons import Summons

MAXIMUM_CPUS = 64
PAGE_MASK = 0xFFF


@dataclass(frozen=True, slots=True)
class GatheredPorts:
    """Two byte ports that an engine may serve itself while `Board.quiet_status` has a value.

    Bytes written to ``write`` may be handed over later, in order; ``read`` gives that value.
    """

    write: int
    read: int


def _nothing() -> None:
    """Stand in for a callback nobody has set."""


class Board:
    """A PC's chipset.

    Parameters
    ----------
    clock : Clock
        Machine time.
    tsc : TscLine
        The guest's TSCs, for the local APICs' TSC-deadline timers and for engines.
    memory_size : int
        Guest RAM in bytes, told in the CMOS.
    cpus : int
        How many local APICs; CPU 0 is the boot CPU.
    generation : bytes
        The VM generation ID, 16 bytes.
    console_sink : Callable[[bytes], None]
        Takes COM1's output, with the lock held.
    on_power_off, on_reset : Callable[[], None]
        Called, with the lock held, when the guest asks for it; the board itself does not change.

    Attributes
    ----------
    lock : threading.RLock
        Guards everything on the board.
    ports, mmio : PortBus, MmioBus
        Where further devices register.
    timers : TimerQueue
        Where they arm timers; ``start()`` it to have time pass.
    on_signal : Callable[[int, Delivery, int], None]
        Called with (cpu, NMI | INIT | SIPI | SMI, vector), the lock held.
    """

    VERSION = 4

    def __init__(
        self,
        *,
        clock: Clock,
        tsc: TscLine,
        memory_size: int,
        cpus: int = 1,
        generation: bytes = bytes(ID_BYTES),
        console_sink: Callable[[bytes], None],
        on_power_off: Callable[[], None] = _nothing,
        on_reset: Callable[[], None] = _nothing,
    ) -> None:
        if not 1 <= cpus <= MAXIMUM_CPUS:
            raise UsageError(f"{cpus} CPUs: expected 1 to {MAXIMUM_CPUS}")
        self.lock = threading.RLock()
        self.clock = clock
        self.timers = TimerQueue(clock, self.lock)
        self.spare = SpareTime(self.timers)
        self.summons = Summons()
        self.ports = PortBus()
        self.mmio = MmioBus()
        self.registers = RegisterMap()
        """Which registers of devices an engine may access by itself (`memory.registers`)."""
        self.on_power_off = on_power_off
        self.on_reset = on_reset
        self.on_signal: Callable[[int, Delivery, int], None] = lambda cpu, mode, vector: None

        self.apics = ApicBus()
        self.tsc = tsc
        self.gathered = GatheredPorts(UART_BASE, UART_BASE + LSR)
        self.on_input: Callable[[], None] = _nothing
        """Called, with the lock held, when host input ends a state in which ports were gathered."""
        self.lapics = [Lapic(cpu, self.apics, self.timers, tsc.vcpu(cpu)) for cpu in range(cpus)]
        self.apics.lapics = self.lapics
        self.ioapic = IoApic(self.apics)
        self.apics.on_eoi = self.ioapic.end_of_interrupt
        self.apics.on_signal = self._signal
        self.pic = PicPair(self._intr)
        self.pit = Pit(self.timers, self._line(0))
        self.rtc = Rtc(self.timers, self._line(8), memory_size)
        self.uart = Uart(self.timers, self._line(UART_IRQ), console_sink)
        self.pm = PowerManagement(self.timers, self._line(SCI_IRQ), self._power_off)
        self.i8042 = I8042(self._reset, self._line(KEYBOARD_IRQ))
        self.reset_control = ResetControl(self._reset)
        self.generation = GenerationId(generation)
        self.pci = PciHost(
            self.reset_control,
            lock=self.lock,
            ports=self.ports,
            memory=self.mmio,
            interrupt=self.ioapic.set_irq,
            message=self.apics.send_msi,
            later=lambda action, delay: self.timers.arm(self.clock.now() + delay, action),
            put_off=self.spare.put_off,
            summons=self.summons,
        )
        self.hotplug = HotPlug(lambda: self.pm.raise_event(Gpe.HOT_PLUG), self._eject)
        self.on_eject: Callable[[int, PciDevice], None] = lambda slot, device: None
        """Called, with the lock held, with a device that the guest has let go of, off the bus."""
        self._removable: set[int] = set()
        self._wake: list[Callable[[], None]] = [_nothing] * cpus
        self._devices: dict[str, Any] = {
            "ioapic": self.ioapic,
            "pic": self.pic,
            "pit": self.pit,
            "rtc": self.rtc,
            "uart": self.uart,
            "pm": self.pm,
            "i8042": self.i8042,
            "reset_control": self.reset_control,
            "pci": self.pci,
            "generation": self.generation,
            "hotplug": self.hotplug,
        }

        for part in (self.pic, self.pit, self.pm, self.i8042):
            part.attach(self.ports)
        self.ports.register(RTC_BASE, RTC_LENGTH, self.rtc, widths=(1,))
        self.ports.register(UART_BASE, UART_LENGTH, self.uart, widths=(1,))
        self.ports.register(HOTPLUG_BASE, HOTPLUG_LENGTH, self.hotplug, widths=(4,))
        self.mmio.register(IOAPIC_BASE, IOAPIC_LENGTH, self.ioapic)
        self.mmio.register(GENERATION_BASE, GENERATION_LENGTH, self.generation)
        self.pic.write(1, 1, 1 << SCI_IRQ - 8)  # ELCR: the SCI is level-triggered
        self.lapics[0].set_virtual_wire()
        self.mmio.map.on_change = self._show_registers

    # ---- what a vCPU's loop calls

    def port_read(self, port: int, size: int) -> int:
        """Do an IN of 1, 2 or 4 bytes."""
        with self.lock:
            return self.ports.read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """Do an OUT of 1, 2 or 4 bytes."""
        with self.lock:
            self.ports.write(port, size, value)

    def write_gathered(self, data: bytes) -> None:
        """Bytes that were written to the gathered port, in order."""
        with self.lock:
            if self.uart.quiet_status() is not None:
                self.uart.transmit(data)
            else:
                for value in data:
                    self.ports.write(self.gathered.write, 1, value)

    def mmio_read(self, pa: int, size: int, cpu: int = 0) -> int:
        """Read ``size`` bytes at guest-physical ``pa``, as CPU ``cpu``."""
        with self.lock:
            lapic = self.lapics[cpu]
            if pa >> 12 != lapic.base >> 12 or lapic.mmio_base is None:
                return self.mmio.read(pa, size)
            if (pa & 0xF) + size <= 16:
                return lapic.read(pa & PAGE_MASK, size)
            return sum(self.mmio_read(pa + at, 1, cpu) << 8 * at for at in range(size))

    def mmio_write(self, pa: int, size: int, value: int, cpu: int = 0) -> None:
        """Write ``size`` bytes at guest-physical ``pa``, as CPU ``cpu``."""
        with self.lock:
            lapic = self.lapics[cpu]
            if pa >> 12 == lapic.base >> 12 and lapic.mmio_base is not None:
                lapic.write(pa & PAGE_MASK, size, value)
            else:
                self.mmio.write(pa, size, value)

    def msr_read(self, cpu: int, index: int) -> int:
        """Read a local APIC MSR: 0x1b, 0x6e0 or 0x800-0x8ff; else GeneralProtection."""
        self._check_msr(index)
        with self.lock:
            return self.lapics[cpu].msr_read(index)

    def msr_write(self, cpu: int, index: int, value: int) -> None:
        """Write a local APIC MSR; GeneralProtection where the CPU would raise #GP."""
        self._check_msr(index)
        with self.lock:
            self.lapics[cpu].msr_write(index, value)
            if index == APIC_BASE:
                self._show_registers()

    def apic_enabled(self, cpu: int) -> bool:
        """Tell whether a local APIC is there (IA32_APIC_BASE.EN), as CPUID shows."""
        with self.lock:
            return self.lapics[cpu].enabled

    def read_cr8(self, cpu: int) -> int:
        """Return CR8."""
        with self.lock:
            return self.lapics[cpu].read_cr8()

    def write_cr8(self, cpu: int, value: int) -> None:
        """Set CR8."""
        with self.lock:
            self.lapics[cpu].write_cr8(value)

    def interrupt_pending(self, cpu: int) -> bool:
        """Tell whether `acknowledge` would give a vector other than the spurious one.

        For the CPU's own thread, outside guest code: it may take an `EoiFlag` back.
        """
        with self.lock:
            if self.lapics[cpu].irr:
                self.lapics[cpu].reclaim_eoi()
            return self.lapics[cpu].pending_vector() is not None or self._extint(cpu)

    def acknowledge(self, cpu: int) -> int:
        """Take the interrupt to deliver now and return its vector: local APIC first, then 8259."""
        with self.lock:
            lapic = self.lapics[cpu]
            if lapic.pending_vector() is None and self._extint(cpu):
                return self.pic.acknowledge()
            return lapic.acknowledge()

    def next_interrupt(self, cpu: int, *, allowed: bool) -> tuple[int, bool]:
        """The vector to deliver now, -1 for none, and whether another one is pending then.

        What `interrupt_pending` and `acknowledge` say, in one call; ``allowed``: the CPU takes one.
        """
        with self.lock:
            lapic = self.lapics[cpu]
            vector = -1
            if lapic.irr:
                lapic.reclaim_eoi()
                if allowed and lapic.pending_vector() is not None:
                    vector = lapic.acknowledge()
            if self.pic.output:
                if allowed and vector < 0 and self._extint(cpu):
                    vector = self.pic.acknowledge()
                if self._extint(cpu):
                    return vector, True
            return vector, lapic.irr != 0 and lapic.pending_vector() is not None

    def idle(self) -> None:
        """Hear that a vCPU is about to sleep: what was put off until then is done."""
        with self.lock:
            self.summons.collect()
            if self.spare.waiting:
                self.spare.begin()

    def settle(self) -> None:
        """Do what accesses by `registers` have left to do; before anything else of the board's."""
        with self.lock:
            self.registers.settle()

    def collect(self) -> None:
        """Hear that a vCPU was summoned: what devices have done beside it is given back."""
        with self.lock:
            self.summons.collect()

    def await_done(self, door: int) -> bool:
        """Before a vCPU sleeps, wait for what devices will have done at once (see `Summons`);
        whether there is something to `collect`.
        """
        return self.summons.await_done(door)

    def set_wake(self, cpu: int, callback: Callable[[], None]) -> None:
        """Have ``callback`` called, the lock held, when ``cpu`` gets something to deliver."""
        with self.lock:
            self._wake[cpu] = callback
            self.lapics[cpu].wake = lambda: self._notify(cpu)

    # ---- what the machine and its devices call

    def set_irq(self, irq: int, asserted: bool) -> None:
        """Drive ISA interrupt line 0-15."""
        with self.lock:
            self.pic.set_irq(irq, asserted)
            self.ioapic.set_irq(2 if irq == 0 else irq, asserted)

    def plug(self, device: PciDevice, slot: int | None = None) -> int:
        """Put a device into a PCI slot, by default the first free one; return the slot.

        One that is put into a slot for hot-plug by its number is the guest's to remove.
        """
        if slot is not None and slot in HOTPLUG_SLOTS:
            self._removable.add(slot)
        return self.pci.plug(device, slot)

    def hot_plug(self, device: PciDevice) -> int:
        """Put a device into a free slot and have the guest look there; return the slot.

        Raises
        ------
        UsageError
            All slots for this are taken.
        """
        with self.lock:
            taken = {slot for slot in HOTPLUG_SLOTS if self.pci.present(slot)}
            free = next((slot for slot in HOTPLUG_SLOTS if slot not in taken), None)
            if free is None:
                raise UsageError(
                    f"all {len(HOTPLUG_SLOTS)} slots for devices that are added are taken: remove"
                    " one first"
                )
            self.plug(device, free)
            self.hotplug.tell_filled(free)
            return free

    def request_removal(self, slot: int) -> None:
        """Ask the guest to let go of a device that was added; `on_eject` tells when it has."""
        with self.lock:
            if slot not in self._removable:
                raise UsageError(f"there is no device in slot {slot} that was added")
            self.hotplug.ask_for(slot)

    def _eject(self, slot: int) -> None:
        if slot in self._removable:
            self._removable.remove(slot)
            self.on_eject(slot, self.pci.unplug(slot))

    def add(self, name: str, part: Saved) -> None:
        """Let a further part of the board be saved and restored under ``name``."""
        if name in self._devices:
            raise UsageError(f"the board has a {name} already")
        self._devices[name] = part

    def send_msi(self, address: int, data: int) -> None:
        """Deliver a message-signalled interrupt."""
        with self.lock:
            self.apics.send_msi(address, data)

    def send_ipi(self, cpus: Iterable[int], mode: int, vector: int) -> int:
        """Deliver an interrupt to some CPUs; return how many took it."""
        with self.lock:
            targets = (self.lapics[cpu] for cpu in cpus)
            return sum(self.apics.deliver([each], mode, vector, False) for each in targets)

    def receive(self, data: bytes) -> None:
        """Type bytes at COM1."""
        with self.lock:
            self.uart.receive(data)
            self.on_input()

    def quiet_status(self) -> int | None:
        """What the gathered port reads as, if the board is not needed (the lock is held)."""
        return self.uart.quiet_status()

    def press_power_button(self) -> None:
        """Ask the guest to shut down."""
        with self.lock:
            self.pm.press_power_button()

    def flush(self) -> None:
        """Hand pending console output to the sink."""
        with self.lock:
            self.uart.flush()

    def quiesce(self) -> None:
        """Wait until no device works on guest RAM, before `save`. Not with the lock held."""
        for device in self.pci.devices:
            device.quiesce()

    def close(self) -> None:
        """Close plugged-in devices: wait for what they do in guest RAM. Not with the lock held."""
        for device in self.pci.devices:
            device.close()

    def save(self) -> State:
        """Return the state of clock and chips as plain data."""
        with self.lock:
            return {
                "version": self.VERSION,
                "now": self.clock.now(),
                "lapics": [lapic.save() for lapic in self.lapics],
                **{name: device.save() for name, device in self._devices.items()},
            }

    def restore(self, state: State) -> None:
        """Take over what `save` returned; restore the TSC first, and don't run timers meanwhile.

        Raises
        ------
        ImageError
            The state is of another version or shape, or for another number of CPUs.
        """
        check_version("Board", state, self.VERSION)
        missing = {"now", "lapics", *self._devices} - set(state)
        if missing or len(state["lapics"]) != len(self.lapics):
            raise ImageError(
                f"saved board lacks {sorted(missing)} or is not for {len(self.lapics)} CPUs:"
                " restore it into the machine it was saved from"
            )
        with self.lock:
            self.clock.set_now(state["now"])
            for name, device in self._devices.items():
                device.restore(state[name])
            for lapic, saved in zip(self.lapics, state["lapics"], strict=True):
                lapic.restore(saved)
            self._show_registers()
            if self.generation.changed:  # behind the APICs, which take the interrupt
                self.pm.raise_event(Gpe.GENERATION)
            self.timers.kick()
            for cpu in range(len(self.lapics)):
                self._notify(cpu)

    # ---- wiring

    def _line(self, irq: int) -> Callable[[bool], None]:
        """Return what drives an ISA interrupt line, for a chip that runs with the lock held."""
        pic, ioapic = self.pic, self.ioapic
        pin = 2 if irq == 0 else irq

        def drive(asserted: bool) -> None:
            pic.set_irq(irq, asserted)
            ioapic.set_irq(pin, asserted)

        return drive

    def _intr(self, asserted: bool) -> None:
        """Follow the 8259s' output."""
        for lapic in self.lapics:
            lapic.set_lint(0, asserted)
        self.ioapic.set_irq(0, asserted)
        if asserted:
            for cpu in range(len(self.lapics)):
                self._notify(cpu)

    def _show_registers(self) -> None:
        """Follow what is seen where: the local APICs' pages come before all devices."""
        pages = [lapic.mmio_base for lapic in self.lapics]
        self.registers.show(
            place
            for place in self.mmio.map.banks()
            if not any(
                page is not None and place[0] < page + PAGE and page < place[1] for page in pages
            )
        )

    def _extint(self, cpu: int) -> bool:
        """Tell whether an 8259 interrupt awaits this CPU."""
        if not self.pic.output:
            return False
        lapic = self.lapics[cpu]
        if not lapic.enabled:
            return cpu == 0
        return lapic.accepts_extint() or self.ioapic.routes_extint(cpu)

    def _notify(self, cpu: int) -> None:
        lapic = self.lapics[cpu]
        if lapic.pending_vector() is not None or lapic.lent or self._extint(cpu):
            self._wake[cpu]()

    def _signal(self, cpu: int, mode: Delivery, vector: int) -> None:
        self.on_signal(cpu, mode, vector)

    def _power_off(self) -> None:
        self.uart.flush()
        self.on_power_off()

    def _reset(self) -> None:
        self.uart.flush()
        self.on_reset()

    def _check_msr(self, index: int) -> None:
        if index not in (APIC_BASE, TSC_DEADLINE) and not X2APIC_FIRST <= index <= X2APIC_LAST:
            raise GeneralProtection(f"MSR {index:#x} is not the local APIC's")
