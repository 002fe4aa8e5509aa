"""How the parts of one computer are put together.

`assemble` builds RAM, board, devices and engine and loads the guest, as after power-on; a `Machine`
calls it again for each reset, so that nothing of the old life can leak into the next. What devices
have on the host's side (open disks, sockets, the network) outlives that: `HostSide`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ringfence import engine as engines
from ringfence.boot.firmware import Firmware, place_firmware
from ringfence.boot.source import ImageSource
from ringfence.chipset.generation import ID_BYTES
from ringfence.chipset.state import check_version
from ringfence.cpu.reset import EntryState
from ringfence.engine import Engine, EngineConfig, StopReason
from ringfence.errors import HostError, ImageError
from ringfence.firmware import (
    DirectKernel,
    TestDevices,
    attach_configuration,
    attach_firmware,
    attach_test_devices,
)
from ringfence.memory.ram import GuestMemory
from ringfence.memory.zeroed import give_back
from ringfence.network.config import NICS, heritable, open_network
from ringfence.pacing import Pacing
from ringfence.sharing.options import ShareOptions
from ringfence.storage import Storage
from ringfence.storage.disk import Disk
from ringfence.storage.nvram import Nvram
from ringfence.storage.options import DiskOptions
from ringfence.storage.pool import IoPool
from ringfence.storage.seed import Seed, SeedDisk

if TYPE_CHECKING:
    from ringfence.chipset.board import Board
    from ringfence.chipset.pci.device import PciDevice
    from ringfence.chipset.timekeeping import Timekeeper
    from ringfence.devices.virtio.balloon import VirtioBalloon
    from ringfence.devices.virtio.blk import VirtioBlk
    from ringfence.devices.virtio.console import VirtioConsole
    from ringfence.devices.virtio.device import VirtioDevice
    from ringfence.devices.virtio.ninep import Virtio9p
    from ringfence.devices.virtio.rng import VirtioRng
    from ringfence.devices.virtio.vsock import VirtioVsock
    from ringfence.network.backend import NetworkBackend, NetworkCard
    from ringfence.paravirt.services import Paravirtual

GUEST_CID = 3
"""The guest's address for sockets between it and the host, unless it is a clone."""
STATE_VERSION = 1
"""Of what `Parts.save` returns."""


def new_generation() -> bytes:
    """A VM generation ID for a machine whose past is shared with others."""
    return os.urandom(ID_BYTES)


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What a machine is made of; checked and resolved, so that assembling it can be repeated.

    Attributes
    ----------
    kernel, initrd : bytes, str or Path
        The images, or the files that hold them; ``initrd`` may be None, and with firmware the
        kernel, too.
    cmdline : str
        The whole kernel command line.
    boot : str
        The kernel's format, one of `boot.loader.FORMATS`.
    modules : tuple
        For a multiboot or PVH kernel: files, each with its command line behind it, or the bytes
        of one and its command line.
    memory : int
        Bytes of guest RAM.
    on_reset : {"exit", "reboot"}
        What a reset by the guest means.
    disks : tuple of DiskOptions
        The guest's disks, in order.
    rng : bool
        Whether there is an entropy device.
    balloon : bool
        Whether there is a memory balloon.
    ports : mapping of str to callable
        Named byte ports of a virtio console, and what takes the guest's bytes.
    vsock : Path or None
        The Unix socket that the guest's sockets are reached by.
    packed : bool
        Whether virtio devices offer packed rings.
    nic : str
        The kind of network card, if there is a network.
    nic_pacing : Pacing
        How often a virtio card and the guest tell each other of work.
    mac : bytes
        Its Ethernet address.
    tsc_hz : int or None
        Rate of the guest's time-stamp counter; None: the host's.
    pause_clock : str
        What the guest's time does over a pause: ``stop`` or ``run``.
    test : TestDevices
        What there is for test kernels.
    network : str or None
        What its cable leads to, by name (`network.config`).
    forwards : tuple of str
        Ports of the host's that lead to the guest's.
    capture : Path or None
        File for all frames.
    firmware : Firmware or None
        What the CPU starts instead of a kernel.
    nvram : Path or None
        The file that keeps the firmware's variables.
    generation : bytes
        The VM generation ID, for this life of the machine: another where its past forks.
    cid : int
        The guest's address for sockets between it and the host.
    shares : tuple of ShareOptions
        Folders of the host's that the guest may use.
    seed : Seed or None
        What cloud-init finds on a disk behind the others.
    """

    kernel: ImageSource | None
    initrd: ImageSource | None
    cmdline: str
    memory: int
    engine: str
    engine_config: EngineConfig = field(default_factory=EngineConfig)
    on_reset: Literal["exit", "reboot"] = "exit"
    disks: tuple[DiskOptions, ...] = ()
    rng: bool = False
    balloon: bool = False
    ports: Mapping[str, Callable[[bytes], None]] = field(default_factory=dict)
    vsock: Path | None = None
    packed: bool = False
    nic: str = NICS[0]
    mac: bytes = b""
    tsc_hz: int | None = None
    pause_clock: str = "stop"
    boot: str = "auto"
    modules: tuple[str | tuple[bytes, str], ...] = ()
    test: TestDevices = field(default_factory=TestDevices)
    network: str | None = None
    forwards: tuple[str, ...] = ()
    capture: Path | None = None
    firmware: Firmware | None = None
    nvram: Path | None = None
    nic_pacing: Pacing = field(default_factory=Pacing)
    generation: bytes = field(default_factory=new_generation)
    cid: int = GUEST_CID
    shares: tuple[ShareOptions, ...] = ()
    seed: Seed | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a machine comes from that has lived before: its RAM, and what `Parts.save` gave.

    Without a state the machine is still on its way. All of it is made but what only one machine
    can have at a time, such as disks; it can't start before `Machine.take_over`.
    """

    memory: GuestMemory
    state: dict[str, Any] | None


@dataclass(slots=True)
class Devices:
    """What is plugged into a machine."""

    disks: list[VirtioBlk] = field(default_factory=list)
    seed: VirtioBlk | None = None
    rng: VirtioRng | None = None
    balloon: VirtioBalloon | None = None
    console: VirtioConsole | None = None
    vsock: VirtioVsock | None = None
    shares: list[Virtio9p] = field(default_factory=list)
    card: NetworkCard | None = None

    def all(self) -> Iterator[VirtioDevice]:
        """Give the virtio devices in order of slots; the network card comes behind them."""
        yield from self.disks
        for device in (self.seed, self.rng, self.balloon, self.console, self.vsock):
            if device is not None:
                yield device
        yield from self.shares


class HostSide:
    """What is on the host's side of a machine's devices, for as long as the machine exists.

    Parameters
    ----------
    config : MachineConfig
        Whose disks, socket and network are opened.
    network : NetworkBackend, optional
        The caller's own, instead of one by name.
    awaited : bool
        Whether another machine still has what only one can have at a time: disks, the file of the
        firmware's variables, ports that are forwarded. They are ours from `reclaim` on.
    """

    def __init__(
        self,
        config: MachineConfig,
        network: NetworkBackend | None = None,
        *,
        awaited: bool = False,
    ) -> None:
        from ringfence.devices.virtio.vsock_unix import UnixHost
        from ringfence.paravirt.hypercalls import Functions

        with ExitStack() as opened:
            self.hypercalls = Functions()
            self.storage = Storage(config.disks, awaited=awaited)
            opened.callback(self.storage.close)
            self.vsock = UnixHost(config.vsock) if config.vsock else None
            if self.vsock is not None:
                opened.callback(self.vsock.close)
            self.shares = [_Share(share, opened) for share in config.shares]
            variables = config.firmware.variables if config.firmware else b""
            self.nvram = Nvram(config.nvram, variables, awaited=awaited)
            opened.callback(self.nvram.close)
            self.network = open_network(
                network or config.network, config.forwards, config.capture, awaited=awaited
            )
            self.heritable = heritable(self.network)
            """The network again, if a guest can leave it behind with its connections."""
            if self.network is not None:
                opened.callback(self.network.close)
            self._opened = opened.pop_all()

    def lend(self) -> None:
        """Let another machine have what only one can have, until `reclaim`."""
        self.storage.lend()
        self.nvram.lend()
        if self.heritable is not None:
            self.heritable.lend()

    def reclaim(self) -> None:
        """Have it all for ourselves, again or at last; HostError if another machine has it."""
        self.storage.reclaim()
        self.nvram.reclaim()
        if self.heritable is not None:
            self.heritable.reclaim()

    def close(self) -> None:
        """Give everything back to the host."""
        self._opened.close()


class _Share:
    """A shared folder, and the thread that serves it, until ``opened`` is closed."""

    def __init__(self, options: ShareOptions, opened: ExitStack) -> None:
        from ringfence.sharing.session import FolderServer

        self.server = FolderServer(options)
        opened.callback(self.server.close)
        self.worker = IoPool(1, f"ringfence-share-{options.tag}")
        opened.callback(self.worker.close)


@dataclass(slots=True)
class Parts:
    """One assembly of a machine: what a reset throws away."""

    memory: GuestMemory
    time: Timekeeper
    board: Board
    engine: Engine
    paravirtual: Paravirtual
    offered: EngineConfig
    """What the engine was made with."""
    devices: Devices = field(default_factory=Devices)
    ending: StopReason | None = None
    exit_status: int | None = None
    """What the guest wrote to a test device's exit port, as an exit status."""

    def save(self) -> dict[str, Any]:
        """State of all but RAM, as plain data; the machine stands still."""
        self.board.quiesce()
        return {
            "version": STATE_VERSION,
            "engine": self.engine.save(),
            "time": self.time.save(len(self.engine.vcpus)),
            "board": self.board.save(),
            "paravirtual": self.paravirtual.save(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; time stands still until the machine runs.

        Raises
        ------
        ImageError
            The state is of another version, or not of such a machine.
        """
        check_version("machine", state, STATE_VERSION)
        parts = ("engine", "time", "board", "paravirtual")
        if not all(isinstance(state.get(part), dict) for part in parts):
            raise ImageError("the saved machine lacks a part: it is damaged")
        try:
            self.engine.restore(state["engine"])
            self.time.restore(state["time"])  # behind vCPUs, which it gives their counters
            self.board.restore(state["board"])  # behind time, by which timers are set
            self.paravirtual.restore(state["paravirtual"])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ImageError(f"the saved machine is damaged ({error!r})") from error

    def insert_disks(self, disks: Sequence[Disk]) -> None:
        """Give the devices of a machine that was on its way their disks."""
        for device, disk in zip(self.devices.disks, disks, strict=True):
            device.insert(disk)

    def plug_disk(
        self, config: MachineConfig, options: DiskOptions, disk: Disk, pool: IoPool
    ) -> int:
        """Plug one more disk in while the guest runs; return its slot."""
        from ringfence.devices.natives import natives
        from ringfence.devices.virtio.blk import VirtioBlk
        from ringfence.devices.virtio.pci import VirtioPci

        device = VirtioBlk(disk, pool, serial=options.serial)
        code = natives(config.engine_config.cache_dir)
        function = VirtioPci(
            device, self.memory, packed=config.packed, pacing=options.pacing, code=code
        )
        slot = self.board.hot_plug(function)
        self.devices.disks.append(device)
        return slot

    def log_dirty(self, enabled: bool) -> None:
        """Note in RAM's `dirty` log all writes from now on, or none; the machine stands still."""
        self.memory.dirty.enabled = enabled
        self.engine.log_dirty(enabled)
        self.memory.dirty.clear()

    def close(self) -> None:
        """Stop the devices, then free the engine and RAM."""
        self.board.close()  # devices finish what they do in RAM
        self.engine.close()
        self.memory.close()


def assemble(
    config: MachineConfig,
    host: HostSide,
    *,
    console_sink: Callable[[bytes], None],
    on_power_off: Callable[[], None],
    on_reset: Callable[[], None],
    on_exit: Callable[[int], None],
    on_eject: Callable[[Parts, int, PciDevice], None],
    origin: Origin | None = None,
) -> Parts:
    """Build RAM, board and engine and load the guest, as after power-on.

    With an ``origin``, whose RAM belongs to the machine then, the guest goes on from there instead.
    """
    # Unpacking a kernel leaves Python's lock to others: they load code meanwhile.
    loading = engines.preload(config.engine, config.engine_config)
    importing = threading.Thread(target=_import_board, name="import", daemon=True)
    importing.start()
    firmware = config.firmware
    if origin is None:
        memory = GuestMemory(config.memory, firmware.code if firmware else b"")
    else:
        memory = origin.memory
    try:
        boot = _load(config, memory) if origin is None else None
        importing.join()
        from ringfence.chipset.board import Board
        from ringfence.chipset.clock import HostClock
        from ringfence.chipset.timekeeping import PauseClock, Timekeeper
        from ringfence.cpu.tsc import Tsc
        from ringfence.devices.natives import natives
        from ringfence.devices.virtio.pci import VirtioPci
        from ringfence.paravirt import services

        time = Timekeeper(HostClock(), Tsc(config.tsc_hz), PauseClock(config.pause_clock))
        board = Board(
            clock=time.clock,
            tsc=time.tsc,
            memory_size=config.memory,
            cpus=config.engine_config.cpus,
            generation=config.generation,
            console_sink=console_sink,
            on_power_off=on_power_off,
            on_reset=on_reset,
        )
        cpus = config.engine_config.cpus
        files = attach_firmware(board, memory, firmware, host.nvram, cpus) if firmware else {}
        devices = _devices(config, host, console_sink)
        code = natives(config.engine_config.cache_dir)
        described = iter(config.disks)  # disks come first
        for device in devices.all():
            disk = next(described, None)
            pacing, slot = (disk.pacing, disk.slot) if disk else (Pacing(), None)
            board.plug(
                VirtioPci(device, memory, packed=config.packed, pacing=pacing, code=code), slot
            )
        devices.card = _plug_card(config, host, memory, board)
        attach_test_devices(board, config.test, on_exit)
        if firmware or config.test.ports:
            direct = _direct_kernel(config) if firmware else None
            attach_configuration(board, memory, cpus, files, direct)
        features = services.features(engines.capabilities(config.engine).hypercalls, cpus)
        if origin is not None:
            features = _promised(config.engine_config.paravirtual, features)
        offered = replace(config.engine_config, paravirtual=features)
        loading.join()
        engine = engines.create(config.engine, memory, board, offered)
        kicks = [vcpu.kick for vcpu in engine.vcpus]
        paravirtual = services.Paravirtual(memory, time, board, kicks, host.hypercalls)
        for vcpu, offers in zip(engine.vcpus, paravirtual.vcpus, strict=True):
            vcpu.attach_msrs(services.MSRS, offers)
            vcpu.attach_services(offers)
        parts = Parts(memory, time, board, engine, paravirtual, offered, devices)
        board.on_eject = partial(on_eject, parts)
        if origin is None:
            engine.set_boot_state(boot)
        elif origin.state is not None:
            parts.restore(origin.state)
    except BaseException:
        memory.close()
        raise
    return parts


def _import_board() -> None:
    """Import what `assemble` needs; what goes wrong here goes wrong again there."""
    with contextlib.suppress(Exception):
        for name in (
            "chipset.board",
            "devices.virtio.pci",
            "devices.virtio.rng",
            "paravirt.services",
        ):
            importlib.import_module(f"ringfence.{name}")


def _promised(promised: int, offered: int) -> int:
    """Paravirtual services for a guest that was promised some; HostError where one is missing."""
    if promised & ~offered:
        raise HostError(
            f"the guest uses paravirtual services ({promised & ~offered:#x}) that this engine"
            " lacks: use --engine translate"
        )
    return promised


def _load(config: MachineConfig, memory: GuestMemory) -> EntryState | None:
    """Put firmware into memory, or else the kernel and what firmware would have left for it.

    Returns what the CPU begins with, if it is not what it begins with after power-on.
    """
    if config.firmware is not None:
        place_firmware(memory, config.firmware)
        return None
    from ringfence.boot.bios import store_bios_remains
    from ringfence.boot.loader import load_guest
    from ringfence.chipset import acpi, mptable, uart

    assert config.kernel is not None
    hardware = acpi.Hardware(config.engine_config.cpus)
    memory.write(acpi.ADDRESS, acpi.build_tables(acpi.ADDRESS, hardware))
    tables = mptable.build_mp_tables(mptable.ADDRESS, config.engine_config.cpus)
    memory.write(mptable.ADDRESS, tables)
    store_bios_remains(memory, uart.BASE)
    entry = load_guest(
        memory,
        kernel=config.kernel,
        boot=config.boot,
        initrd=config.initrd,
        modules=config.modules,
        cmdline=config.cmdline,
        rsdp=acpi.ADDRESS,
    )
    give_back()
    return entry


def _direct_kernel(config: MachineConfig) -> DirectKernel | None:
    """What firmware may start without a disk."""
    if config.kernel is None:
        return None
    return DirectKernel(config.kernel, config.initrd, config.cmdline)


def _devices(config: MachineConfig, host: HostSide, console: Callable[[bytes], None]) -> Devices:
    """Make what is plugged into the board."""
    from ringfence.devices.virtio.balloon import VirtioBalloon
    from ringfence.devices.virtio.blk import VirtioBlk
    from ringfence.devices.virtio.console import Port, VirtioConsole
    from ringfence.devices.virtio.ninep import Virtio9p
    from ringfence.devices.virtio.rng import VirtioRng
    from ringfence.devices.virtio.vsock import VirtioVsock

    storage = host.storage
    named = [Port(name, sink) for name, sink in config.ports.items()]
    return Devices(
        disks=[
            VirtioBlk(disk, storage.pool, serial=options.serial)
            for options, disk in zip(config.disks, storage.disks, strict=True)
        ],
        seed=_seed_disk(config.seed, storage) if config.seed else None,
        rng=VirtioRng() if config.rng else None,
        balloon=VirtioBalloon() if config.balloon else None,
        console=VirtioConsole([Port("", console), *named]) if named else None,
        vsock=VirtioVsock(config.cid, host.vsock) if host.vsock else None,
        shares=[Virtio9p(share.server, share.worker) for share in host.shares],
    )


def _seed_disk(seed: Seed, storage: Storage) -> VirtioBlk:
    """The disk that cloud-init looks for."""
    from ringfence.devices.virtio.blk import VirtioBlk

    return VirtioBlk(SeedDisk(seed), storage.pool, serial="CIDATA")


def _plug_card(
    config: MachineConfig, host: HostSide, memory: GuestMemory, board: Board
) -> NetworkCard | None:
    """Make and plug the network card, if the machine has a network."""
    if host.network is None:
        return None
    from ringfence.devices.natives import natives

    code = natives(config.engine_config.cache_dir)
    if config.nic == "virtio":
        from ringfence.devices.virtio.net import VirtioNet
        from ringfence.devices.virtio.pci import VirtioPci

        device = VirtioNet(host.network, config.mac)
        pacing = config.nic_pacing
        board.plug(VirtioPci(device, memory, packed=config.packed, pacing=pacing, code=code))
        return device
    from ringfence.devices.e1000.card import E1000

    card = E1000(memory, board.timers, host.network, config.mac, code)
    board.plug(card)
    return card


def warm_up(config: MachineConfig) -> None:
    """Load all the code that `assemble` needs for such a machine."""
    from ringfence.boot import loader  # noqa: F401
    from ringfence.chipset import acpi, board, clock, timekeeping  # noqa: F401
    from ringfence.devices import natives
    from ringfence.devices.e1000 import card  # noqa: F401
    from ringfence.devices.virtio import (  # noqa: F401
        balloon,
        blk,
        console,
        net,
        ninep,
        pci,
        rng,
        vsock,
        vsock_unix,
    )
    from ringfence.paravirt import hypercalls, services  # noqa: F401
    from ringfence.sharing import session  # noqa: F401

    natives.preload(config.engine_config.cache_dir)
    engines.preload(config.engine, config.engine_config).join()
