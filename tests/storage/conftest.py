"""Images made by qemu-img, and its opinion of what we made of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def qemu_img() -> Callable[..., str]:
    """Run qemu-img; tests are skipped without it, and fail in CI."""
    program = shutil.which("qemu-img")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("qemu-img is missing, and in CI every test has to run")
        pytest.skip("qemu-img is missing")

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [program, *map(str, arguments)], check=True, capture_output=True, text=True
        )
        return done.stdout

    return run


@pytest.fixture
def make(qemu_img: Callable[..., str], tmp_path: Path) -> Make:
    """Make an image: name, size, then further arguments of ``qemu-img create``."""

    def create(name: str, size: int | str, *arguments: object) -> Path:
        path = tmp_path / name
        qemu_img("create", "-q", "-f", "qcow2", *arguments, path, size)
        return path

    return create


@pytest.fixture
def check(qemu_img: Callable[..., str]) -> Callable[[Path], None]:
    """Have qemu-img check an image: nothing corrupt, nothing leaked."""

    def run(path: Path) -> None:
        report = json.loads(qemu_img("check", "--output=json", path))
        assert (report.get("corruptions", 0), report.get("leaks", 0)) == (0, 0), report

    return run
