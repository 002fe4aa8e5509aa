"""Seeds of cloud-init: what is in them, and the file system that they are found on."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from ringfence.errors import UsageError
from ringfence.storage.iso9660 import SECTOR, make_iso
from ringfence.storage.seed import LABEL, MAX_USER_DATA, Seed, SeedDisk, parse_seed

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE someone@somewhere"


def files_of(image: bytes, descriptor: int) -> dict[str, bytes]:
    """Names and contents, found by one of the two volume descriptors."""
    joliet = descriptor == 17
    at = descriptor * SECTOR
    assert image[at + 1 : at + 6] == b"CD001"
    (total,) = struct.unpack_from("<I", image, at + 80)
    assert total * SECTOR == len(image)
    place, length = struct.unpack_from("<I4xI", image, at + 156 + 2)
    found = {}
    position = place * SECTOR
    while image[position]:
        size = image[position]
        assert size % 2 == 0
        start, bytes_ = struct.unpack_from("<I4xI", image, position + 2)
        assert image[position + 6 : position + 10] == struct.pack(">I", start)
        name = image[position + 33 :][: image[position + 32]]
        if len(name) > 1:
            text = name.decode("utf-16-be" if joliet else "ascii")
            found[text] = image[start * SECTOR :][:bytes_]
        position += size
    assert position < place * SECTOR + length
    return found


def test_seed() -> None:
    seed = parse_seed(b"#!/bin/sh\n", [f"# mine\n{KEY}\n\n{KEY} 2\n"], "web-1.example")
    assert seed == Seed(b"#!/bin/sh\n", (KEY, f"{KEY} 2"), "web-1.example")
    files = seed.files()
    assert files["user-data"] == b"#!/bin/sh\n"
    meta = json.loads(files["meta-data"])
    assert meta["local-hostname"] == "web-1.example"
    assert meta["public-keys"] == [KEY, f"{KEY} 2"]
    assert meta["instance-id"] == json.loads(seed.files()["meta-data"])["instance-id"]
    others = [parse_seed(b"", hostname="a"), parse_seed(hostname="b"), parse_seed(keys=[KEY])]
    names = {json.loads(other.files()["meta-data"])["instance-id"] for other in others if other}
    assert len(names | {meta["instance-id"]}) == 4
    assert parse_seed() is None


def test_what_is_refused() -> None:
    for name in ("", "-a", "a-", "a b", "a\n", "ü", "x" * 254):
        with pytest.raises(UsageError, match="host name"):
            parse_seed(hostname=name)
    for text in ("", "# nothing\n", "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", f"{KEY}\nx"):
        with pytest.raises(UsageError, match="public SSH key"):
            parse_seed(keys=[text])
    with pytest.raises(UsageError, match="user data of"):
        parse_seed(bytes(MAX_USER_DATA + 1))


def test_file_system(tmp_path: Path) -> None:
    files = {"user-data": bytes(range(256)) * 20, "meta-data": b"{}", "network-config": b""}
    image = make_iso(LABEL, files)
    assert image == make_iso(LABEL, files)
    assert files_of(image, 17) == {f"{name};1": data for name, data in files.items()}
    assert set(files_of(image, 16)) == {"USER_DAT.;1", "META_DAT.;1", "NETWORK_.;1"}
    with pytest.raises(ValueError, match="too many"):
        make_iso(LABEL, {f"{number:08}": b"" for number in range(100)})
    blkid = shutil.which("blkid", path="/usr/sbin:/sbin:/usr/bin")
    if blkid:
        (tmp_path / "image").write_bytes(image)
        command = [blkid, "-p", "-o", "export", str(tmp_path / "image")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert {"TYPE=iso9660", f"LABEL={LABEL}"} <= set(said.split())


def test_disk() -> None:
    seed = Seed(b"#cloud-config\n", hostname="web")
    disk = SeedDisk(seed)
    image = make_iso(LABEL, seed.files())
    parts = [bytearray(512), bytearray(len(image) - 1024)]
    assert disk.size == len(image)
    disk.read(512, [memoryview(part) for part in parts])
    assert b"".join(parts) == image[512:]
    assert disk.read_now(512, [memoryview(part) for part in parts])
    disk.flush()
    for change in (
        lambda: disk.write(0, [memoryview(bytes(512))]),
        lambda: disk.discard(0, 512),
        lambda: disk.write_zeroes(0, 512),
    ):
        with pytest.raises(OSError, match="Read-only"):
            change()
    disk.close()
