"""What a machine's owner asks for, and what he says to its devices.

`Machine` is the face of Ringfence as a library. Its constructor turns what people write into a
`MachineConfig`; the rest of what can be done with a machine comes from the rooms that it inherits:
`life.Living` (start, pause, end), `inspection.Inspectable` (memory and registers), `state.movable`
(snapshots, migration) and `hotplug` (disks).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ringfence import engine as engines
from ringfence.assembly import MachineConfig
from ringfence.engine import EngineConfig
from ringfence.errors import UsageError
from ringfence.firmware import TestDevices
from ringfence.life import Living
from ringfence.network.config import NICS, parse_mac, parse_nic
from ringfence.settings import default_cache_dir, parse_memory
from ringfence.sharing.options import ShareOptions, parse_shares
from ringfence.startup import choose
from ringfence.storage.options import DiskOptions, parse_disk
from ringfence.storage.seed import Seed

if TYPE_CHECKING:
    from ringfence.boot.firmware import Firmware
    from ringfence.boot.source import ImageSource
    from ringfence.network.backend import NetworkBackend
    from ringfence.paravirt.hypercalls import Function


class Machine(Living):
    """One virtual computer.

    Parameters
    ----------
    image : str, optional
        Name of a stored image (``debian``) or of the built-in guest (``builtin``).
    kernel, initrd : bytes, str or Path, optional
        A kernel (bzImage or ELF vmlinux) and initial RAM disk of the owner's, instead of an image.
    append : str, optional
        Kernel command line; behind the image's own where there is an image.
    memory : int or str
        Guest RAM, in bytes or as text such as ``"512M"``.
    cpus : int
        Number of vCPUs; `ringfence doctor` says how many an engine offers.
    engine : str
        ``auto``, ``translate``, ``kvm`` or ``trap``.
    features : collection of str, optional
        CPU features that the guest is offered, by the names of ``vcpus[0].features``, for one that
        is to move to hosts or engines with fewer; by default all that there are here.
    on_reset : {"exit", "reboot"}
        Whether a reset by the guest ends the machine or starts it anew.
    cache : bool
        Whether the engine's own compiled code is kept on disk for the next run.
    cache_dir : str or Path, optional
        Where they are kept; by default below the user's cache folder.
    disks : sequence of str, Path or DiskOptions
        Disk images for /dev/vda, /dev/vdb…; text as `storage.options.parse_disk` reads it, such as
        ``"root.qcow2,snapshot"``. They are open as long as the machine is.
    ephemeral : bool
        Throw away what the guest writes on its image's own disk, which is /dev/vda before others.
    rng : bool
        Whether the guest has an entropy device, beside the CPU's RDRAND and RDSEED.
    balloon : bool
        Whether the guest has a memory balloon; see `set_balloon`.
    ports : mapping of str to callable, optional
        Named ports of bytes (/dev/virtio-ports/NAME in the guest, where udev runs): each callable
        is given what the guest writes, in a thread of the machine's, and must return soon. With
        ports the guest has a console hvc0 as well, whose output is the machine's console's.
    vsock : str or Path, optional
        Make a Unix socket there by which the host reaches the guest's sockets (AF_VSOCK, CID 3);
        see `devices.virtio.vsock_unix` for what to say to it.
    packed : bool
        Whether virtio devices offer packed rings beside split ones.
    network : str or NetworkBackend, optional
        What the network card's cable leads to: ``user``, ``user:loopback``, ``socket:PATH``,
        ``tap:NAME``, or a backend of the caller's, which is closed with the machine. None, or
        ``none``: no card.
    nic : str
        The kind of card: ``virtio`` or ``e1000``; behind a comma, options of a virtio one (see
        `network.config.parse_nic`): ``virtio,coalesce=16:50,poll=200``.
    mac : str, optional
        Its Ethernet address, ``02:00:00:00:00:01``; by default a random one.
    forwards : sequence of str
        Ports of the host's that lead to the guest's, with a ``user`` network: ``8080:80``.
    capture : str or Path, optional
        File for all frames, in pcap format.
    tsc_hz : int, optional
        Rate of the guest's time-stamp counter, the same on every host that it will run on; by
        default the host's.
    pause_clock : {"stop", "run"}
        Whether the guest's time stands still over a pause, or jumps to where it would have been.
        The guest may change it (see ``paravirt.hypercalls``).
    direct : bool
        Under translation: user code that computes for long runs directly, in processes of its own,
        where guest and host allow it.
    boot : str
        The kernel's format: ``auto``, ``linux``, ``linux32``, ``multiboot`` or ``pvh``.
    modules : sequence of str
        ``FILE`` or ``FILE ARGUMENT...``, for multiboot and PVH kernels; ``initrd`` is the first.
    test : TestDevices, optional
        Devices for test kernels; see `exit_status`.
    bios : str, Path or Firmware, optional
        Firmware to start instead of a kernel: ``seabios`` or ``ovmf``, if they have been fetched,
        or a file. UEFI firmware starts ``kernel`` if there is one.
    nvram : str or Path, optional
        The file that keeps the firmware's variables; made if it is not there. Without it changes
        are lost with the machine.
    shares : sequence of str, Path or ShareOptions
        Folders of the host's that the guest may mount (9p over virtio); text as
        `sharing.options.parse_share` reads it, such as ``"src,tag=code,ro"``.
    seed : Seed, optional
        What cloud-init in the guest is told, on one more disk; see `storage.seed.parse_seed`.

    Raises
    ------
    UsageError, ImageError, HostError
        The machine can't be built as asked; nothing is left behind.

    Examples
    --------
    >>> with Machine(image="debian") as machine:  # doctest: +SKIP
    ...     machine.start()
    ...     machine.console.wait_for("~ # ")
    ...     machine.console.send("poweroff -f\\n")
    ...     machine.wait(10)
    <StopReason.POWER_OFF: 'power-off'>
    """

    def __init__(
        self,
        *,
        image: str | None = None,
        kernel: ImageSource | None = None,
        initrd: ImageSource | None = None,
        append: str | None = None,
        memory: int | str = "512M",
        cpus: int = 1,
        engine: str = "auto",
        features: Collection[str] | None = None,
        on_reset: Literal["exit", "reboot"] = "exit",
        cache: bool = True,
        cache_dir: str | Path | None = None,
        disks: Sequence[str | Path | DiskOptions] = (),
        ephemeral: bool = False,
        rng: bool = False,
        balloon: bool = False,
        ports: Mapping[str, Callable[[bytes], None]] | None = None,
        vsock: str | Path | None = None,
        packed: bool = False,
        network: str | NetworkBackend | None = None,
        nic: str = NICS[0],
        mac: str | None = None,
        forwards: Sequence[str] = (),
        capture: str | Path | None = None,
        tsc_hz: int | None = None,
        pause_clock: Literal["stop", "run"] = "stop",
        direct: bool = True,
        boot: str = "auto",
        modules: Sequence[str] = (),
        test: TestDevices | None = None,
        bios: str | Path | Firmware | None = None,
        nvram: str | Path | None = None,
        shares: Sequence[str | Path | ShareOptions] = (),
        seed: Seed | None = None,
    ) -> None:
        if on_reset not in ("exit", "reboot"):
            raise UsageError(f"on_reset {on_reset!r} is unknown: expected 'exit' or 'reboot'")
        if pause_clock not in ("stop", "run"):
            raise UsageError(f"pause_clock {pause_clock!r} is unknown: expected 'stop' or 'run'")
        card, nic_pacing = parse_nic(nic)
        size = parse_memory(memory)
        engine = engines.select(engine, cpus)
        folder = (Path(cache_dir) if cache_dir else default_cache_dir()) if cache else None
        software = choose(image, kernel, initrd, append, bios, nvram, ephemeral)
        config = MachineConfig(
            software.kernel,
            software.initrd,
            software.cmdline,
            size,
            engine,
            EngineConfig(
                cpus,
                cache_dir=folder,
                features=frozenset(features) if features is not None else None,
                direct=direct,
            ),
            on_reset,
            (*software.disks, *(parse_disk(disk) for disk in disks)),
            rng,
            balloon,
            dict(ports or {}),
            Path(vsock) if vsock else None,
            packed,
            card,
            parse_mac(mac),
            tsc_hz,
            pause_clock,
            boot,
            tuple(modules),
            test or TestDevices(),
            network if isinstance(network, str) else None,
            tuple(forwards),
            Path(capture) if capture is not None else None,
            software.firmware,
            Path(nvram) if nvram else None,
            nic_pacing,
            shares=parse_shares(shares),
            seed=seed,
        )
        super().__init__(config, None if isinstance(network, str) else network)

    def set_balloon(self, size: int | str) -> None:
        """Ask the guest to give ``size`` bytes of its RAM back to the host; it does what it can.

        Raises
        ------
        UsageError
            The machine was made without a balloon.
        """
        with self._change:
            balloon = self._parts.devices.balloon
            if balloon is None:
                raise UsageError("the machine has no balloon: make it with balloon=True")
            balloon.set_target(size if isinstance(size, int) else parse_memory(size))

    def send_port(self, name: str, data: bytes) -> int:
        """Give bytes to a named port; return how many were taken (the rest: try again later).

        Raises
        ------
        UsageError
            There is no such port.
        """
        with self._change:
            console = self._parts.devices.console
            if console is None or name not in self.config.ports:
                raise UsageError(f"the machine has no port {name!r}: name it in ports=")
            return console.send(1 + list(self.config.ports).index(name), data)

    def hypercall(self, number: int) -> Callable[[Function], Function]:
        """Decorate the function that answers a hypercall of the guest's kernel.

        It is given a ``paravirt.hypercalls.Call``, in the vCPU's thread, and returns RAX (None: 0).
        What it raises as ``HypercallError`` is the guest's error, such as a bad address in one of
        the call's copies; other exceptions are -EINVAL and shown once.

        Raises
        ------
        UsageError
            The number is not one of 0x1000 to 0xffff, or taken, or the engine keeps hypercalls.

        Examples
        --------
        >>> @machine.hypercall(0x1000)  # doctest: +SKIP
        ... def checksum(call):
        ...     address, length, *_ = call.arguments
        ...     return zlib.crc32(call.read(address, length))
        """
        if not engines.capabilities(self.config.engine).hypercalls:
            raise UsageError(
                f"engine '{self.config.engine}' answers hypercalls itself: use 'translate'"
            )

        def add(function: Function) -> Function:
            self._host.hypercalls.add(number, function)
            return function

        return add
