"""Every program runs on every engine that the host has."""

from __future__ import annotations

from pathlib import Path

import pytest

NO_KVM = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this host has no /dev/kvm")


@pytest.fixture(params=["translate", pytest.param("kvm", marks=NO_KVM)])
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine."""
    name: str = request.param
    return name
