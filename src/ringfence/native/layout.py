"""Structures declared once, used by emitted code, compiled helpers and Python alike.

A ``Struct`` subclass lists its fields as annotations::

    class Cpu(Struct):
        gpr: Annotated[Array, u64, 16]
        rip: Annotated[int, u64]

Each field is an unsigned integer of 1, 2, 4 or 8 bytes, or an array of them, at its natural
alignment and in order. ``offset_of`` gives byte offsets to code emitters, ``at(address)`` gives
Python a live view of a structure in memory.
"""

from __future__ import annotations

import ctypes
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, get_type_hints

u8, u16, u32, u64 = 1, 2, 4, 8
_CTYPES: dict[int, Any] = {
    1: ctypes.c_uint8,
    2: ctypes.c_uint16,
    4: ctypes.c_uint32,
    8: ctypes.c_uint64,
}


class Array(Protocol):
    """What type checkers take an array field for."""

    def __getitem__(self, index: int) -> int: ...

    def __setitem__(self, index: int, value: int) -> None: ...


@dataclass(frozen=True)
class Field:
    """One field: byte ``offset``, element ``width`` in bytes, number of elements, alignment."""

    name: str
    offset: int
    width: int
    count: int

    @property
    def is_array(self) -> bool:
        """Whether the field is indexed."""
        return self.count > 0


class Struct:
    """Base of declared structures; see the module's text."""

    fields: ClassVar[dict[str, Field]] = {}
    size: ClassVar[int] = 0
    _view: ClassVar[Any] = None

    def __init_subclass__(cls, align: int = 8) -> None:
        super().__init_subclass__()
        fields = dict(cls.fields)
        at = cls.size
        own = inspect.get_annotations(cls)
        hints = get_type_hints(cls, include_extras=True)
        for name in own:
            metadata = getattr(hints[name], "__metadata__", None)
            if metadata is None:
                continue
            width = metadata[0]
            count = metadata[1] if len(metadata) > 1 else 0
            alignment = metadata[2] if len(metadata) > 2 else width
            at = -(-at // alignment) * alignment
            fields[name] = Field(name, at, width, count)
            at += width * max(count, 1)
        cls.fields = fields
        cls.size = -(-at // align) * align
        cls._view = None

    @classmethod
    def offset_of(cls, name: str, index: int = 0) -> int:
        """Byte offset of a field, or of element ``index`` of an array field."""
        field = cls.fields[name]
        return field.offset + index * field.width

    @classmethod
    def at(cls, address: int) -> Any:
        """A live ctypes view of the structure at a host address."""
        if cls._view is None:
            members = []
            at = 0
            for field in cls.fields.values():
                if field.offset > at:
                    members.append((f"_pad{at}", ctypes.c_uint8 * (field.offset - at)))
                kind = _CTYPES[field.width]
                members.append((field.name, kind * field.count if field.count else kind))
                at = field.offset + field.width * max(field.count, 1)
            cls._view = type(cls.__name__ + "View", (ctypes.Structure,), {"_fields_": members})
        return cls._view.from_address(address)

    @classmethod
    def packed(cls, **values: int | bytes) -> bytes:
        """The structure's bytes with these fields, an array's as bytes; all others are 0.

        Integers are taken modulo the field's size, as by a view.
        """
        made = bytearray(cls.size)
        for name, value in values.items():
            field = cls.fields[name]
            if isinstance(value, bytes):
                data = value
            else:
                data = (value & (1 << 8 * field.width) - 1).to_bytes(field.width, "little")
            made[field.offset : field.offset + len(data)] = data
        return bytes(made)
