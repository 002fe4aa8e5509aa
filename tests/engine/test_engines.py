"""The door to all engines: names, choice, what each says of itself."""

from __future__ import annotations

import pytest

from ringfence import engine as engines
from ringfence.engine import Capabilities
from ringfence.engine.capabilities import Mode
from ringfence.errors import UsageError


def test_names() -> None:
    assert engines.names()[:3] == ("auto", "translate", "kvm")


def test_capabilities_are_known_without_loading() -> None:
    assert engines.capabilities("translate").modes == frozenset(Mode)
    assert engines.capabilities("kvm").modes == set(Mode)
    assert engines.capabilities("kvm").dirty_log
    assert engines.capabilities("translate").dirty_log


def test_the_number_of_vcpus_depends_on_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_factories", dict(engines._factories))
    monkeypatch.setattr(engines, "_capabilities", dict(engines._capabilities))
    engines.register("four", lambda *given: None, Capabilities(vcpus=4))  # type: ignore[arg-type,return-value]
    assert engines.select("four", 4) == "four"
    for cpus in (0, 5):
        with pytest.raises(UsageError, match=f"{cpus} vCPUs .* 'four': expected 1 to 4"):
            engines.select("four", cpus)
    engines.register("one", lambda *given: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(UsageError, match=r"expected 1$"):
        engines.select("one", 2)
