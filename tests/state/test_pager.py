"""RAM that follows: who fills in what is missing, for whom, and with what."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ringfence.errors import HostError, UsageError
from ringfence.memory.dirty import PAGE, Run
from ringfence.memory.missing import Userfault
from ringfence.memory.ram import GuestMemory
from ringfence.state import arrival
from ringfence.state.remainder import Remainder
from ringfence.state.wire import (
    PLACE,
    Address,
    Kind,
    Link,
    LinkError,
    Tls,
    pack_header,
    pack_places,
    parse_address,
    secure,
    unpack_places,
)
from state.certificates import make_authority, make_tls

PAGES = 1024
_load = ctypes.CDLL(None).memcpy
_load.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

try:
    Userfault().close()
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)


def contents(page: int) -> bytes:
    return bytes([page % 251 + 1]) * PAGE


def read(memory: GuestMemory, page: int) -> bytes:
    """A page as the guest reads it: without Python's lock."""
    data = ctypes.create_string_buffer(PAGE)
    _load(data, memory.host_base + page * PAGE, PAGE)
    return data.raw


class Target:
    """RAM some of whose pages are missing."""

    def __init__(self, folder: Path, tls: Tls | None = None, sender: Tls | None = None) -> None:
        self.address: Address = parse_address(f"unix://{folder}/socket")
        self.listener = self.address.listen()
        self.memory = GuestMemory(PAGES * PAGE)
        self.arrival = arrival.Arrival(self.memory, self.listener.fileno(), "token", tls)
        self.context = sender.context(server=False) if sender else None
        self.complete = threading.Event()

    def begin(self, *runs: Run) -> None:
        self.arrival.expect(runs)
        self.arrival.follow(self.complete.set)

    def connect(self, token: str = "token") -> Link:
        link = Link(secure(self.address.connect(20), self.context), 20)
        link.send(Kind.FOLLOW, {"token": token})
        return link

    def part(self, link: Link) -> None:
        """Hear that all is here, and answer, as a sender does."""
        while link.receive(Kind.WANT, Kind.DONE).kind is not Kind.DONE:
            pass
        link.send(Kind.DONE)
        assert self.complete.wait(20)
        link.close()

    def close(self) -> None:
        self.memory.close()
        self.listener.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tls]:
    """Of the two ends, and of somebody whom neither knows."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = make_authority(folder, "ours"), make_authority(folder, "theirs")
    made = {name: make_tls(folder, name, ours) for name in ("target", "sender")}
    return made | {"stranger": make_tls(folder, "stranger", theirs)}


@pytest.fixture(params=["plain", "TLS"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    known = request.getfixturevalue("certificates") if request.param == "TLS" else {}
    made = Target(tmp_path, known.get("target"), known.get("sender"))
    yield made
    made.close()


def test_all_of_it_comes(target: Target) -> None:
    source = GuestMemory(PAGES * PAGE)
    for page in range(0, PAGES, 2):  # the others are zeroes
        source.write(page * PAGE, contents(page))
        target.memory.write(page * PAGE, b"stale" * 100)
    target.begin(Run(2, 300), Run(600, 1), Run(1023, 1))
    assert target.memory.incomplete
    remainder = Remainder(target.address, target.context, "token", source)
    for page in (600, 299, 3, 1023):  # some wait for theirs
        assert read(target.memory, page) == bytes(source.view[page * PAGE :][:PAGE])
    assert read(target.memory, 601) == bytes(PAGE)  # not missing, never touched
    remainder.wait(lambda: None)
    assert remainder.failure is None
    assert target.complete.wait(20)
    assert not target.memory.incomplete
    for page in (*range(2, 302), 600, 1023):
        assert bytes(target.memory.view[page * PAGE :][:PAGE]) == bytes(
            source.view[page * PAGE :][:PAGE]
        )
    assert bytes(target.memory.view[:5]) == b"stale"
    source.close()


def test_what_somebody_waits_for_is_asked_for_again_on_a_new_line(target: Target) -> None:
    target.begin(Run(5, 2))
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read(target.memory, 6)))
    reader.start()
    for _ in range(2):
        link = target.connect()
        assert unpack_places(link.receive(Kind.MISSING).data, PAGES) == [Run(5, 2)]
        assert unpack_places(link.receive(Kind.WANT).data, PAGES) == [Run(6, 1)]
        link.close()
    link = target.connect()
    link.receive(Kind.MISSING)
    link.send_raw(Kind.PAGES, PLACE.pack(6, 1) + contents(6))
    reader.join(20)
    assert got == [contents(6)]
    link.send_raw(Kind.ZEROES, pack_places([Run(5, 1)]))
    target.part(link)


def test_pages_that_are_there_stay_as_they_are(target: Target) -> None:
    target.memory.write(0, b"here")
    target.begin(Run(1, 1))
    link = target.connect()
    link.receive(Kind.MISSING)
    link.send_raw(Kind.PAGES, PLACE.pack(0, 2) + contents(8) * 2)
    target.part(link)
    assert bytes(target.memory.view[:4]) == b"here"
    assert bytes(target.memory.view[PAGE : 2 * PAGE]) == contents(8)


@pytest.mark.parametrize(
    "noise",
    [
        b"noise" * 10,
        PLACE.pack(PAGES, 1) + bytes(PAGE),
        PLACE.pack(0, 1) + bytes(7),
        b"",
    ],
)
def test_strangers_and_noise(target: Target, noise: bytes) -> None:
    target.begin(Run(1, 1))
    stranger = target.connect("another")
    with pytest.raises(LinkError):
        stranger.receive(Kind.MISSING)
    stranger.close()
    with socket.socket(socket.AF_UNIX) as mute:
        mute.connect(target.address.place)
    link = target.connect()
    link.receive(Kind.MISSING)
    link.send_raw(Kind.PAGES, noise)
    with pytest.raises(LinkError):
        link.receive(Kind.DONE)
    link.close()
    asking = Link(secure(target.address.connect(20), target.context), 20)
    asking.send(Kind.QUERY, {"token": "token"})
    assert asking.receive(Kind.ANSWER).content() == {"fate": "running"}
    asking.close()
    link = target.connect()
    link.receive(Kind.MISSING)
    link.send_raw(Kind.ZEROES, pack_places([Run(1, 1)]))
    target.part(link)


def test_the_last_word_is_lost(target: Target) -> None:
    """The sender comes back until it has heard it; the machine doesn't wait for that."""
    target.begin(Run(1, 1))
    link = target.connect()
    link.receive(Kind.MISSING)
    for number in range(100):  # more than is needed is on its way when all is there
        link.send_raw(Kind.PAGES, PLACE.pack(1, 1) + contents(number))
    link.receive(Kind.DONE)
    link.close()
    assert bytes(target.memory.view[PAGE : 2 * PAGE]) == contents(0)
    link = target.connect()
    assert link.receive(Kind.MISSING).data == b""
    link.receive(Kind.DONE)
    link.close()
    asking = Link(secure(target.address.connect(20), target.context), 20)
    asking.send(Kind.QUERY, {"token": "token"})
    assert asking.receive(Kind.ANSWER).content() == {"fate": "running"}
    asking.close()
    while target.memory.incomplete:
        time.sleep(0.01)
    assert not target.complete.is_set()
    source = GuestMemory(PAGES * PAGE)
    remainder = Remainder(target.address, target.context, "token", source)
    remainder.wait(lambda: None)
    assert remainder.failure is None
    assert remainder.sent == 0
    assert target.complete.wait(20)
    source.close()


def test_a_machine_that_has_ended_since(target: Target) -> None:
    """Its sender hears nevertheless that all of RAM was there."""
    target.begin(Run(1, 1))
    link = target.connect()
    link.receive(Kind.MISSING)
    link.send_raw(Kind.ZEROES, pack_places([Run(1, 1)]))
    link.receive(Kind.DONE)
    link.close()
    target.memory.close()
    link = target.connect()
    link.receive(Kind.MISSING)
    target.part(link)


def test_a_machine_that_ends_before(target: Target) -> None:
    target.begin(Run(1, 1))
    process = target.arrival._process
    target.memory.close()
    assert process.wait(20) == -signal.SIGTERM


def test_only_the_trusted_follow(tmp_path: Path, certificates: dict[str, Tls]) -> None:
    """Who has no certificate of ours gets no pages in, and the right sender still does."""
    target = Target(tmp_path, certificates["target"], certificates["sender"])
    target.begin(Run(1, 1))
    trusting = replace(certificates["stranger"], authority=certificates["target"].authority)
    for stranger in (None, trusting.context(server=False)):
        link = Link(secure(target.address.connect(20), stranger), 20)
        with pytest.raises(LinkError):
            link.send(Kind.FOLLOW, {"token": "token"})
            link.receive(Kind.MISSING)
        link.close()
    source = GuestMemory(PAGES * PAGE)
    source.write(PAGE, contents(1))
    remainder = Remainder(target.address, target.context, "token", source)
    remainder.wait(lambda: None)
    assert remainder.failure is None
    assert target.complete.wait(20)
    assert bytes(target.memory.view[PAGE : 2 * PAGE]) == contents(1)
    source.close()
    target.close()


def test_pages_go_to_the_trusted_only(
    tmp_path: Path, certificates: dict[str, Tls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever answers where the target was is not believed without its certificate."""
    monkeypatch.setattr("ringfence.state.remainder.PATIENCE", 0.5)
    target = Target(tmp_path, certificates["stranger"], None)
    target.begin(Run(1, 1))
    source = GuestMemory(PAGES * PAGE)
    context = certificates["sender"].context(server=False)
    remainder = Remainder(target.address, context, "token", source)
    remainder.wait(lambda: None)
    assert "certificate" in str(remainder.failure)
    assert not remainder.sent
    source.close()
    target.close()


def test_messages_that_come_in_one_record(tmp_path: Path, certificates: dict[str, Tls]) -> None:
    """What TLS has unpacked already is heard of, although the socket is silent."""
    target = Target(tmp_path, certificates["target"], certificates["sender"])
    target.begin(Run(1, 2))
    connected = secure(target.address.connect(20), target.context)
    link = Link(connected, 20)
    link.send(Kind.FOLLOW, {"token": "token"})
    link.receive(Kind.MISSING)
    connected.sendall(
        b"".join(
            pack_header(Kind.ZEROES, place) + place
            for place in (pack_places([Run(1, 1)]), pack_places([Run(2, 1)]))
        )
    )
    target.part(link)
    target.close()


def test_keys_with_a_passphrase_are_refused(tmp_path: Path, certificates: dict[str, Tls]) -> None:
    known, locked = certificates["target"], tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-in", known.key, "-aes128", "-passout", "pass:secret", "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(UsageError, match="passphrase"):
        Tls(known.certificate, locked, known.authority).context(server=True)


@pytest.fixture(params=["any", "user only"])
def lonely(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Target]:
    """Pages 1 to 3 are missing, and nobody brings them yet; parameter: who may wait for them."""
    user_only = request.param == "user only"
    monkeypatch.setattr(arrival, "Userfault", partial(Userfault, user_only=user_only))
    made = Target(tmp_path)
    assert made.arrival.user_only >= user_only
    made.begin(Run(1, 3))
    yield made
    made.close()


def bring(target: Target) -> None:
    """The sender comes, and brings all that is missing."""
    link = target.connect()
    for run in unpack_places(link.receive(Kind.MISSING).data, PAGES):
        for page in range(run.first, run.first + run.count):
            link.send_raw(Kind.PAGES, PLACE.pack(page, 1) + contents(page))
    target.part(link)


def into(memory: GuestMemory, file: Path) -> bytes:
    """What a disk does that writes to its file: the kernel reads the pages."""
    file.write_bytes(b"")
    with file.open("r+b") as opened:
        os.pwritev(opened.fileno(), [memory.slice(2 * PAGE + 8, PAGE)], 0)
    return file.read_bytes()


def out_of(memory: GuestMemory, file: Path) -> bytes:
    """What a disk does that reads from its file: the kernel fills a part of them."""
    file.write_bytes(b"disk" * 100)
    with file.open("rb") as opened:
        os.preadv(opened.fileno(), [memory.slice(PAGE + 16, 400)], 0)
    return bytes(memory.view[PAGE : PAGE + 420])


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        (lambda memory, file: memory.read(PAGE + 5, 3), contents(1)[:3]),
        (into, contents(2)[8:] + contents(3)[:8]),
        (out_of, contents(1)[:16] + b"disk" * 100 + contents(1)[:4]),
    ],
    ids=["read", "disk write", "disk read"],
)
def test_others_go_on_while_somebody_waits(
    lonely: Target, tmp_path: Path, use: Callable[[GuestMemory, Path], bytes], wanted: bytes
) -> None:
    """Devices sleep without Python's lock, even where the kernel must not meet a missing page."""
    got: list[bytes] = []
    device = threading.Thread(target=lambda: got.append(use(lonely.memory, tmp_path / "file")))
    device.start()
    device.join(0.2)
    assert device.is_alive()
    bring(lonely)
    device.join(20)
    assert got == [wanted]


ORPHANED = """
import os, signal, sys
from ringfence.memory.dirty import PAGE, Run
from ringfence.memory.ram import GuestMemory
from ringfence.state.arrival import Arrival
from ringfence.state.wire import parse_address
memory = GuestMemory(1024 * PAGE)
listener = parse_address("unix://" + sys.argv[1]).listen()
arrival = Arrival(memory, listener.fileno(), "token")
arrival.expect([Run(1, 1)])
arrival.follow(lambda: None)
os.kill(arrival._process.pid, signal.SIGKILL)
memory.read(PAGE, 1)
print("which was never sent")
"""


def test_a_pager_that_is_killed(tmp_path: Path) -> None:
    """Nobody brings the missing pages any more: the machine ends, and says why."""
    ended = subprocess.run(
        [sys.executable, "-c", ORPHANED, str(tmp_path / "socket")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == -signal.SIGKILL
    assert "the machine is lost: its pager has died" in ended.stderr
    assert "never sent" not in ended.stdout
