"""Notes of messages from the local APIC: what is kept of several, and what is lost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ringfence.cpu.signals import Signal, note


def cpu(**state: int) -> SimpleNamespace:
    fields = ("nmi_pending", "nmi_blocked", "init_pending", "sipi_pending", "wait_for_sipi")
    return SimpleNamespace(**dict.fromkeys(fields, 0), sipi_vector=0, **state)


@pytest.mark.parametrize(("blocked", "sent", "kept"), [(0, 1, 1), (0, 2, 2), (0, 9, 2), (1, 9, 1)])
def test_an_nmi_in_service_and_one_more(blocked: int, sent: int, kept: int) -> None:
    """Two CPUs may send one each before the target looks; more merge (SDM vol. 3, 7.7.1)."""
    view = cpu()
    view.nmi_blocked = blocked
    assert {note(view, Signal.NMI, 0) for _ in range(sent)} == {True}
    assert view.nmi_pending == kept


def test_who_waits_for_a_sipi_hears_nothing_else() -> None:
    view = cpu()
    view.wait_for_sipi = 1
    assert not note(view, Signal.NMI, 0)
    assert not note(view, Signal.SMI, 0)
    assert note(view, Signal.SIPI, 0x9A)
    assert (view.nmi_pending, view.sipi_pending, view.sipi_vector) == (0, 1, 0x9A)


def test_a_sipi_to_a_running_cpu_is_lost_but_behind_an_init_it_is_kept() -> None:
    view = cpu()
    assert not note(view, Signal.SIPI, 1)
    assert note(view, Signal.INIT, 0)
    assert note(view, Signal.SIPI, 2)
    assert (view.init_pending, view.sipi_pending, view.sipi_vector) == (1, 1, 2)
