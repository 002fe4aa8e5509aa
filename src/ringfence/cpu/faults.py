"""Exceptions of the virtual CPU that a device asks for, as Python exceptions."""

from __future__ import annotations


class GeneralProtection(Exception):
    """The guest's access raises #GP(0): a reserved MSR, bit or transition."""
