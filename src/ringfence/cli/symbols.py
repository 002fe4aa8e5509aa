"""``ringfence symbols``: a file that tells GDB the names in a kernel, and how its stack unwinds."""

from __future__ import annotations

import json
from pathlib import Path

from ringfence.boot.bzimage import open_kernel
from ringfence.errors import HostError, UsageError
from ringfence.gdb.symbols import symbol_file
from ringfence.images.store import Store, write_atomically


def make(image: str | None, kernel: Path | None, output: Path | None, *, as_json: bool) -> None:
    """Write the file, and say what is in it."""
    if image is not None and kernel is not None:
        raise UsageError("both an image and --kernel were given: expected one of them")
    name = image or "debian"
    opened = open_kernel(kernel if kernel is not None else Store().find(name).kernel)
    data, count = symbol_file(bytes(opened.elf))
    target = output or Path(f"{kernel.name if kernel is not None else name}.symbols")
    try:
        write_atomically(target.absolute(), data)
    except OSError as error:
        raise HostError(
            f"{target} can't be written ({error.strerror or error}): choose another place with -o"
        ) from error
    if as_json:
        print(json.dumps({"file": str(target), "symbols": count, "version": opened.version}))
    else:
        print(f"{target}: {count} symbols of {opened.version or 'the kernel'}")
