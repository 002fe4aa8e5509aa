"""Run a function of the native dialect in Python, one call at a time, without a compiler.

What a sensitive instruction does is written once, as ``@native`` functions. An engine that needs
one of them a few times a second (KVM asks for a memory-type register, say) should not have to load
LLVM for it. The dialect is Python's grammar with arithmetic modulo 2**64, so its source becomes
Python by cutting the result of each operation to 64 bits; structures are the same ctypes views, and
calls go to other functions made this way."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from ringfence.native.dialect import MASK64, NativeFunction


def _signed(value: int, bits: int = 64) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


ARITHMETIC: dict[str, Callable[..., int]] = {
    "slt": lambda left, right: int(_signed(left) < _signed(right)),
    "sle": lambda left, right: int(_signed(left) <= _signed(right)),
    "sar": lambda value, count: _signed(value) >> count & MASK64,
    "sext": lambda value, bits: _signed(value, bits) & MASK64,
    "mulhi": lambda left, right: left * right >> 64,
    "popcount": lambda value: value.bit_count(),
    "ctz": lambda value: (value & -value).bit_length() - 1 if value else 64,
}
"""The dialect's intrinsics that only calculate."""


class _Wrap(ast.NodeTransformer):
    """Cut every arithmetic result to 64 bits."""

    @staticmethod
    def _cut(node: ast.expr) -> ast.expr:
        return ast.BinOp(node, ast.BitAnd(), ast.Constant(MASK64))

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        return self._cut(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return node if isinstance(node.op, ast.Not) else self._cut(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        self.generic_visit(node)
        target = ast.parse(ast.unparse(node.target), mode="eval").body
        return ast.Assign([node.target], self._cut(ast.BinOp(target, node.op, node.value)))


class Interpreter:
    """Python versions of native functions.

    Parameters
    ----------
    bindings : Mapping[str, Callable]
        What stands for other intrinsics and for functions that other rooms define, by name.
    """

    def __init__(self, bindings: Mapping[str, Callable[..., int | None]]) -> None:
        self._bindings = {**ARITHMETIC, **bindings}
        self._made: dict[str, Callable[..., int]] = {}

    def function(self, native: Any) -> Callable[..., int]:
        """The Python version of a ``@native`` function; structures are passed as ctypes views."""
        assert isinstance(native, NativeFunction)
        if native.symbol not in self._made:
            self._made[native.symbol] = self._make(native)
        return self._made[native.symbol]

    def _make(self, native: NativeFunction) -> Callable[..., int]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(native.function)))
        body = tree.body[0]
        assert isinstance(body, ast.FunctionDef)
        body.decorator_list = []
        body.returns = None
        for argument in body.args.args:
            argument.annotation = None
        names = {n.id for n in ast.walk(body) if isinstance(n, ast.Name)}
        scope: dict[str, Any] = {}
        for name in names & native.function.__globals__.keys():
            value = native.function.__globals__[name]
            if name in self._bindings:
                value = self._bindings[name]
            elif isinstance(value, NativeFunction) and value.name != native.name:
                value = self.function(value)
            scope[name] = value
        code = native.function.__code__
        tree = ast.fix_missing_locations(_Wrap().visit(tree))
        ast.increment_lineno(tree, code.co_firstlineno - 1)
        exec(compile(tree, code.co_filename, "exec"), scope)
        made: Callable[..., int] = scope[native.name]
        return made
