"""The image folder never shows half an image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ringfence.errors import HostError, ImageError, UsageError
from ringfence.images.store import Package, Store, default_root, write_atomically


def put(store: Store, name: str, kernel: bytes = b"kernel", initrd: bytes | None = b"rd") -> None:
    with store.filling(name) as folder:
        (folder / "vmlinuz").write_bytes(kernel)
        if initrd is not None:
            (folder / "initrd").write_bytes(initrd)
        store.write_manifest(
            folder,
            name=name,
            kernel="vmlinuz",
            initrd="initrd" if initrd is not None else None,
            cmdline="console=ttyS0",
            kernel_version="6.1.0",
            packages=(Package("linux-image", "6.1-1"),),
            extra={"flavour": "cloud"},
        )


def test_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.list_images() == []
    put(store, "b")
    put(store, "a", initrd=None)
    assert [image.name for image in store.list_images()] == ["a", "b"]
    image = store.find("b")
    assert image.kernel.read_bytes() == b"kernel"
    assert (image.kernel_size, image.initrd_size) == (6, 2)
    assert image.packages == (Package("linux-image", "6.1-1"),)
    assert (image.cmdline, image.kernel_version) == ("console=ttyS0", "6.1.0")
    assert image.extra == {"flavour": "cloud"}
    assert (store.find("a").initrd, store.find("a").initrd_size) == (None, 0)
    store.remove("a")
    assert store.get("a") is None


def test_replacing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "a", b"old")
    put(store, "a", b"newer")
    assert store.find("a").kernel.read_bytes() == b"newer"
    assert [entry.name for entry in store.images.iterdir()] == ["a"]


def test_failure_leaves_the_old_image(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "a", b"old")
    with pytest.raises(RuntimeError, match="on the way"), store.filling("a") as folder:
        (folder / "vmlinuz").write_bytes(b"half")
        assert store.find("a").kernel.read_bytes() == b"old"
        assert [image.name for image in store.list_images()] == ["a"]
        raise RuntimeError("on the way")
    assert store.find("a").kernel.read_bytes() == b"old"
    assert [entry.name for entry in store.images.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "vmlinuz").unlink(),
        lambda folder: (folder / "initrd").write_bytes(b"cut"),
    ],
)
def test_damaged_images_are_not_there(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = Store(tmp_path)
    put(store, "a")
    damage(store.images / "a")
    assert store.list_images() == []
    put(store, "a")
    assert store.find("a").name == "a"


def test_find_says_what_there_is(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UsageError, match="none yet"):
        store.find("debian")
    put(store, "debian-cloud")
    with pytest.raises(UsageError, match="did you mean 'debian-cloud'"):
        store.find("debian-clod")
    with pytest.raises(UsageError, match="among debian-cloud: pull it first"):
        store.find("zzz")


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "A", "x" * 65, "a\0"])
def test_bad_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="image's name"):
        Store(tmp_path).find(name)


def test_newer_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "a")
    path = store.images / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99}))
    assert store.list_images() == []
    with pytest.raises(ImageError, match="newer Ringfence"):
        store.find("a")


def test_unwritable_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="RINGFENCE_HOME"):
        put(Store(tmp_path / "file"), "a")


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RINGFENCE_HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_root() == tmp_path / ".local/share/ringfence"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_root() == Path("/data/ringfence")
    monkeypatch.setenv("RINGFENCE_HOME", "/elsewhere")
    assert default_root() == Path("/elsewhere")


def test_write_atomically_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"1")
    with pytest.raises(TypeError):
        write_atomically(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"1"
    assert list(tmp_path.iterdir()) == [path]
