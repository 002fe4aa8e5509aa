"""The root file system that all sides share, as an initramfs and as a folder on the host.

The guests unpack the initramfs; the native side enters the same files with chroot, so that all
sides run the same programs. What is built is kept in the work folder under a hash of its parts.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.workloads import Workload
from ringfence.images.debian import fetch_packages, pull_debian
from ringfence.images.initramfs import read_archive
from ringfence.images.root import build_initramfs
from ringfence.images.store import Image, Store

SOURCES = Path(__file__).parent / "guest"
CORPUS_SIZE = 8 << 20
UNNEEDED = {"debconf", "dpkg", "mailcap", "media-types", "perl-base", "tar"}
"""Packages that others depend on for their installation only."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Root:
    """A root file system: the guest's ``initrd`` and the same as ``folder`` on the host."""

    image: Image
    initrd: Path
    folder: Path
    missing: dict[str, str]
    """By name of a workload, why it can't run."""


def build(workloads: Sequence[Workload], work: Path, flavour: str, say: Say) -> Root:
    """Fetch, compile and pack what the workloads need.

    Parameters
    ----------
    workloads : sequence of Workload
        Those that will run.
    work : Path
        Where packages, programs and the results are kept.
    flavour : str
        Of Debian's kernel: "cloud" or "generic".
    say : callable
        Told what takes its time.
    """
    store = Store()
    image = store.get(f"debian-{flavour}")
    if image is None:
        say(f"fetching Debian's {flavour} kernel")
        image = pull_debian(store, flavour=flavour)
    missing: dict[str, str] = {}
    files: dict[str, bytes | Path] = {}
    for path in SOURCES.iterdir():
        if path.suffix in (".sh", ".py", ".lua"):
            files[f"/bench/{path.name}"] = path.read_bytes()
    for source in sorted({w.compiled for w in workloads if w.compiled}):
        program = compile_c(SOURCES / f"{source}.c", work)
        if isinstance(program, Path):
            files[f"/bench/{source}"] = program.read_bytes()
        else:
            missing |= {w.name: program for w in workloads if w.compiled == source}
    if any(w.data for w in workloads):
        files["/bench/corpus"] = corpus()
    names = sorted({name for w in workloads for name in w.packages})
    debs = _packages(names, store, work, say) if names else []
    busybox = image.folder / "busybox"
    digest = hashlib.blake2b(digest_size=8)
    for text in [image.kernel_version, *(deb.name for deb in debs)]:
        digest.update(text.encode() + b"\0")
    for guest_path in sorted(files):
        contents = files[guest_path]
        assert isinstance(contents, bytes)
        digest.update(guest_path.encode() + contents)
    digest.update((SOURCES / "init").read_bytes() + Path(__file__).read_bytes())
    initrd = work / f"root-{digest.hexdigest()}.cpio"
    folder = initrd.with_suffix("")
    if not initrd.exists() or not folder.exists():
        say("building the root file system")
        init = (SOURCES / "init").read_bytes()
        archive = build_initramfs(busybox, files, init, packages=debs)
        _unpack(archive, folder)
        initrd.write_bytes(archive)
    return Root(image, initrd, folder, missing)


def compile_c(source: Path, work: Path) -> Path | str:
    """A static program of one C file, or why there is none."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if compiler is None:
        return f"no C compiler on this host for {source.name}: install gcc"
    key = hashlib.blake2b(source.read_bytes(), digest_size=8).hexdigest()
    program = work / f"{source.stem}-{key}"
    if not program.exists():
        command = [compiler, "-O3", "-static", "-o", str(program), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            return f"{compiler} can't build {source.name}: {last}"
    return program


def corpus(size: int = CORPUS_SIZE) -> bytes:
    """Text that compresses about as prose does: words by Zipf's law, the same every time."""
    source = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgk"
    frequent = list(itertools.accumulate(range(22, 0, -1)))
    vocabulary = [
        "".join(source.choices(letters, k=source.randint(2, 10), cum_weights=frequent))
        for _ in range(20_000)
    ]
    zipf = list(itertools.accumulate(1 / rank for rank in range(1, len(vocabulary) + 1)))
    words = source.choices(vocabulary, k=size // 3, cum_weights=zipf)
    return "\n".join(" ".join(words[n : n + 12]) for n in range(0, len(words), 12)).encode()[:size]


def _packages(names: Sequence[str], store: Store, work: Path, say: Say) -> list[Path]:
    """The .deb files of the packages and of all that they need; kept from run to run."""
    key = hashlib.blake2b(" ".join(names).encode(), digest_size=8).hexdigest()
    listing = work / f"packages-{key}.txt"
    if listing.exists():
        debs = [Path(line) for line in listing.read_text().splitlines()]
        if all(deb.exists() for deb in debs):
            return debs
    say(f"fetching Debian packages: {', '.join(names)}")
    fetched = fetch_packages(names, work / "packages", store=store, dependencies=True)
    debs = [item.path for item in fetched if item.name not in UNNEEDED]
    listing.write_text("".join(f"{deb}\n" for deb in debs))
    return debs


def _unpack(archive: bytes, folder: Path) -> None:
    """The files of an initramfs as a folder; device nodes are left to the host's /dev."""
    shutil.rmtree(folder, ignore_errors=True)
    for entry in read_archive(archive):
        path = folder / entry.path
        if stat.S_ISDIR(entry.mode):
            path.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISLNK(entry.mode):
            path.symlink_to(entry.data.decode())
        elif stat.S_ISREG(entry.mode):
            path.write_bytes(entry.data)
            path.chmod(stat.S_IMODE(entry.mode))
