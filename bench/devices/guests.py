"""The guests that are compared: a machine each, by monitor, card and switch.

All of them boot the same kernel and root file system and have one card on a user-mode network
(libslirp on either side) and one virtio disk, a raw file of its own. They stay up together; only
one works at any moment.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.sides import BOOT_TIMEOUT, Talk
from ringfence.api.client import Client
from ringfence.errors import RingfenceError
from ringfence.images.store import Image

APPEND = "console=ttyS0 panic=-1 quiet"
DISK_SIZE = 256 << 20
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Kind:
    """A column of the comparison.

    Attributes
    ----------
    side : str
        "qemu" or "ringfence"; "hypercall" for packets without a device (see `minimal`).
    card : str
        "virtio" or "e1000"; how many packets a hypercall has.
    switches : str
        Options of Ringfence's virtio devices, both card and disk.
    """

    side: str
    card: str
    switches: str = ""

    @property
    def name(self) -> str:
        """Names it in tables and in JSON."""
        return " ".join(filter(None, (self.side, self.card, self.switches)))


STANDARD = tuple(Kind(side, card) for card in ("virtio", "e1000") for side in ("qemu", "ringfence"))
SWITCHES = ("gather=off", "event-idx=off", "coalesce=16:50", "poll=200")


class Guest:
    """A running guest of one kind."""

    def __init__(
        self, kind: Kind, image: Image, initrd: Path, memory: int, work: Path, cpu: str
    ) -> None:
        self.kind = kind
        self.name = f"bench-{os.getpid()}-{next(_numbers)}"
        self.disk = work / f"{self.name}.img"
        with self.disk.open("wb") as file:
            for _ in range(DISK_SIZE >> 20):
                file.write(os.urandom(1 << 20))
        self.talk = Talk(self._command(image, initrd, memory, cpu))
        try:
            self.talk.expect(b"<<ready>>", BOOT_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def _command(self, image: Image, initrd: Path, memory: int, cpu: str) -> list[str]:
        common = ["-kernel", str(image.kernel), "-initrd", str(initrd), "-append", APPEND]
        if self.kind.side == "qemu":
            card = {"virtio": "virtio-net-pci", "e1000": "e1000"}[self.kind.card]
            return [
                *("qemu-system-x86_64", "-accel", "tcg", "-cpu", cpu, "-smp", "1"),
                *("-m", f"{memory}M", "-nodefaults", "-display", "none", "-monitor", "none"),
                *("-serial", "stdio", "-no-reboot", *common),
                *("-netdev", "user,id=net", "-device", f"{card},netdev=net,romfile="),
                *("-drive", f"file={self.disk},if=none,id=disk,format=raw,cache=writeback"),
                *("-device", "virtio-blk-pci,drive=disk"),
            ]
        more = f",{self.kind.switches}" if self.kind.switches else ""
        return [
            *(sys.executable, "-m", "ringfence.cli", "run", "--engine", "translate"),
            *("--memory", f"{memory}M", "--name", self.name),
            *(f"-{word}" if word.startswith("-") else word for word in common),
            *("--net", "user:loopback", "--nic", self.kind.card + more),
            *("--disk", f"{self.disk},format=raw{more}"),
        ]

    def run(self, command: str, timeout: float) -> str:
        """Run a command of the guest's shell; RuntimeError if it fails."""
        _, status, output = self.talk.step(command, timeout)
        if status:
            last = (output.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"{command!r} gave status {status}: {last}")
        return output

    def counters(self) -> Mapping[str, Any]:
        """Ringfence's statistics; nothing of QEMU."""
        if self.kind.side != "ringfence":
            return {}
        try:
            with Client(self.name) as client:
                return client.call("stats")
        except RingfenceError:
            return {}

    def close(self) -> None:
        """End the guest and remove its disk."""
        self.talk.close()
        self.disk.unlink(missing_ok=True)
