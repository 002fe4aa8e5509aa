"""Debian's own e1000 driver on the card: a lease, both ways of traffic, what its tools say."""

from __future__ import annotations

import hashlib
import http.server
import random
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, Shell
from ringfence import Machine
from ringfence.errors import HostError
from ringfence.images.initramfs import Archive
from ringfence.images.store import Image
from ringfence.network import slirp

try:
    slirp.library()
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.boot

SIZE = 30_000_000
"""Bytes of the file that is fetched."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def with_program(initrd: Path, program: str) -> bytes:
    """The initramfs with one of the host's programs, and its libraries, behind it."""
    archive = Archive()
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    files = re.findall(r"(?:=> )?(/\S+) \(0x", listed)
    for file in (program, *files):
        archive.add_file(
            f"usr/{file.removeprefix('/usr').lstrip('/')}", Path(file).read_bytes(), 0o755
        )
    return initrd.read_bytes() + archive.pack()


@dataclass
class Networked:
    """A machine on a user network, a shell on it, and what is around."""

    machine: Machine
    shell: Shell
    port: int
    forward: int
    capture: Path
    digest: str


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translation cache for this kernel."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def net(
    generic: Image, known: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Networked]:
    """A booted machine and an HTTP server on the host's loopback."""
    ethtool = support.require(
        shutil.which("ethtool") or shutil.which("/usr/sbin/ethtool"), "ethtool"
    )
    folder = tmp_path_factory.mktemp("served")
    data = random.Random(4).randbytes(SIZE)
    (folder / "file").write_bytes(data)
    handler = partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert generic.initrd is not None
    forward = free_port()
    capture = tmp_path_factory.mktemp("capture") / "wire.pcap"
    with Machine(
        kernel=generic.kernel,
        initrd=with_program(generic.initrd, ethtool),
        append=APPEND,
        network="user:loopback",
        nic="e1000",
        forwards=[f"{forward}:80"],
        mac="02:00:00:00:00:07",
        capture=capture,
        cache_dir=known,
    ) as machine:
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        digest = hashlib.sha256(data).hexdigest()
        yield Networked(machine, shell, server.server_port, forward, capture, digest)
    server.shutdown()
    server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def counters(shell: Shell) -> dict[str, int]:
    """What ``ethtool -S`` lists."""
    rows = re.findall(r"^\s+(\w+): (\d+)$", shell.run("ethtool -S eth0"), re.MULTILINE)
    return {name: int(value) for name, value in rows}


def test_the_lease(net: Networked) -> None:
    assert "10.0.2.15/24" in net.shell.run("ip -4 addr show dev eth0")
    assert "default via 10.0.2.2 dev eth0" in net.shell.run("ip route")
    assert net.shell.run("cat /sys/class/net/eth0/address") == "02:00:00:00:00:07\n"


def test_the_driver_is_content(net: Networked) -> None:
    said = net.shell.run("dmesg | grep -i e1000")
    assert "Link is Up 1000 Mbps Full Duplex" in said
    assert not re.search(r"fail|error|invalid|hang|timeout", said, re.IGNORECASE)
    about = net.shell.run("ethtool -i eth0")
    assert "driver: e1000\n" in about
    assert re.search(r"bus-info: 0000:00:\d\d\.0", about)
    speed = net.shell.run("ethtool eth0")
    assert "Speed: 1000Mb/s" in speed
    assert "Duplex: Full" in speed
    assert "Link detected: yes" in speed


def test_the_gateway_answers(net: Networked) -> None:
    assert "3 packets received" in net.shell.run("ping -c 3 10.0.2.2")


def test_a_file_comes_whole(net: Networked) -> None:
    before = counters(net.shell)
    said = net.shell.run(f"wget -q -O - http://10.0.2.2:{net.port}/file | sha256sum", 120)
    assert said.split()[0] == net.digest
    after = counters(net.shell)
    assert after["rx_bytes"] - before["rx_bytes"] > SIZE
    assert after["rx_csum_offload_good"] - before["rx_csum_offload_good"] >= SIZE // 1460
    assert {name for name in after if after[name] and "err" in name} == set()
    assert after["rx_csum_offload_errors"] == 0


@pytest.mark.parametrize("offload", ["on", "off"])
def test_a_file_goes_whole(net: Networked, offload: str) -> None:
    """With segmentation and checksums by the card, and without."""
    net.shell.run(f"ethtool -K eth0 tso {offload} tx {offload} rx {offload}")
    before = counters(net.shell)["tx_tcp_seg_good"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        port = server.getsockname()[1]
        net.shell.run("seq 1 2000000 > /tmp/numbers")
        net.machine.console.send(f"nc 10.0.2.2 {port} < /tmp/numbers\n")
        connection, _ = server.accept()
        got = hashlib.sha256()
        length = 0
        with connection:
            connection.settimeout(60)
            while length < 14888896:
                data = connection.recv(1 << 20)
                assert data
                length += len(data)
                got.update(data)
    text = "".join(f"{number}\n" for number in range(1, 2000001))
    assert got.hexdigest() == hashlib.sha256(text.encode()).hexdigest()
    assert (counters(net.shell)["tx_tcp_seg_good"] > before) == (offload == "on")


def test_a_forward_leads_in(net: Networked) -> None:
    net.shell.run("(echo from inside | nc -l -p 80 > /tmp/came; echo over > /tmp/over) & true")
    net.shell.run("until grep -q :0050 /proc/net/tcp /proc/net/tcp6; do sleep .05; done")
    with socket.create_connection(("127.0.0.1", net.forward), 20) as connection:
        connection.sendall(b"from outside")
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(20)
        assert connection.recv(100) == b"from inside\n"
    net.shell.run("until [ -e /tmp/over ]; do sleep .05; done")
    assert net.shell.run("cat /tmp/came") == "from outside"


def test_names_of_the_host_s_name_server(net: Networked) -> None:
    assert "nameserver 10.0.2.3" in net.shell.run("cat /etc/resolv.conf")


def test_the_driver_s_own_test(net: Networked) -> None:
    """Registers by patterns, EEPROM, interrupts, loopback: the driver tests the card."""
    said = net.shell.run("ethtool -t eth0 offline", 120)
    assert "The test result is PASS" in said, said
    assert net.shell.run("ping -c 1 -W 20 10.0.2.2 | grep -c ' 0% packet loss'") == "1\n"


def test_the_cable_can_be_pulled(net: Networked) -> None:
    card = next(each for each in net.machine._parts.board.pci.devices if hasattr(each, "set_link"))
    card.set_link(False)
    net.shell.run(
        "for i in $(seq 100); do grep -q 0 /sys/class/net/eth0/carrier && break; sleep .1; done"
    )
    assert net.shell.run("cat /sys/class/net/eth0/carrier") == "0\n"
    card.set_link(True)
    net.shell.run(
        "for i in $(seq 100); do grep -q 1 /sys/class/net/eth0/carrier && break; sleep .1; done"
    )
    assert "1 packets received" in net.shell.run("ping -c 1 -W 20 10.0.2.2")


def test_pauses_in_the_middle_of_traffic(net: Networked) -> None:
    net.machine.console.send(
        f'wget -q -O - http://10.0.2.2:{net.port}/file | sha256sum; echo "[""[done"\n'
    )
    for _ in range(20):
        net.machine.pause()
        net.machine.resume()
    assert net.digest in net.machine.console.wait_for("[[done", 120)


def test_what_was_captured(net: Networked) -> None:
    stats = net.machine.stats()["network"]
    assert stats["not_captured"] == 0
    assert stats["received_bytes"] > 2 * SIZE
    assert net.capture.stat().st_size > 3 * SIZE
    if shutil.which("tcpdump"):
        done = subprocess.run(
            ["tcpdump", "-n", "-r", net.capture, "udp port 67"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "BOOTP/DHCP, Request from 02:00:00:00:00:07" in done.stdout


def test_two_machines_on_a_wire(generic: Image, known: Path, tmp_path: Path) -> None:
    """They ping each other; the address is set by hand, as nobody gives leases there."""
    assert generic.initrd is not None
    made = [
        Machine(
            kernel=generic.kernel,
            initrd=generic.initrd,
            append=APPEND,
            memory="256M",
            network=f"socket:{tmp_path}/wire",
            nic="e1000",
            cache_dir=known,
        )
        for _ in range(2)
    ]
    try:
        shells = [Shell(machine) for machine in made]
        for machine in made:
            machine.start()
        for number, shell in enumerate(shells):
            shell.take_over()
            shell.run(f"ip addr add 10.1.1.{number}/24 dev eth0")
        assert "3 packets received" in shells[0].run("ping -c 3 -W 20 10.1.1.1")
        for shell in shells:
            shell.run("ip link set eth0 mtu 9000")
        assert "3 packets received" in shells[1].run("ping -c 3 -W 20 -s 8900 10.1.1.0")
    finally:
        for machine in made:
            machine.close()


def test_a_reboot_keeps_the_network(generic: Image, known: Path) -> None:
    with Machine(
        kernel=generic.kernel,
        initrd=generic.initrd,
        append=APPEND,
        network="user",
        nic="e1000",
        on_reset="reboot",
        cache_dir=known,
    ) as machine:
        machine.start()
        addresses = []
        for _ in range(2):
            shell = Shell(machine)
            shell.take_over()
            assert "1 packets received" in shell.run("ping -c 1 -W 20 10.0.2.2")
            addresses.append(shell.run("cat /sys/class/net/eth0/address"))
            machine.console.send("reboot -f\n")
        machine.console.wait_for("~ # ", support.BOOT)
        assert machine.stats()["machine"]["resets"] == 2
        assert addresses[0] == addresses[1]


def test_the_same_with_virtio(cloud: Image, cache: Path, net: Networked) -> None:
    """The default card, and the small kernel."""
    assert cloud.initrd is not None
    with Machine(
        kernel=cloud.kernel,
        initrd=cloud.initrd,
        append=APPEND,
        network="user:loopback",
        cache_dir=cache,
    ) as machine:
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        assert "1 packets received" in shell.run("ping -c 1 -W 20 10.0.2.2")
        said = shell.run(f"wget -q -O - http://10.0.2.2:{net.port}/file | sha256sum", 120)
        assert said.split()[0] == net.digest
