"""What Python has found out about opcodes and odd instructions, kept from run to run.

The native translator asks Python about each opcode that it meets for the first time (`forms`) and
for each odd instruction (`recipe`). The answers are rows of native tables. They don't depend on the
guest, only on the engine's sources, the decoder, the host's features and those that the guest is
offered. So they are kept in the cache folder, in one file for each of these combinations: a second
start asks next to nothing.

A row of either kind is position-independent, and the file is the rows, one behind the other. The
vCPUs of a machine share one object; each has tables of its own, which begin with all rows known.
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from ringfence.cpu.cpuid import host_cpuid
from ringfence.engine.translate.tables import FORM_ROWS, RECIPE_BYTES, RECIPE_ROWS, Form, RawRecipe
from ringfence.native.library import prune, read_image, write_image

FORMS_MAX = FORM_ROWS // 2
RECIPES_MAX = RECIPE_ROWS // 2
KEPT_RECIPES = RECIPE_BYTES // 8
"""Bytes of recipes in the file at most, whatever a guest has executed."""
KEPT_FILES = 8
_HEADER = "<II"
"""Number of forms, bytes of recipes."""
_EXTENT_AT = RawRecipe.offset_of("extent")
_RAW_END = RawRecipe.offset_of("raw", RawRecipe.fields["raw"].count)
assert RawRecipe.offset_of("context") == 0 and RawRecipe.offset_of("raw") == 8


class Answers:
    """What any vCPU of a machine has asked already, or another machine before.

    Parameters
    ----------
    path : Path or None
        The file (see `answers_path`); None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._forms: dict[int, bytes] = {}
        self._recipes: dict[bytes, bytes] = {}
        self._kept = 0
        """How many of them came from the file."""
        if path is not None:
            self._forms, self._recipes = _read(path)
            self._kept = len(self._forms) + len(self._recipes)

    def forms(self) -> Iterable[bytes]:
        """All rows of `Form` so far."""
        return list(self._forms.values())

    def recipes(self) -> Iterable[bytes]:
        """All rows of `RawRecipe` so far, each with its pieces."""
        return list(self._recipes.values())

    def form(self, key: int, make: Callable[[], bytes]) -> bytes:
        """The row of a key, by ``make`` if nobody has asked for it yet."""
        found = self._forms.get(key)
        if found is None:
            if len(self._forms) >= FORMS_MAX:
                self._forms.clear()
            found = self._forms[key] = make()
        return found

    def recipe(self, context: int, raw: bytes, make: Callable[[], bytes]) -> bytes:
        """The row for an instruction's bytes, padded with zeros, in a context."""
        key = context.to_bytes(8, "little") + raw
        found = self._recipes.get(key)
        if found is None:
            if len(self._recipes) >= RECIPES_MAX:
                self._recipes.clear()
            found = self._recipes[key] = make()
        return found

    def save(self) -> None:
        """Keep what has become known; trouble with the file costs the next start time only."""
        if self._path is None or len(self._forms) + len(self._recipes) <= self._kept:
            return
        forms, recipes = _read(self._path)  # others may have learned meanwhile
        forms |= self._forms
        recipes |= self._recipes
        rows = b"".join(list(forms.values())[:FORMS_MAX])
        odd = bytearray()
        for row in list(recipes.values()):
            if len(odd) + len(row) <= KEPT_RECIPES:
                odd += row
        write_image(self._path, struct.pack(_HEADER, len(rows) // Form.size, len(odd)) + rows + odd)
        prune(self._path.parent, "answers-*", KEPT_FILES)
        self._kept = len(self._forms) + len(self._recipes)


def answers_path(folder: Path | None, *depends: object) -> Path | None:
    """The file in a cache folder for answers that depend on these things (by their ``repr``).

    They also depend on the sources, the decoder, and the instructions that the host has.
    """
    if folder is None:
        return None
    about = (*depends, _decoder_identity(), host_cpuid(7))
    digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return folder / f"answers-{digest.hexdigest()}.bin"


def _decoder_identity() -> tuple[int, int]:
    """Size and time of the decoder's binary, found without importing it."""
    found = importlib.util.find_spec("iced_x86")
    if found is None or found.origin is None:
        return 0, 0
    status = Path(found.origin).with_name("_iced_x86_py.abi3.so").stat()
    return status.st_size, status.st_mtime_ns


def _read(path: Path) -> tuple[dict[int, bytes], dict[bytes, bytes]]:
    """The rows of a file by their keys; none if it isn't ours, whole and unchanged."""
    forms: dict[int, bytes] = {}
    recipes: dict[bytes, bytes] = {}
    data = read_image(path)
    if data is None or len(data) < struct.calcsize(_HEADER):
        return forms, recipes
    count, size = struct.unpack_from(_HEADER, data)
    at = struct.calcsize(_HEADER)
    end = at + count * Form.size
    if len(data) != end + size:
        return forms, recipes
    for start in range(at, end, Form.size):
        row = data[start : start + Form.size]
        forms[int.from_bytes(row[:8], "little")] = row
    while len(data) - end >= RawRecipe.size:
        (length,) = struct.unpack_from("<I", data, end + _EXTENT_AT)
        if not RawRecipe.size <= length <= len(data) - end:
            break
        recipes[data[end : end + _RAW_END]] = data[end : end + length]
        end += length
    return forms, recipes
