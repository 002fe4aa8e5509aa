"""Pick kernel modules, with all that they need, for an initramfs.

A distribution's package has no ``modules.dep``; depmod writes it when the package is installed.
We read what depmod would read, each module's ``.modinfo`` section (NUL-ended "key=value" texts),
and write the two files that busybox's modprobe wants: ``modules.dep`` and ``modules.alias``.

Shape: one function from (path, contents) of all candidate modules to the files for the guest.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from ringfence.errors import ImageError
from ringfence.images.packed import open_packed

DEFAULT_MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "9pnet_virtio",
    "9p",
    "e1000",
    "button",
    "evdev",
)
"""Drivers of the devices that a machine may have, and of its power button; those that are built in
are absent."""


def module_name(path: str) -> str:
    """A module's name by its file's: "kernel/net/foo-bar.ko.xz" is "foo_bar"."""
    return PurePosixPath(path).name.split(".ko", 1)[0].replace("-", "_")


def pick_modules(
    release: str, modules: Mapping[str, bytes], wanted: Iterable[str] = DEFAULT_MODULES
) -> dict[str, bytes]:
    """Guest files for ``wanted`` modules and their dependencies.

    Parameters
    ----------
    release : str
        The kernel's release, which names the folder below /lib/modules.
    modules : mapping
        Path below that folder to contents, of every module that may be needed.
    wanted : names
        Those that don't exist are passed over: a kernel may have them built in.
    """
    by_name = {module_name(path): path for path in modules}
    information: dict[str, list[tuple[str, str]]] = {}
    contents: dict[str, bytes] = {}
    order: list[str] = []
    pending = [name for name in wanted if name in by_name]
    while pending:
        name = pending.pop()
        if name in information or name not in by_name:
            continue
        contents[name] = _unpack(by_name[name], modules[by_name[name]])
        information[name] = modinfo(contents[name])
        order.append(name)
        pending += _depends(information[name])
    base = f"usr/lib/modules/{release}"
    files: dict[str, bytes] = {}
    dep_lines: list[str] = []
    alias_lines: list[str] = []
    for name in sorted(order):
        path = _unpacked_path(by_name[name])
        files[f"{base}/{path}"] = contents[name]
        needed = _closure(name, information)
        dep_lines.append(f"{path}: {' '.join(_unpacked_path(by_name[n]) for n in needed)}".rstrip())
        alias_lines += [
            f"alias {value} {name}" for key, value in information[name] if key == "alias"
        ]
    if files:
        files[f"{base}/modules.dep"] = "".join(f"{line}\n" for line in dep_lines).encode()
        files[f"{base}/modules.alias"] = "".join(f"{line}\n" for line in alias_lines).encode()
    return files


def modinfo(module: bytes) -> list[tuple[str, str]]:
    """The (key, value) texts of a module's ``.modinfo`` section."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        section = ELFFile(io.BytesIO(module)).get_section_by_name(".modinfo")
        data: bytes = section.data() if section is not None else b""
    except ELFError as error:
        raise ImageError(
            f"a kernel module is damaged ({error}): fetch its package again"
        ) from error
    texts = (text.decode("utf-8", "replace") for text in data.split(b"\0") if text)
    return [(key, value) for key, _, value in (text.partition("=") for text in texts)]


def _depends(information: list[tuple[str, str]]) -> list[str]:
    return [
        name.replace("-", "_")
        for key, value in information
        if key == "depends"
        for name in value.split(",")
        if name
    ]


def _closure(name: str, information: Mapping[str, list[tuple[str, str]]]) -> list[str]:
    """All that a module needs; what is needed by others comes behind them, as modprobe expects."""
    found: list[str] = []

    def visit(at: str) -> None:
        for needed in _depends(information[at]):
            if needed in information:
                if needed in found:
                    found.remove(needed)
                found.append(needed)
                visit(needed)

    visit(name)
    return found


def _unpack(path: str, data: bytes) -> bytes:
    try:
        with open_packed(path, data) as stream:
            return stream.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ImageError(f"module {path} is damaged ({error}): fetch its package again") from error


def _unpacked_path(path: str) -> str:
    return path.split(".ko", 1)[0] + ".ko"
