"""A real pull: the host's apt gives a kernel that unpacks and loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.boot.bzimage import open_kernel
from ringfence.boot.linux import load_linux
from ringfence.errors import HostError, UsageError
from ringfence.images.debian import fetch_packages, pull_debian
from ringfence.images.initramfs import read_archive
from ringfence.images.root import build_initramfs
from ringfence.images.store import Store
from ringfence.memory.ram import GuestMemory

needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="the host has no apt")
DEPENDENCIES = {
    "cloud": {"virtio_blk": [], "virtio_net": ["failover", "net_failover"]},
    "generic": {"e1000": [], "virtio_pci": ["virtio", "virtio_ring"]},
}


@pytest.fixture(name="store", scope="module")
def store_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An empty store that the module's tests fill."""
    root = tmp_path_factory.mktemp("home")
    yield Store(root)
    shutil.rmtree(root)


@pytest.mark.apt
@needs_apt
@pytest.mark.parametrize("flavour", ["cloud", "generic"])
def test_pull(flavour: str, store: Store) -> None:
    host_lists = Path("/var/lib/apt/lists")
    before = host_lists.stat().st_mtime_ns if host_lists.exists() else 0
    stages: list[tuple[str, float]] = []
    image = pull_debian(store, flavour=flavour, progress=lambda *step: stages.append(step))
    assert (host_lists.stat().st_mtime_ns if host_lists.exists() else 0) == before
    assert list(dict.fromkeys(stage for stage, _ in stages)) == [
        "update",
        "download",
        "unpack",
        "build",
    ]
    assert all(0.0 <= fraction <= 1.0 for _, fraction in stages)
    assert image.packages[0].name.endswith(image.kernel_version)

    kernel = open_kernel(image.kernel)
    assert kernel.version.startswith(image.kernel_version)
    memory = GuestMemory(256 << 20)
    state = load_linux(memory, kernel=kernel, initrd=image.initrd, cmdline=image.cmdline)
    assert state.rip == 16 << 20
    assert memory.read(state.rip, 16) != bytes(16)
    memory.close()

    assert image.initrd is not None
    entries = {entry.path: entry for entry in read_archive(image.initrd.read_bytes())}
    assert entries["usr/bin/poweroff"].data == b"busybox"
    base = f"usr/lib/modules/{image.kernel_version}"
    lines = entries[f"{base}/modules.dep"].data.decode().splitlines()
    needs = {Path(path).stem: rest for path, _, rest in (line.partition(":") for line in lines)}
    for name, needed in DEPENDENCIES[flavour].items():
        assert all(f"/{module}.ko" in needs[name] for module in needed)
    for rest in needs.values():
        assert all(f"{base}/{path}" in entries for path in rest.split())


@pytest.mark.apt
@needs_apt
def test_pulled_images_are_kept(store: Store) -> None:
    image = pull_debian(store)
    stamp = image.kernel.stat().st_mtime_ns
    assert pull_debian(store, progress=lambda *_: pytest.fail("nothing to do")) == image
    assert store.find("debian-cloud").kernel.stat().st_mtime_ns == stamp


@pytest.mark.apt
@needs_apt
def test_packages_with_their_dependencies(store: Store, tmp_path: Path) -> None:
    fetched = fetch_packages(["hello"], tmp_path, store=store, dependencies=True)
    assert {"hello", "libc6"} <= {package.name for package in fetched}
    archive = build_initramfs(b"\x7fELF", packages=[package.path for package in fetched])
    paths = {entry.path for entry in read_archive(archive)}
    assert "usr/bin/hello" in paths
    assert any(path.endswith("/libc.so.6") for path in paths)


@pytest.mark.apt
@needs_apt
def test_unknown_package(store: Store, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no-such-package-here"):
        fetch_packages(["no-such-package-here"], tmp_path, store=store)
    with pytest.raises(HostError, match="no-such-package-here"):
        fetch_packages(["no-such-package-here"], tmp_path, store=store, dependencies=True)


@needs_apt
def test_network_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    config = tmp_path / "proxy.conf"
    config.write_text('Acquire::http::Proxy "http://127.0.0.1:9";\nAcquire::Retries "0";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    with pytest.raises(HostError, match=r"127\.0\.0\.1") as caught:
        pull_debian(Store(tmp_path / "home"))
    assert "\n" not in str(caught.value)


def test_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get was not found"):
        pull_debian(Store(tmp_path))


def test_unknown_flavour(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cloud or generic"):
        pull_debian(Store(tmp_path), flavour="tiny")
