"""Machines that move: exactly one goes on, whatever happens to the line or the other side."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ringfence import Machine
from ringfence.assembly import MachineConfig, Origin
from ringfence.boot.firmware import Firmware
from ringfence.engine import EngineConfig, StopReason
from ringfence.errors import HostError, ImageError, UsageError
from ringfence.life import State
from ringfence.memory.dirty import DirtyLog
from ringfence.memory.ram import GuestMemory
from ringfence.state import images, plain, send
from ringfence.state.description import configured, describe
from ringfence.state.receive import Allowed
from ringfence.state.snapshots import description_of
from ringfence.state.wire import (
    HEADER,
    MAGIC,
    PLACE,
    PROTOCOL,
    Kind,
    Link,
    LinkError,
    MoveFailed,
    Tls,
    pack_header,
    parse_address,
    secure,
)
from state.certificates import make_authority, make_tls, needs_openssl
from state.moving import Change, Line, Target, allow, cut_at, cut_in, flip_at, guest, lives, nothing

NOWHERE = "unix:///nonexistent/socket"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    made = Target("tcp://127.0.0.1:0")
    yield made
    made.close()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "unix://{}/sock"])
@pytest.mark.parametrize("compress", [False, True])
def test_a_machine_moves(tmp_path: Path, address: str, compress: bool) -> None:
    target = Target(address.format(tmp_path))
    stages = []
    with guest() as machine:
        report = machine.migrate(
            target.address, compress=compress, progress=lambda p: stages.append(p.stage)
        )
        assert machine.state is State.ENDED
        assert machine.wait() is StopReason.MIGRATED
    assert lives(target.take())
    copied = address.startswith("tcp")
    assert bool(report.rounds) == copied
    assert [*dict.fromkeys(stages)] == [
        "connect", *(["memory"] if copied else []), "stop", "handover",
    ]  # fmt: skip
    assert 0 < report.downtime <= report.total
    target.close()
    assert not (tmp_path / "sock").exists()


def test_a_paused_machine_moves_and_a_moved_one_moves_on(tmp_path: Path) -> None:
    first, second = Target(f"unix://{tmp_path}/1"), Target(f"unix://{tmp_path}/2")
    with guest() as machine:
        machine.pause()
        machine.migrate(first.address)
    assert lives(first.take())
    first.take().migrate(second.address)
    assert first.take().outcome is StopReason.MIGRATED
    assert lives(second.take())
    first.close()
    second.close()


def test_a_guest_that_never_fits_is_held_back_and_then_stopped(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirtyLog, "count", lambda log: log.pages)
    told = []
    with guest() as machine:
        report = machine.migrate(target.address, downtime=0.0, progress=told.append)
    assert 1 < report.rounds < send.ROUNDS
    assert max(progress.held for progress in told) == send.HOLDS[-1]
    assert lives(target.take())


def test_two_hands_make_it_stand_still() -> None:
    with guest() as machine:

        def halt() -> None:
            for _ in range(100):
                with machine.keeper.standing():
                    assert machine.state is State.PAUSED

        threads = [threading.Thread(target=halt) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert lives(machine)


# ---- what goes along

ECHO = bytes.fromhex(
    "ba f8 03  b0 3e  ee"  # "start" on the serial port, which is at 0x3f8
    "ba fd 03  ec  a8 01  74 f8"  # wait for a byte
    "ba f8 03  ec  3c 72  74 03  ee  eb ed"  # echo it, but if it is an r,
    "b0 fe  e6 64  f4  eb fd"  # reset
)
JUMP = bytes.fromhex("e9 0d 00")
"""From the reset vector to the start of the ROM's last 64 KiB."""


def rom() -> Firmware:
    """Firmware that echoes what is typed, and starts anew when that is an r."""
    return Firmware(ECHO.ljust(0xFFF0, b"\0") + JUMP.ljust(16, b"\0"), b"\xff" * 4096)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "unix://{}/sock"])
def test_a_machine_with_firmware_moves_and_starts_anew(tmp_path: Path, address: str) -> None:
    allowed = Allowed(engine="translate", cache_dir=None, nvram=tmp_path / "there")
    refusing, target = Target("tcp://127.0.0.1:0"), Target(address.format(tmp_path), allowed)
    options = {"memory": "2M", "engine": "translate", "cache": False, "on_reset": "reboot"}
    with Machine(bios=rom(), nvram=tmp_path / "here", **options) as machine:  # type: ignore[arg-type]
        machine.start()
        machine.console.wait_for(">", 90)
        machine.console.send("a")
        machine.console.wait_for("a", 90)
        with pytest.raises(MoveFailed, match="--nvram"):
            machine.migrate(refusing.address)
        machine.migrate(target.address)
    moved = target.take()
    for text, answer in (("b", "b"), ("r", ">"), ("c", "c")):
        moved.console.send(text)
        moved.console.wait_for(answer, 90)
    assert (tmp_path / "there").read_bytes() == b"\xff" * 4096
    target.close()
    refusing.close()


def test_images_go_along_where_they_are_needed_again(target: Target) -> None:
    with guest(on_reset="reboot", initrd=b"an initrd") as machine:
        kernel = machine.config.kernel
        machine.migrate(target.address)
    config = target.take().config
    assert (config.kernel, config.initrd) == (kernel, b"an initrd")


def test_modules_keep_their_command_lines(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"first")
    config = MachineConfig(
        b"kernel", None, "", 4 << 20, "translate",
        on_reset="reboot", modules=(f"{tmp_path}/one quiet", (b"second", "two loud")),
    )  # fmt: skip
    carried = images.gather(config)
    assert images.announced(images.announce(carried), 17) == [
        ("kernel", 6, ""), ("module", 5, f"{tmp_path}/one quiet"), ("module", 6, "two loud"),
    ]  # fmt: skip
    arrived = images.with_images(images.without(config), carried)
    assert arrived.modules == ((b"first", f"{tmp_path}/one quiet"), (b"second", "two loud"))
    text = plain.dumps(describe(arrived))
    assert configured(plain.loads(text, "test")) == arrived


# ---- the line


@pytest.fixture(scope="module")
def length(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int]:
    """Bytes that go there and back when all is well."""
    target = Target("tcp://127.0.0.1:0")
    line = Line(tmp_path_factory.mktemp("line"), target.address)
    with guest() as machine:
        machine.migrate(line.address)
    target.take()
    target.close()
    line.close()
    return line.carried[0], line.carried[1]


def try_with(machine: Machine, target: Target, folder: Path, forth: Change, back: Change) -> str:
    """Try to move over a bad line; the error."""
    target.failed.clear()
    line = Line(folder, target.address, forth, back)
    with pytest.raises(MoveFailed) as caught:
        machine.migrate(line.address)
    line.close()
    assert target.failed.wait(60)
    assert target.machine is None
    return str(caught.value)


SHARES = (0.0, 0.0001, 0.001, 0.002, 0.003, 0.01, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999)


def test_the_line_is_cut_anywhere(target: Target, tmp_path: Path, length: tuple[int, int]) -> None:
    forth, back = length
    at_the_end = [forth - HEADER.size - 2 - n for n in (1, 20, 200, 3000, 6000)]
    with guest() as machine:
        for position in sorted({*(int(share * forth) for share in SHARES), *at_the_end}):
            error = try_with(machine, target, tmp_path, cut_at(position), nothing)
            assert "goes on here" in error, position
            assert lives(machine)
        for position in range(0, back - HEADER.size - 2, 9):
            # Cut on the way back, too: ACCEPT and RESTORED get lost.
            error = try_with(machine, target, tmp_path, nothing, cut_at(position))
            assert "goes on here" in error, position
        assert lives(machine)
        machine.migrate(target.address)
    assert lives(target.take())


def test_bits_flip_anywhere(
    target: Target, tmp_path: Path, length: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    forth, back = length
    positions = {int(share * forth) for share in SHARES} | {0, 4, 5, 8, 11, 12, 15, forth - 1000}
    with guest() as machine:
        with monkeypatch.context() as patch:
            # A longer length has both sides wait for each other.
            patch.setattr("ringfence.state.wire.Link.__init__.__defaults__", (1.0,))
            for position in sorted(positions):
                error = try_with(machine, target, tmp_path, flip_at(position), nothing)
                assert "goes on here" in error, position
            for position in range(0, back - HEADER.size - 2, 7):
                error = try_with(machine, target, tmp_path, nothing, flip_at(position))
                assert "goes on here" in error, position
        assert lives(machine)
        machine.migrate(target.address)
    assert lives(target.take())


def test_the_answer_is_lost_but_the_target_can_be_asked(
    target: Target, tmp_path: Path, length: tuple[int, int]
) -> None:
    line = Line(tmp_path, target.address, nothing, cut_in(Kind.RUNNING))
    with guest() as machine:
        machine.migrate(line.address)
        assert machine.outcome is StopReason.MIGRATED
    assert lives(target.take())
    line.close()


def test_go_is_lost_and_the_target_says_so(
    target: Target, tmp_path: Path, length: tuple[int, int]
) -> None:
    line = Line(tmp_path, target.address, cut_in(Kind.GO), nothing)
    with guest() as machine:
        with pytest.raises(MoveFailed, match="goes on here"):
            machine.migrate(line.address)
        assert lives(machine)
    assert target.machine is None
    line.close()


def test_nobody_can_be_asked(
    tmp_path: Path, length: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.state.send.ASK_AGAIN", 0.3)
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    target = Target("tcp://127.0.0.1:0", allow(disk))
    line = Line(tmp_path, target.address, nothing, cut_in(Kind.RUNNING), once=True)
    with guest(disks=[disk]) as machine:
        with pytest.raises(MoveFailed, match=r"is unknown.*stays paused here"):
            machine.migrate(line.address)
        assert machine.state is State.PAUSED
        assert lives(target.take())
        with pytest.raises(HostError, match="in use by another machine"):
            machine.resume()
        target.close()
        machine.resume()
        assert lives(machine)
    line.close()


def test_the_other_side_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringfence.state.wire.Link.__init__.__defaults__", (0.3,))
    listener = socket.create_server(("127.0.0.1", 0))
    with guest() as machine:
        with pytest.raises(MoveFailed, match=r"silent for 0.3 s; it goes on here"):
            machine.migrate(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        assert lives(machine)
        with pytest.raises(MoveFailed, match="nobody is at"):
            machine.migrate(NOWHERE)
        assert lives(machine)
    listener.close()


# ---- what can't be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "socket:{}/net"}, "--net"),
        ({"vsock": "{}/vsock"}, "--vsock"),
    ],
)
def test_what_the_target_does_not_allow(
    target: Target, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    options = {name: value.format(tmp_path) for name, value in options.items()}
    with guest(**options) as machine:
        with pytest.raises(MoveFailed, match=message):
            machine.migrate(target.address)
        assert lives(machine)


def test_disks_have_to_be_named_and_go_along(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    refusing = Target("tcp://127.0.0.1:0")
    allowing = Target("tcp://127.0.0.1:0", allow(disk))
    with guest(disks=[disk]) as machine:
        with pytest.raises(MoveFailed, match=r"disk\.img.*not allowed to open: name it"):
            machine.migrate(refusing.address)
        assert lives(machine)
        machine.migrate(allowing.address)
    assert lives(allowing.take())
    with pytest.raises(HostError, match="in use"):
        Machine(image="builtin", engine="translate", cache=False, disks=[disk])
    refusing.close()
    allowing.close()


def test_changes_that_nobody_else_sees_stay(tmp_path: Path, target: Target) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    with guest(disks=[f"{disk},snapshot"]) as machine:
        with pytest.raises(UsageError, match="--mirror"):
            machine.migrate(target.address)
        assert lives(machine)


def test_features_that_the_target_lacks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringfence.cpu import cpuid

    real = cpuid.build_cpuid

    def lacking(*given: object, **options: object) -> object:
        options["only"] = cpuid.offered(real(cpuid.host_cpuid)) - {"AES", "MOVBE"}
        return real(*given, **options)  # type: ignore[arg-type]

    with guest() as machine:
        monkeypatch.setattr("ringfence.state.receive.cpuid.build_cpuid", lacking)
        with pytest.raises(MoveFailed, match=r"lacks: AES, MOVBE; it goes on here"):
            machine.migrate(target.address)
        assert lives(machine)


def test_two_at_once(tmp_path: Path, target: Target) -> None:
    with guest() as machine:
        refused = []

        def meanwhile(progress: object) -> None:
            if not refused:
                with pytest.raises(UsageError, match="under way"):
                    machine.snapshot(tmp_path / "one")
                refused.append(progress)

        machine.migrate(target.address, progress=meanwhile)
        assert refused
    assert lives(target.take())


# ---- forged messages


def hello(described: Mapping[str, object] = {}, **changes: object) -> dict[str, object]:
    """What a sender says of the built-in guest, and changes of its description."""
    machine = describe(MachineConfig(b"", None, "", 4 << 20, "translate", EngineConfig()))
    changes = {"machine": {**machine, **described}, **changes}
    message = {"protocol": PROTOCOL, "token": "t", "handover": False, "images": []}
    return {**message, **changes}


def packed(kind: int, data: bytes, encoding: int = 0) -> bytes:
    return pack_header(kind, data, encoding) + data


@pytest.mark.parametrize(
    "message",
    [
        hello(protocol=99),
        hello(machine=None),
        hello(machine={"class": "MachineConfig"}),
        hello(images=None),
        hello(images=[7]),
        hello(images=[{"name": "kernel", "size": 0, "text": ""}]),
        hello(images=[{"name": "kernel", "size": (20 << 20) + 1, "text": ""}]),
        hello(images=[{"name": "password", "size": 1, "text": ""}]),
        hello(images=[{"name": "module", "size": 1, "text": 1}]),
        {},
    ],
)
def test_who_is_refused_at_once(target: Target, message: dict[str, object]) -> None:
    link = Link(parse_address(target.address).connect(60))
    link.send(Kind.HELLO, message)
    with pytest.raises(MoveFailed):
        link.receive(Kind.ACCEPT)
    link.close()
    assert target.failed.wait(60)


def test_a_machine_that_can_t_be_made(target: Target) -> None:
    link = Link(parse_address(target.address).connect(60))
    link.send(Kind.HELLO, hello({"generation": b"short"}))
    link.receive(Kind.ACCEPT)
    with pytest.raises(MoveFailed, match="expected 16"):
        link.receive(Kind.READY)
    link.close()
    assert target.failed.wait(60)


@pytest.mark.parametrize(
    "raw",
    [
        packed(Kind.PAGES, b""),
        packed(Kind.PAGES, PLACE.pack(0, 1)),
        packed(Kind.PAGES, PLACE.pack(0, 1) + bytes(4095)),
        packed(Kind.PAGES, PLACE.pack(1 << 60, 1) + bytes(4096)),
        packed(Kind.PAGES, PLACE.pack(1024, 1) + bytes(4096)),
        packed(Kind.PAGES, PLACE.pack(1023, 2) + bytes(8192)),
        packed(Kind.PAGES, PLACE.pack(0, 0)),
        packed(Kind.PAGES, PLACE.pack(0, 1) + bytes(4096), encoding=7),
        packed(Kind.PAGES, PLACE.pack(0, 1) + b"\xff" * 50, encoding=1),
        packed(Kind.PAGES, PLACE.pack(0, 256) + b"\x1f\0\0" + b"\xff" * 50, encoding=1),
        packed(Kind.ZEROES, PLACE.pack(0, 1)[:-1]),
        packed(Kind.ZEROES, PLACE.pack(1000, 25)),
        packed(Kind.ZEROES, PLACE.pack(0, 0)),
        packed(Kind.STATE, b"{}"),
        packed(Kind.STATE, b"[]"),
        packed(Kind.STATE, b"noise"),
        packed(Kind.STATE, plain.dumps({"version": 1, "engine": {}, "time": {}, "board": {}})),
        packed(Kind.GO, b"{}"),
        packed(77, b""),
        HEADER.pack(b"HTTP", 3, 0, 0, 0, 0),
        HEADER.pack(MAGIC, Kind.PAGES, 0, 0, 0xFFFFFFFF, 0),
        HEADER.pack(MAGIC, Kind.STATE, 0, 0, 65 << 20, 0),
        HEADER.pack(MAGIC, Kind.GO, 0, 0, 1 << 20, 0),
        struct.pack("<Q", 0),
    ],
)
def test_noise_behind_a_good_beginning(target: Target, raw: bytes) -> None:
    link = Link(parse_address(target.address).connect(60), 60)
    link.send(Kind.HELLO, hello())
    link.receive(Kind.ACCEPT)
    link.receive(Kind.READY)
    link._socket.sendall(raw)
    link._socket.shutdown(socket.SHUT_WR)
    with pytest.raises(HostError):
        link.receive(Kind.RESTORED)
    link.close()
    assert target.failed.wait(60)
    assert target.machine is None


@pytest.mark.parametrize(
    "raw",
    [
        packed(Kind.IMAGE, b""),
        packed(Kind.IMAGE, b"12345"),
        packed(Kind.IMAGE, b"1234"),  # a ROM of four bytes
        packed(Kind.STATE, b"{}"),
    ],
)
def test_images_that_are_none(target: Target, raw: bytes) -> None:
    link = Link(parse_address(target.address).connect(60), 60)
    link.send(Kind.HELLO, hello(images=[{"name": "firmware", "size": 4, "text": ""}]))
    link.receive(Kind.ACCEPT)
    link._socket.sendall(raw)
    with pytest.raises(HostError):
        link.receive(Kind.READY)
    link.close()
    assert target.failed.wait(60)


def test_a_state_with_anything_missing_is_refused(tmp_path: Path) -> None:
    with guest() as machine:
        machine.pause()
        parts = machine.still_parts()
        config = configured(
            plain.loads(plain.dumps(describe(description_of(machine.config, parts))), "test")
        )
        text = plain.dumps(parts.save())

    def spoil(data: object, path: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
        if isinstance(data, dict):
            for key, value in data.items():
                yield (*path, key)
                yield from spoil(value, (*path, key))
        elif isinstance(data, list) and data:
            yield from spoil(data[0], (*path, 0))

    places = list(spoil(plain.loads(text, "state"), ()))
    assert len(places) > 200
    refused = 0
    for place in places[::12]:
        state = plain.loads(text, "state")
        inner = state
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = {"not": ["what", "was", "expected"]}
        memory = GuestMemory(config.memory)
        try:
            Machine.resumed(config, Origin(memory, state)).close()
        except ImageError:
            refused += 1
        memory.close()
    assert refused > 0.9 * len(places[::12])


@pytest.mark.parametrize(
    "text", ["", "tcp://", "tcp://host", "tcp://host:x", "tcp://host:99999", "unix://", "ftp://a:1"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        parse_address(text)


# ---- TLS


@needs_openssl
def test_tls_lets_only_the_trusted_in(tmp_path: Path) -> None:
    ours, theirs = make_authority(tmp_path, "ours"), make_authority(tmp_path, "theirs")
    target = Target("tcp://127.0.0.1:0", tls=make_tls(tmp_path, "target", ours))
    with guest() as machine:
        for tls in (None, make_tls(tmp_path, "stranger", theirs)):
            with pytest.raises(MoveFailed):
                machine.migrate(target.address, tls=tls)
            assert lives(machine)
        machine.migrate(target.address, tls=make_tls(tmp_path, "source", ours))
    assert lives(target.take())
    target.close()
    with pytest.raises(UsageError, match="TLS"):
        Tls(tmp_path / "none", tmp_path / "none", tmp_path / "none").context(True)


@needs_openssl
def test_frames_go_over_tls_when_the_messages_are_over(tmp_path: Path) -> None:
    """As a network's do that its guest has left: either end may wait either way."""
    ours = make_authority(tmp_path, "ours")
    near, far = socket.socketpair()
    ends: list[Link] = []
    server = threading.Thread(
        target=lambda: ends.append(Link(secure(far, make_tls(tmp_path, "one", ours).context(True))))
    )
    server.start()
    link = Link(secure(near, make_tls(tmp_path, "two", ours).context(False)))
    server.join(60)
    link.send(Kind.GO)
    ends[0].receive(Kind.GO)
    one, two = link.give_away(), ends[0].give_away()
    sent = [bytes([number % 256]) * (60_000 - number) for number in range(200)]
    got: list[bytes] = []
    waiting = list(sent)
    while len(got) < len(sent):
        while waiting and one.queue(waiting[0]):
            waiting.pop(0)
        one.flush()
        two.queue(b"back") and two.flush()
        got += two.receive()
        assert all(frame == b"back" for frame in one.receive())
    assert got == sent
    link.close()  # which is not its own any more
    one.connection.close()
    with pytest.raises(OSError):
        while True:
            two.receive()
    two.connection.close()


def test_link_errors_are_told_apart() -> None:
    near, far = socket.socketpair()
    link = Link(near, 1)
    far.close()
    with pytest.raises(LinkError, match="cut"):
        link.receive(Kind.GO)
    link.close()
