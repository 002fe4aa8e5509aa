"""What a machine is made of, told and understood again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringfence.assembly import MachineConfig, TestDevices
from ringfence.boot.firmware import Firmware
from ringfence.engine import EngineConfig
from ringfence.errors import ImageError
from ringfence.sharing.options import parse_share
from ringfence.state import plain
from ringfence.state.description import configured, describe
from ringfence.storage.options import DiskOptions, parse_disk
from ringfence.storage.seed import Seed

FULL = MachineConfig(
    kernel=Path("/boot/vmlinuz"),
    initrd=b"bytes",
    cmdline="console=ttyS0",
    memory=64 << 20,
    engine="translate",
    engine_config=EngineConfig(cpus=2, features=frozenset({"AVX", "SSE3"})),
    on_reset="reboot",
    disks=(parse_disk("/images/root.qcow2,serial=ROOT"), DiskOptions(Path("/b"), "raw", slot=24)),
    rng=True,
    balloon=True,
    ports={"agent": print},
    vsock=Path("/run/vm.sock"),
    packed=True,
    nic="e1000",
    mac=b"\x02RF123",
    network="user",
    forwards=("8080:80",),
    capture=Path("/tmp/wire.pcap"),
    firmware=Firmware(b"code", b"variables"),
    nvram=Path("/tmp/vars"),
    tsc_hz=2_000_000_000,
    pause_clock="run",
    boot="multiboot",
    modules=("/boot/module with arguments",),
    test=TestDevices(exit_port=0xF4, ports=True),
    shares=(parse_share("/srv/data,tag=work,ro,owner=1000"),),
    seed=Seed(b"\x00\xff", ("ssh-ed25519 AAAA",), "web"),
)


def told(config: MachineConfig) -> dict[str, Any]:
    described = plain.loads(plain.dumps(describe(config)), "description")
    assert isinstance(described, dict)
    return described


def test_every_field_comes_back() -> None:
    back = configured(told(FULL))
    for field in dataclasses.fields(MachineConfig):
        if field.name == "ports":
            assert list(back.ports) == ["agent"]
            back.ports["agent"](b"to nobody")
        else:
            assert getattr(back, field.name) == getattr(FULL, field.name), field.name


def test_paths_don_t_depend_on_the_folder() -> None:
    config = dataclasses.replace(FULL, kernel=Path("vmlinuz"))
    assert told(config)["kernel"] == Path.cwd() / "vmlinuz"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(memory="much"),
        lambda d: d.update(memory=True),
        lambda d: d.update(on_reset="explode"),
        lambda d: d.update(disks=({"class": "DiskOptions"},)),
        lambda d: d.update(disks=[1]),
        lambda d: d.update(ports=[]),
        lambda d: d.update(newer="field"),
        lambda d: d.pop("kernel"),
        lambda d: d.update({"class": "DiskOptions"}),
        lambda d: d["engine_config"].update(cpus=b"2"),
    ],
)
def test_what_is_not_understood_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    described = told(FULL)
    change(described)
    with pytest.raises(ImageError, match="description can't be understood"):
        configured(described)
