"""Files into a guest and out of it, by the tools that every guest has: sh, cat and tar.

What comes out of a guest may be anything. It is a tar stream, of which we make folders, regular
files and symbolic links, in and below the target and nowhere else: each folder on the way is opened
by its own name in its parent, never through a symbolic link, and a file is always a new one, put in
the place of what was there. Other kinds are passed over and named.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from ringfence.agent import wire
from ringfence.agent.client import Command
from ringfence.errors import HostError, RingfenceError, UsageError

TAKE_FILE = """\
[ -d "$1" ] && t=$1/$2 || t=$1
cat > "$t.ringfence" && [ "$(wc -c < "$t.ringfence")" -eq "$3" ] && chmod "$4" "$t.ringfence" &&
mv -f "$t.ringfence" "$t" || { rm -f "$t.ringfence"; exit 1; }
"""
"""Arguments: path, the name if that is a folder, size, mode."""
TAKE_FOLDER = '[ -d "$1" ] && t=$1/$2 || t=$1; mkdir -p "$t" && tar -x -o -f - -C "$t"'
GIVE = 'cd "$(dirname "$1")" && tar -c -f - -- "$(basename "$1")"'
_CHUNK = 1 << 16


def send(vsock: Path, source: Path, path: str, environment: Mapping[str, str]) -> None:
    """Copy a file or a folder of the host's to ``path`` in the guest.

    Raises
    ------
    UsageError
        The source can't be read, or the guest can't write there; says why.
    """
    try:
        status = source.stat()
        if stat.S_ISDIR(status.st_mode):
            arguments = [TAKE_FOLDER, "sh", path, source.resolve().name]
            with _piped(lambda file: _pack(source, file)) as reader:
                _run(vsock, arguments, environment, reader)
            return
        with source.open("rb") as file:
            mode = f"{stat.S_IMODE(status.st_mode):o}"
            arguments = [TAKE_FILE, "sh", path, source.name, str(status.st_size), mode]
            _run(vsock, arguments, environment, file.fileno())
    except OSError as error:
        raise UsageError(f"{source} can't be read: {error.strerror}") from error


def receive(vsock: Path, path: str, target: Path, environment: Mapping[str, str]) -> None:
    """Copy a file or a folder of the guest's to ``target``: into it where that is a folder.

    Raises
    ------
    UsageError
        The guest has no such file; says what it said.
    HostError
        The target can't be written.
    """
    name = Path(path).name
    if target.is_dir():
        if name in ("", ".", ".."):
            raise UsageError(f"{path!r} has no name of its own: give the copy one")
        target = target / name
    reader, writer = os.pipe()
    with ThreadPoolExecutor(1) as worker:
        unpacking = worker.submit(_unpack, reader, target)
        failed: RingfenceError | None = None
        try:
            _run(vsock, [GIVE, "sh", path], environment, None, writer)
        except BrokenPipeError:
            pass  # the unpacker says why
        except RingfenceError as refusal:
            failed = refusal
        finally:
            os.close(writer)
        error = unpacking.exception()
    if failed is not None:
        raise failed
    if isinstance(error, tarfile.TarError):
        raise HostError(f"the guest sent no tar archive of {path}: {error}") from error
    if isinstance(error, OSError):
        raise HostError(f"{target} can't be written: {error.strerror}") from error
    if error is not None:
        raise error


def _run(
    vsock: Path,
    arguments: list[str],
    environment: Mapping[str, str],
    source: int | None,
    target: int | None = None,
) -> None:
    said = bytearray()

    def complain(data: bytes) -> None:
        said.extend(data[: 4096 - len(said)])

    def take(data: bytes) -> None:
        view = memoryview(data)
        while view and target is not None:
            view = view[os.write(target, view) :]

    command = Command(vsock, wire.request(["/bin/sh", "-c", *arguments], environment))
    try:
        if command.run(source, take, complain):
            text = said.decode("utf-8", "replace").strip() or "it did not say why"
            raise UsageError(f"the guest can't copy this: {text}")
    finally:
        command.close()


@contextlib.contextmanager
def _piped(write: object) -> Iterator[int]:
    """The reading end of a pipe that a thread writes to."""
    assert callable(write)
    reader, writer = os.pipe()

    def work() -> None:
        with os.fdopen(writer, "wb") as file, contextlib.suppress(BrokenPipeError):
            write(file)

    with ThreadPoolExecutor(1) as worker:
        written = worker.submit(work)
        try:
            yield reader
        finally:
            os.close(reader)
        written.result()


def _pack(folder: Path, file: IO[bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder, ".")


def _unpack(reader: int, target: Path) -> None:
    """Make files of a tar stream: its first component becomes ``target``."""
    folder = os.open(target.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.fdopen(reader, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if ".." in parts:
                    raise HostError(f"the guest sent a path with '..': {member.name!r}")
                _make(folder, [target.name, *parts[1:]], member, tar)
    finally:
        os.close(folder)


def _make(root: int, parts: list[str], member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    with contextlib.ExitStack() as opened:
        folder = root
        for part in parts[:-1]:
            folder = os.open(
                part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder
            )
            opened.callback(os.close, folder)
        name, mode = parts[-1], member.mode & 0o777
        if member.isdir():
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, mode | 0o700, dir_fd=folder)
        elif member.isreg():
            source = tar.extractfile(member)
            assert source is not None
            _remove(name, folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(name, flags, mode, dir_fd=folder), "wb") as target:
                while data := source.read(_CHUNK):
                    target.write(data)
        elif member.issym():
            _remove(name, folder)
            os.symlink(member.linkname, name, dir_fd=folder)
        else:
            print(f"ringfence: note: {member.name} was not copied: no file", file=sys.stderr)


def _remove(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
