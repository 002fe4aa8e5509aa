"""Certificates for both ends of a line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ringfence.state.wire import Tls

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def make_tls(folder: Path, name: str, authority: tuple[Path, Path]) -> Tls:
    key, request, certificate = (folder / f"{name}.{kind}" for kind in ("key", "csr", "pem"))
    command = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run(
        [*command, "-keyout", key, "-out", request, "-subj", f"/CN={name}"],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        ["openssl", "x509", "-req", "-in", request, "-CA", authority[0], "-CAkey", authority[1],
         "-out", certificate, "-days", "2"],
        check=True, capture_output=True,
    )  # fmt: skip
    return Tls(certificate, key, authority[0])


def make_authority(folder: Path, name: str) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-subj", f"/CN={name}", "-days", "2"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key
