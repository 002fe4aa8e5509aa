"""A machine's life, seen by its owner; the guest is a Python function."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

import doubles
from ringfence import engine as engines
from ringfence.boot.layout import BootState
from ringfence.chipset.board import Board
from ringfence.engine import EngineConfig, StopReason
from ringfence.errors import GuestTimeout, HostError, ImageError, RingfenceError, UsageError
from ringfence.life import State
from ringfence.machine import Machine
from ringfence.memory.ram import GuestMemory
from ringfence.settings import parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("1G", 1 << 30),
        ("1GiB", 1 << 30),
        ("2gb", 2 << 30),
        ("4096k", 4 << 20),
        (" 1048576 ", 1 << 20),
        (8 << 20, 8 << 20),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "M", "-1M", "1.5G", "0", "512", "1X", "9" * 19 + "T", "2T", "1048577", -4096, "\u0661M"],
)
def test_absurd_sizes(text: int | str) -> None:
    with pytest.raises(UsageError, match="memory"):
        parse_memory(text)


def test_more_than_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringfence.settings.host_memory", lambda: 1 << 30)
    with pytest.raises(HostError, match="1024M"):
        parse_memory("2G")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 99}, "vCPUs"),
        ({"cpus": 0}, "vCPUs"),
        ({"engine": "trap"}, "not available yet"),
        ({"engine": "warp"}, "unknown engine"),
        ({"on_reset": "explode"}, "on_reset"),
        ({"image": "debian"}, "both an image and a kernel"),
        ({"memory": "lots"}, "memory"),
        ({"network": "carrier-pigeon"}, "network"),
        ({"nic": "ne2000"}, "network card"),
        ({"pause_clock": "fly"}, "pause_clock"),
        ({"mac": "02:00"}, "address"),
        ({"mac": "01:00:00:00:00:01"}, "address"),
        ({"mac": "00:00:00:00:00:00"}, "address"),
        ({"forwards": ["8080:80"]}, "--net user"),
        ({"network": "user", "forwards": ["80"]}, "forward"),
        ({"capture": "f.pcap"}, "capture"),
        ({"network": object(), "capture": "f.pcap"}, "by name"),
    ],
)
def test_what_makes_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Machine(kernel=b"never read", **options)  # type: ignore[arg-type]


class Wire:
    """A network that notes what the machine does with it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.takes_large = False
        self.large = False

    def attach(self, receive: object) -> None:
        self.calls.append("attach")

    def detach(self) -> None:
        self.calls.append("detach")

    def bring_large(self, wanted: bool) -> None:
        self.large = wanted

    def stats(self) -> dict[str, int]:
        return {"sent": 5}

    def close(self) -> None:
        self.calls.append("close")


def test_frames_come_only_while_the_guest_runs() -> None:
    wire = Wire()
    with doubles.scripted(doubles.hang, network=wire) as machine:
        assert wire.calls == ["detach"]  # the card is there, and nothing runs yet
        machine.start()
        machine.console.wait_for("ready", 10)
        assert wire.calls[1:] == ["attach"]
        machine.pause()
        assert wire.calls[1:] == ["attach", "detach"]
        machine.resume()
        while len(wire.calls) < 4:
            time.sleep(0.001)
        assert machine.stats()["network"] == {"sent": 5}
        machine.stop()
        assert wire.calls[1:] == ["attach", "detach", "attach", "detach"]
    assert wire.calls[-1] == "close"


def test_a_network_outlives_resets() -> None:
    wire = Wire()
    with doubles.scripted(doubles.reset, network=wire, on_reset="reboot") as machine:
        machine.start()
        while machine.stats()["machine"]["resets"] < 3:
            time.sleep(0.001)
        machine.stop()
        assert "close" not in wire.calls
        assert wire.calls[:7] == ["detach"] + ["attach", "detach"] * 3


def test_addresses_of_cards() -> None:
    with doubles.scripted(doubles.hello, mac="02:AB:00:00:00:01") as machine:
        assert machine.config.mac == bytes.fromhex("02ab00000001")
    made = {doubles.scripted(doubles.hello).config.mac for _ in range(3)}
    assert len(made) == 3
    assert all(mac[0] & 3 == 2 for mac in made), "unicast, locally administered"


def test_power_off() -> None:
    with doubles.scripted(doubles.hello) as machine:
        assert machine.state is State.READY
        machine.start()
        assert machine.wait(10) is StopReason.POWER_OFF
        assert machine.console.raw == b"hello\r\n\x00\xff end"
        assert machine.console.output == "hello\r\n\x00\ufffd end"
    assert machine.stats()["machine"]["outcome"] == "power-off"
    machine.close()


def test_dialogue() -> None:
    with doubles.scripted(doubles.echo) as machine:
        machine.start()
        assert machine.console.wait_for("ready\n", 10) == "ready\n"
        machine.console.send("one two ")
        assert machine.console.wait_for(re.compile(r"t\w+"), 10) == "one two"
        machine.console.send(b"two q")
        assert machine.console.wait_for(re.compile(rb"t.o"), 10) == " two"
        assert machine.wait(10) is StopReason.POWER_OFF
        with pytest.raises(RingfenceError, match=r"never wrote 'three'.*power-off"):
            machine.console.wait_for("three", 10)


def test_waiting_too_long() -> None:
    with doubles.scripted(doubles.hang) as machine:
        machine.start()
        with pytest.raises(GuestTimeout, match=r"'never' within 0\.05 s"):
            machine.console.wait_for("never", 0.05)
        with pytest.raises(GuestTimeout):
            machine.wait(0.05)
        assert machine.state is State.RUNNING
        machine.stop()
        assert machine.wait() is StopReason.STOPPED


def test_pause_look_change_resume() -> None:
    with doubles.scripted(doubles.echo) as machine:
        machine.start()
        machine.console.wait_for("ready", 10)
        with pytest.raises(UsageError, match="is running"):
            machine.registers()
        machine.pause()
        machine.pause()
        assert machine.state is State.PAUSED
        assert machine.registers()["rax"] == 7
        machine.set_registers({"rax": 8})
        assert machine.registers()["rax"] == 8
        machine.write_physical(0x2000, b"abc")
        assert machine.read_physical(0x1FFF, 5) == b"\0abc\0"
        with pytest.raises(IndexError):
            machine.read_physical((1 << 20) - 1, 2)
        machine.console.send("q")
        time.sleep(0.02)
        assert "q" not in machine.console.output
        machine.resume()
        assert machine.wait(10) is StopReason.POWER_OFF


def test_stop_while_paused_and_before_start() -> None:
    with doubles.scripted(doubles.hang) as machine:
        machine.start()
        machine.pause()
        machine.stop()
        assert machine.outcome is StopReason.STOPPED
        with pytest.raises(UsageError, match="ended"):
            machine.resume()
    with doubles.scripted(doubles.hang) as machine:
        machine.stop()
        with pytest.raises(UsageError, match="started before"):
            machine.start()


def test_crash_keeps_the_registers() -> None:
    with doubles.scripted(doubles.crash) as machine:
        machine.start()
        assert machine.wait(10) is StopReason.CRASH
        assert "rax=" in machine.crash_report


def test_a_bug_reaches_whoever_waits() -> None:
    with doubles.scripted(doubles.boom) as machine:
        machine.start()
        with pytest.raises(RuntimeError, match="a bug"):
            machine.wait(10)


def test_reset_ends_or_reboots() -> None:
    with doubles.scripted(doubles.reset) as machine:
        machine.start()
        assert machine.wait(10) is StopReason.RESET
    lives = []

    def thrice(guest: doubles.ScriptedCpu) -> doubles.Life:
        lives.append(1)
        guest.write(b"life ")
        yield
        return StopReason.RESET if len(lives) < 3 else StopReason.POWER_OFF

    with doubles.scripted(thrice, on_reset="reboot") as machine:
        machine.start()
        assert machine.wait(10) is StopReason.POWER_OFF
        assert machine.console.output == "life life life "
        assert machine.stats()["machine"]["resets"] == 2


def test_watchers_are_told_once_even_when_late() -> None:
    told = threading.Event()
    with doubles.scripted(doubles.hello) as machine:
        machine.when_ended(told.set)
        machine.start()
        assert told.wait(10)
        late: list[int] = []
        machine.when_ended(lambda: late.append(1))
        assert late == [1]


def test_output_beyond_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringfence.console.KEEP", 1000)
    with doubles.scripted(doubles.large) as machine:
        machine.start()
        machine.wait(20)
        assert machine.console.output.endswith("00001999")
        assert len(machine.console.raw) <= 1250
        assert machine.console.wait_for("00001999", 1).endswith("00001999")


class PortEngine(doubles.ScriptedCpu):
    """A scripted engine on the real board, of which it uses the ports."""

    def __init__(self, memory: GuestMemory, board: Board, config: EngineConfig) -> None:
        super().__init__(_port_program, lambda data: None)
        self.board = board
        self.memory = memory

    def set_boot_state(self, boot: BootState) -> None:
        self.values["rip"] = boot.rip


def _port_program(engine: PortEngine) -> doubles.Life:
    for byte in b"login: ":
        engine.board.port_write(0x3F8, 1, byte)
    line = b""
    while not line.endswith(b"\n"):
        if engine.board.port_read(0x3FD, 1) & 1:
            line += bytes([engine.board.port_read(0x3F8, 1)])
        yield
    for byte in line:
        engine.board.port_write(0x3F8, 1, byte)
    engine.board.port_write(0x3F8, 1, ord("!"))
    if line == b"reset\n":
        engine.board.port_write(0xCF9, 1, 6)
    engine.board.port_write(0x604, 2, 5 << 10 | 1 << 13)
    while True:
        yield


@pytest.mark.parametrize(
    ("typed", "outcome"), [("hi\n", StopReason.POWER_OFF), ("reset\n", StopReason.RESET)]
)
def test_the_whole_house_around_an_engine(typed: str, outcome: StopReason) -> None:
    """Real RAM, board, tables and boot protocol; the guest works the ports itself."""
    engines.register("ports", lambda *given: [PortEngine(*given)])
    with Machine(image="builtin", engine="ports", memory="16M") as machine:
        assert machine.read_physical(0xE0000, 8) == b"RSD PTR "
        assert machine.registers()["rip"] >= 0x100000
        machine.start()
        assert machine.console.wait_for("login: ", 10) == "login: "
        machine.pause()
        machine.resume()
        machine.console.send(typed)
        assert machine.wait(10) is outcome
        assert machine.console.output == f"login: {typed}!"


def test_disks_are_open_as_long_as_the_machine_is(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    machine = doubles.scripted(doubles.hello, disks=[disk])
    with machine, pytest.raises(HostError, match="in use"):
        doubles.scripted(doubles.hello, disks=[disk])
    doubles.scripted(doubles.hello, disks=[str(disk)]).close()
    with pytest.raises(ImageError, match="absent"):
        doubles.scripted(doubles.hello, disks=[disk, tmp_path / "absent"])
    doubles.scripted(doubles.hello, disks=[disk]).close()


def test_what_a_machine_was_made_without(tmp_path: Path) -> None:
    with doubles.scripted(doubles.hello, vsock=tmp_path / "v") as machine:
        with pytest.raises(UsageError, match="balloon"):
            machine.set_balloon("1M")
        with pytest.raises(UsageError, match="port"):
            machine.send_port("agent", b"x")
        assert (tmp_path / "v").is_socket()
    assert not (tmp_path / "v").exists()
