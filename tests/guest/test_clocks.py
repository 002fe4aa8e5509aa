"""A guest's clocks over pauses and moves, with a counter that has another rate than the host's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, PROGRAMS, Shell
from ringfence import Machine
from ringfence.chipset.timekeeping import PauseClock
from ringfence.cpu.tsc import host_hz
from ringfence.images.debian import Image
from ringfence.images.root import build_initramfs

pytestmark = pytest.mark.boot

HZ = 1_357_000_000


@pytest.fixture(scope="module")
def clocks(cloud: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initramfs with the program that watches clocks."""
    folder = tmp_path_factory.mktemp("clocks")
    program = support.compile_c(PROGRAMS / "clocks.c", folder / "clocks")
    target = folder / "initrd"
    target.write_bytes(build_initramfs(cloud.folder / "busybox", {"/test/clocks": program}))
    return target


KINDS = {"host's rate": (1, None), "another rate, two vCPUs": (2, HZ)}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def machine(
    request: pytest.FixtureRequest, cloud: Image, clocks: Path, cache: Path
) -> Iterator[Machine]:
    """A machine whose counter runs at some rate, at its shell."""
    cpus, hz = request.param
    with Machine(
        kernel=cloud.kernel,
        initrd=clocks,
        append=APPEND,
        engine="translate",
        cache_dir=cache,
        cpus=cpus,
        tsc_hz=hz,
    ) as made:
        made.start()
        yield made


def test_the_guest_s_counter_has_the_rate(machine: Machine, shell: Shell) -> None:
    rate = machine.config.tsc_hz or host_hz()
    said = shell.run("dmesg | grep 'tsc: Detected'")
    assert float(said.split("Detected ")[1].split()[0]) == pytest.approx(rate / 1e6, abs=0.002)


def test_clocks_are_read_without_an_exit_or_a_system_call(machine: Machine, shell: Shell) -> None:
    folder = "/sys/devices/system/clocksource/clocksource0"
    assert shell.run(f"cat {folder}/current_clocksource") == "kvm-clock\n"
    count = 300_000
    before = machine.stats()
    assert shell.run(f"/test/clocks -n {count}") == "done\n"
    after = machine.stats()
    assert after["dispatch"]["effects"] - before["dispatch"]["effects"] < count // 3
    exits = [sum(each["count"] for each in stats["exits"].values()) for stats in (before, after)]
    assert exits[1] - exits[0] < count // 30


def test_clocks_never_go_backwards(machine: Machine, shell: Shell) -> None:
    """Pauses of both kinds, and moves to another host as far as clocks see them."""
    shell.run("sh -c '/test/clocks /tmp/stop > /tmp/result &'")
    parts = machine._parts
    cpus = len(parts.engine.vcpus)
    assert parts.paravirtual is not None
    away = 0.0
    for turn in range(12):
        machine.pause()
        parts.time.policy = PauseClock.RUN if turn % 2 else PauseClock.STOP
        if turn % 3 == 2:
            time_state, services = parts.time.save(cpus), parts.paravirtual.save()
            time.sleep(0.1)
            parts.time.restore(time_state)
            parts.paravirtual.restore(services)
        if turn == 9:
            began = time.monotonic()
            time.sleep(1)
            away = time.monotonic() - began
        machine.resume()
        time.sleep(0.05)
    shell.run("touch /tmp/stop; until [ -s /tmp/result ]; do sleep 0.1; done")
    backwards, step = (int(word) for word in shell.run("cat /tmp/result").split()[1::2])
    assert backwards == 0
    assert step > away * 1e9  # the one that ran on
