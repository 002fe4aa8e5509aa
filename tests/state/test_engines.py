"""Machines that go from one engine to another, on this host's KVM, whatever kind it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence import Machine
from ringfence.engine.kvm.verdict import Kind, verdict
from ringfence.state.receive import Allowed
from ringfence.state.send import Progress
from ringfence.state.wire import MoveFailed
from state.moving import Target, guest, lives

if not Path("/dev/kvm").exists():
    pytest.skip("this host has no /dev/kvm", allow_module_level=True)


def target(engine: str) -> Target:
    return Target("tcp://127.0.0.1:0", Allowed(engine=engine, cache_dir=None))


def test_there_and_back() -> None:
    """A guest that was promised what KVM has goes on under translation, and the other way round."""
    machine = Machine(image="builtin", engine="kvm", memory="4M")
    machine.start()
    machine.console.wait_for("> ", 90)
    targets = []
    for engine in ("translate", "kvm", "translate"):
        targets.append(target(engine))
        machine.migrate(targets[-1].address)
        machine.close()
        machine = targets[-1].take()
        assert machine.config.engine == engine
        assert lives(machine)
    for each in targets:
        each.close()


@pytest.mark.skipif(verdict().kind is Kind.HARDWARE, reason="KVM may have all features here")
def test_what_kvm_lacks_is_said_before_ram_is_sent() -> None:
    there = target("kvm")
    told: list[Progress] = []
    with guest() as machine:
        with pytest.raises(MoveFailed, match=r"CPU features that this host or engine lacks: .*AVX"):
            machine.migrate(there.address, progress=told.append)
        assert {progress.stage for progress in told} == {"connect"}
        assert lives(machine)
    there.close()
