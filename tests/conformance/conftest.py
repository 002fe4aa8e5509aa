"""Every program runs on every engine that the host has."""

from __future__ import annotations

import pytest

from conformance.support import host_engines


@pytest.fixture(params=host_engines())
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine."""
    name: str = request.param
    return name
