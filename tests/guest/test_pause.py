"""A machine that is paused: its time stands still, its memory and registers can be read."""

from __future__ import annotations

import hashlib
import time

import pytest

from guest.support import Shell
from ringfence import Machine

pytestmark = pytest.mark.boot

CHUNK = 16 << 20


def test_time_stands_still_while_paused(machine: Machine, shell: Shell) -> None:
    shell.run("dmesg > /tmp/before")
    began = time.monotonic()
    before = float(shell.run("cat /proc/uptime").split()[0])
    machine.pause()
    paused = time.monotonic()
    time.sleep(2)
    paused = time.monotonic() - paused
    machine.resume()
    after = float(shell.run("cat /proc/uptime").split()[0])
    elapsed = time.monotonic() - began
    assert after - before == pytest.approx(elapsed - paused, abs=0.3)
    assert after - before < 1
    # Nothing in the guest noticed.
    shell.run("dmesg | cmp - /tmp/before")


def test_pause_stops_a_sleep_in_the_middle(machine: Machine, shell: Shell) -> None:
    began = time.monotonic()
    machine.console.send('sleep 1; echo "[""[slept"\n')
    time.sleep(0.3)
    machine.pause()
    time.sleep(1.5)
    machine.resume()
    machine.console.wait_for("[[slept", 20)
    assert 2.4 < time.monotonic() - began < 3.2


def test_many_pauses_while_the_guest_works(machine: Machine, shell: Shell) -> None:
    machine.console.send('seq 1 60000 | sha256sum; echo "[""[summed"\n')
    for _ in range(40):
        machine.pause()
        machine.resume()
        time.sleep(0.005)
    said = machine.console.wait_for("[[summed", 60)
    text = "".join(f"{n}\n" for n in range(1, 60001))
    assert hashlib.sha256(text.encode()).hexdigest() in said


def test_memory_and_registers_of_a_paused_machine(machine: Machine, shell: Shell) -> None:
    secret = "a text that only this guest holds in memory: " + "x-y-z" * 3
    shell.run(f"echo '{secret}' | tr x-z A-C > /tmp/secret; sync")
    machine.pause()
    try:
        registers = machine.registers()
        assert registers["cs"] & 3 in (0, 3)
        assert registers["cr3"] & ~0xFFF < 512 << 20
        assert registers["rflags"] & 2
        assert registers["efer"] & 0x500 == 0x500
        code = machine.read_virtual(registers["rip"], 16)
        assert len(code) == 16
        assert any(code)
        wanted = secret.translate(str.maketrans("xyz", "ABC")).encode()
        found = any(
            wanted in machine.read_physical(at, min(CHUNK + 64, (512 << 20) - at))
            for at in range(0, 512 << 20, CHUNK)
        )
        assert found
        with pytest.raises(IndexError):
            machine.read_physical(512 << 20, 1)
        with pytest.raises(IndexError):
            machine.read_physical((512 << 20) - 1, 2)
        with pytest.raises(IndexError):
            machine.read_virtual(0x7FFFFFFFF000, 8)
        before = machine.stats()["exits"]
        time.sleep(0.3)
        assert machine.stats()["exits"] == before
        assert machine.registers() == registers
    finally:
        machine.resume()
    assert shell.run("echo alive") == "alive\n"


def test_memory_written_while_paused_is_seen(machine: Machine, shell: Shell) -> None:
    shell.run("echo 'before: 0123456789-needle' | tr a-z A-Z > /tmp/patched")
    machine.pause()
    try:
        hits = []
        for at in range(0, 512 << 20, CHUNK):
            data = machine.read_physical(at, min(CHUNK + 64, (512 << 20) - at))
            start = data.find(b"BEFORE: 0123456789-NEEDLE\n")
            if start >= 0:
                hits.append(at + start)
        assert hits
        for hit in hits:
            machine.write_physical(hit, b"BEHIND:")
    finally:
        machine.resume()
    assert shell.run("cat /tmp/patched") == "BEHIND: 0123456789-NEEDLE\n"


def test_the_guest_still_powers_off(machine: Machine, shell: Shell) -> None:
    machine.console.send("poweroff -f\n")
    assert machine.wait(30).value == "power-off"
