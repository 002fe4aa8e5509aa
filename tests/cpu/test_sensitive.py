"""The table of sensitive instructions."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import iced_x86

import ringfence.cpu
from ringfence.cpu import sensitive


def test_sensitive_table_names_real_instructions() -> None:
    assert len(sensitive.BY_NAME) == len(sensitive.TABLE)
    for row in sensitive.TABLE:
        assert hasattr(iced_x86.Mnemonic, row.mnemonic), row.name
        assert row.control or row.behaviour, row.name
        assert not (row.privileged and row.in_user is sensitive.SILENT), row.name


def test_robin_and_irvines_seventeen_are_critical() -> None:
    """Those of the paper that 64-bit mode still has."""
    critical = {row.mnemonic for row in sensitive.critical()}
    paper = "SGDT SIDT SLDT SMSW PUSHF POPF LAR LSL VERR VERW POP PUSH CALL JMP RETF STR MOV"
    assert critical >= set(paper.split())


def test_all_effects_exist_and_link_together(build_natives: Callable[..., Any]) -> None:
    modules = [
        importlib.import_module(f"ringfence.cpu.{found.name}")
        for found in pkgutil.iter_modules(ringfence.cpu.__path__)
    ]
    library = build_natives(*modules)
    for row in sensitive.TABLE:
        for effect in row.effects:
            assert library.address(effect), effect
