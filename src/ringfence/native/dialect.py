"""The dialect of Python that compiles to native code, and its compiler to LLVM IR.

Helpers that run between two guest instructions (page walker, TLB miss, exception delivery) are
written as Python functions marked ``@native``. Their bodies use a small, total subset:

* every value is an unsigned 64-bit integer; ``+ - * << >> & | ^ ~`` wrap, ``// % < <= > >=`` are
  unsigned; signed meaning is spelled out (``slt``, ``sar``, ``sext``);
* ``if``/``elif``/``else``, ``while``, ``for i in range(...)``, ``break``, ``continue``, ``return``,
  ``and``/``or``/``not``, ``in`` a tuple, conditional expressions, ``pass``;
* a parameter annotated with a ``Struct`` gives its fields: ``cpu.rip``, ``cpu.gpr[i] = v``;
* raw host memory through ``load8`` … ``load64`` and ``store8`` … ``store64``;
* ``cast(Kind, address)`` where a parameter wants a ``Struct`` and an address is at hand, or for
  a local declared so: ``row: Row = cast(Row, address)``;
* calls of other ``@native`` functions and of the intrinsics below; names of module-level integer
  constants (also through a module or class attribute) become literals, and so do calls of ordinary
  Python functions with constant arguments.

Nothing else compiles: a wrong construct is a ``DialectError`` with file and line. No runtime, no
exceptions, no allocation exist in the result, and no vector register is touched, so emitted guest
code may call it while the guest's vector state is live. Signed 64-bit and float promotion, as
general-purpose Python compilers do it for mixed integers, can't happen here.
"""

from __future__ import annotations

import ast
import builtins
import functools
import linecache
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar, cast

from ringfence.native.layout import Struct

F = TypeVar("F", bound=Callable[..., Any])
MASK64 = (1 << 64) - 1


class DialectError(Exception):
    """A ``@native`` function uses something that the dialect lacks."""


class NativeFunction:
    """A function of the dialect: its Python source, waiting for the compiler."""

    def __init__(self, function: Callable[..., Any], *, inline: bool, external: bool) -> None:
        self.function = function
        self.name = function.__name__
        self.inline = inline
        self.external = external
        # Inlined helpers are private to their module; all others link by their plain name.
        self.symbol = f"{function.__module__}.{self.name}" if inline else self.name
        self.__doc__ = function.__doc__

    def __call__(self, *args: int) -> int:
        raise DialectError(f"{self.name} is native code: call it through a compiled library")

    @property
    def tree(self) -> ast.FunctionDef:
        """The function's syntax tree; line numbers are the file's."""
        code = self.function.__code__
        return _functions(code.co_filename)[code.co_firstlineno]


@functools.cache
def _functions(path: str) -> dict[int, ast.FunctionDef]:
    """All functions of a source file by their first line, which is that of their decorator."""
    tree = ast.parse("".join(linecache.getlines(path)))
    return {
        (node.decorator_list[0] if node.decorator_list else node).lineno: node
        for node in _statements(tree.body)
        if isinstance(node, ast.FunctionDef)
    }


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, and those inside of them."""
    for node in body:
        yield node
        yield from _statements(getattr(node, "body", ()))
        yield from _statements(getattr(node, "orelse", ()))


def native(function: F) -> F:
    """Mark a function as part of the dialect."""
    return NativeFunction(function, inline=False, external=False)  # type: ignore[return-value]


def native_inline(function: F) -> F:
    """Mark a small function of the dialect to be inlined wherever it is called."""
    return NativeFunction(function, inline=True, external=False)  # type: ignore[return-value]


def external(function: F) -> F:
    """Declare a function that another room defines under the same name (linked by name)."""
    return NativeFunction(function, inline=False, external=True)  # type: ignore[return-value]


# Intrinsics: name -> number of arguments. Bodies are below, in _Compiler.intrinsic.
def _stub(*_: Any) -> int:
    raise DialectError("an intrinsic of the native dialect was called from Python")


load8 = load16 = load32 = load64 = _stub
store8 = store16 = store32 = store64 = _stub
slt = sle = sar = sext = mulhi = popcount = ctz = _stub
atomic_cas64 = atomic_cas32 = atomic_or64 = atomic_and64 = _stub
rdtsc = rep_movsb = rep_stosb = address_of = sched_yield = _stub

_BINARY = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.FloorDiv: "udiv",
    ast.Mod: "urem",
}
_FOLD: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_COMPARE = {
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "ult",
    ast.LtE: "ule",
    ast.Gt: "ugt",
    ast.GtE: "uge",
}
_ATTRIBUTES = '"no-builtins" nounwind noimplicitfloat "target-features"="{features}"'
NO_VECTOR = "-x87,-mmx,-sse,-sse2,-sse3,-ssse3,-sse4.1,-sse4.2,-avx,-avx2,-avx512f"


class _NotConstant(Exception):
    """An expression depends on what is known at run time only."""


class _Function:
    """Compiles one function's body to LLVM IR text."""

    def __init__(self, unit: Unit, target: NativeFunction) -> None:
        self.unit = unit
        self.target = target
        self.lines: list[str] = []
        self.counter = 0
        self.locals: set[str] = set()
        self.structs: dict[str, type[Struct]] = {}
        self.loops: list[tuple[str, str]] = []
        self.terminated = False
        self.scope: dict[str, Any] = target.function.__globals__

    def error(self, node: ast.AST, message: str) -> DialectError:
        code = self.target.function.__code__
        line = getattr(node, "lineno", code.co_firstlineno)
        return DialectError(f"{code.co_filename}:{line}: {self.target.name}: {message}")

    def fresh(self, stem: str = "t") -> str:
        self.counter += 1
        return f"{stem}{self.counter}"

    def emit(self, text: str) -> None:
        if not self.terminated:
            self.lines.append("  " + text)

    def value(self, text: str) -> str:
        name = "%" + self.fresh()
        self.emit(f"{name} = {text}")
        return name

    def label(self, name: str) -> None:
        if not self.terminated:
            self.lines.append(f"  br label %{name}")
        self.lines.append(f"{name}:")
        self.terminated = False

    def branch(self, name: str) -> None:
        self.emit(f"br label %{name}")
        self.terminated = True

    def compile(self) -> str:
        tree = self.target.tree
        parameters = [a.arg for a in tree.args.args]
        hints = self.target.function.__annotations__
        for name in parameters:
            self.declare(name, hints.get(name))
        names = set(self.target.function.__code__.co_varnames)
        for node in _statements(tree.body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.declare(node.target.id, ast.unparse(node.annotation))
        self.locals = names
        signature = ", ".join(f"i64 %arg.{p}" for p in parameters)
        linkage = "internal " if self.target.inline else ""
        inline = "alwaysinline " if self.target.inline else ""
        head = f"define {linkage}i64 @{self.target.symbol}({signature}) {inline}#0 {{"
        for name in sorted(names):
            self.lines.append(f"  %v.{name} = alloca i64")
            initial = f"%arg.{name}" if name in parameters else "0"
            self.lines.append(f"  store i64 {initial}, ptr %v.{name}")
        self.body(tree.body)
        if not self.terminated:
            self.lines.append("  ret i64 0")
        return "\n".join([head, "entry:", *self.lines, "}"])

    def declare(self, name: str, hint: Any) -> None:
        """Note a parameter or local that points at a structure."""
        if isinstance(hint, str):
            hint = self.scope.get(hint)
        if isinstance(hint, type) and issubclass(hint, Struct):
            self.structs[name] = hint

    def body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if self.terminated:
                return
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Expr):
            if not isinstance(node.value, ast.Constant):
                self.expression(node.value)
        elif isinstance(node, ast.Assign):
            if len(node.targets) != 1:
                raise self.error(node, "one assignment target, please")
            self.assign(node.targets[0], self.expression(node.value))
        elif isinstance(node, ast.AugAssign):
            load = ast.copy_location(_as_load(node.target), node)
            result = ast.copy_location(ast.BinOp(load, node.op, node.value), node)
            self.assign(node.target, self.expression(result))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.expression(node.value))
        elif isinstance(node, ast.Return):
            value = self.expression(node.value) if node.value is not None else "0"
            self.emit(f"ret i64 {value}")
            self.terminated = True
        elif isinstance(node, ast.If):
            then, other, end = self.fresh("then"), self.fresh("else"), self.fresh("end")
            self.condition(node.test, then, other if node.orelse else end)
            self.label(then)
            self.body(node.body)
            if not self.terminated:
                self.branch(end)
            if node.orelse:
                self.terminated = True
                self.label(other)
                self.body(node.orelse)
                if not self.terminated:
                    self.branch(end)
            self.terminated = True
            self.label(end)
        elif isinstance(node, ast.While):
            self.loop(node)
        elif isinstance(node, ast.For):
            self.count(node)
        elif isinstance(node, (ast.Break, ast.Continue)):
            if not self.loops:
                raise self.error(node, "break or continue outside a loop")
            self.branch(self.loops[-1][isinstance(node, ast.Break)])
        elif not isinstance(node, ast.Pass):
            raise self.error(node, f"{type(node).__name__} is not part of the dialect")

    def loop(self, node: ast.While) -> None:
        head, inside, end = self.fresh("head"), self.fresh("body"), self.fresh("end")
        self.label(head)
        self.condition(node.test, inside, end)
        self.label(inside)
        self.loops.append((head, end))
        self.body(node.body)
        self.loops.pop()
        if not self.terminated:
            self.branch(head)
        self.terminated = True
        self.label(end)

    def count(self, node: ast.For) -> None:
        call = node.iter
        is_range = (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == "range"
            and len(call.args) in (1, 2)
        )
        if not is_range or not isinstance(node.target, ast.Name):
            raise self.error(node, "for loops run over range(stop) or range(start, stop)")
        assert isinstance(call, ast.Call)
        start = self.expression(call.args[0]) if len(call.args) == 2 else "0"
        stop = self.expression(call.args[-1])
        name = f"%v.{node.target.id}"
        head, inside = self.fresh("head"), self.fresh("body")
        step, end = self.fresh("step"), self.fresh("end")
        self.emit(f"store i64 {start}, ptr {name}")
        self.label(head)
        now = self.value(f"load i64, ptr {name}")
        test = self.value(f"icmp ult i64 {now}, {stop}")
        self.emit(f"br i1 {test}, label %{inside}, label %{end}")
        self.terminated = True
        self.label(inside)
        self.loops.append((step, end))
        self.body(node.body)
        self.loops.pop()
        self.label(step)
        now = self.value(f"load i64, ptr {name}")
        following = self.value(f"add i64 {now}, 1")
        self.emit(f"store i64 {following}, ptr {name}")
        self.branch(head)
        self.label(end)

    def place(self, node: ast.expr) -> tuple[str, int]:
        """Pointer to a structure's field, and the field's width in bytes."""
        index = None
        if isinstance(node, ast.Subscript):
            index = self.expression(node.slice)
            node = node.value
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            raise self.error(node, "expected a field of a structure")
        struct = self.structs.get(node.value.id)
        if struct is None or node.attr not in struct.fields:
            raise self.error(node, f"{ast.unparse(node)} is not a declared field")
        field = struct.fields[node.attr]
        if field.is_array != (index is not None):
            raise self.error(node, f"{ast.unparse(node)} and its declaration differ on an index")
        base = self.value(f"load i64, ptr %v.{node.value.id}")
        at = self.value(f"add i64 {base}, {field.offset}")
        if index is not None:
            scaled = self.value(f"mul i64 {index}, {field.width}")
            at = self.value(f"add i64 {at}, {scaled}")
        return self.value(f"inttoptr i64 {at} to ptr"), field.width

    def assign(self, target: ast.expr, value: str) -> None:
        if isinstance(target, ast.Name):
            self.emit(f"store i64 {value}, ptr %v.{target.id}")
            return
        pointer, width = self.place(target)
        self.store(pointer, width, value)

    def store(self, pointer: str, width: int, value: str) -> None:
        if width < 8:
            value = self.value(f"trunc i64 {value} to i{width * 8}")
        self.emit(f"store i{width * 8} {value}, ptr {pointer}, align 1")

    def load(self, pointer: str, width: int) -> str:
        value = self.value(f"load i{width * 8}, ptr {pointer}, align 1")
        return value if width == 8 else self.value(f"zext i{width * 8} {value} to i64")

    def constant(self, node: ast.expr) -> int | None:
        """The value of an expression that is a constant integer."""
        try:
            value = self.fold(node)
        except (_NotConstant, ArithmeticError, LookupError, TypeError, ValueError):
            return None
        return value & MASK64 if isinstance(value, int) else None

    def fold(self, node: ast.expr) -> Any:
        """The value of a constant expression; `_NotConstant`, or what evaluating it raises."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id in self.locals:
                raise _NotConstant
            found = self.scope.get(node.id, self)
            return getattr(builtins, node.id, None) if found is self else found
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in self.locals:
                raise _NotConstant
            return getattr(self.fold(node.value), node.attr, None)
        if isinstance(node, ast.BinOp):
            left, right = self.fold(node.left), self.fold(node.right)
            return _FOLD[type(node.op)](left, right)
        if isinstance(node, ast.Call) and not self.is_compile_time(node.func):
            raise _NotConstant
        for inner in ast.walk(node):
            if isinstance(inner, ast.Call) and not self.is_compile_time(inner.func):
                raise _NotConstant
            if isinstance(inner, ast.Name) and inner.id in self.locals:
                raise _NotConstant
        # Our own source, evaluated while it is compiled.
        return eval(compile(ast.Expression(node), "<constant>", "eval"), self.scope)

    def is_compile_time(self, function: ast.expr) -> bool:
        """Whether a call is of an ordinary Python function, so that its result is a constant."""
        if isinstance(function, ast.Name):
            value = self.scope.get(function.id, getattr(builtins, function.id, None))
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            value = getattr(self.scope.get(function.value.id), function.attr, None)
        else:
            return False
        native = value in (_stub, cast) or isinstance(value, NativeFunction)
        return callable(value) and not native

    def expression(self, node: ast.expr) -> str:
        constant = self.constant(node)
        if constant is not None:
            return str(constant)
        if isinstance(node, ast.Name):
            if node.id in self.locals:
                return self.value(f"load i64, ptr %v.{node.id}")
            raise self.error(node, f"{node.id} is neither a local nor an integer constant")
        if isinstance(node, ast.BinOp):
            return self.binary(node)
        if isinstance(node, ast.UnaryOp):
            if isinstance(node.op, ast.Not):
                return self.truth_value(node)
            inner = self.expression(node.operand)
            if isinstance(node.op, ast.Invert):
                return self.value(f"xor i64 {inner}, -1")
            if isinstance(node.op, ast.USub):
                return self.value(f"sub i64 0, {inner}")
            raise self.error(node, "unknown operator")
        if isinstance(node, ast.Compare):
            return self.compare(node)
        if isinstance(node, ast.BoolOp):
            return self.truth_value(node)
        if isinstance(node, ast.IfExp):
            then, other, end = self.fresh("then"), self.fresh("else"), self.fresh("end")
            slot = self.slot()
            self.condition(node.test, then, other)
            self.label(then)
            self.emit(f"store i64 {self.expression(node.body)}, ptr {slot}")
            self.branch(end)
            self.label(other)
            self.emit(f"store i64 {self.expression(node.orelse)}, ptr {slot}")
            self.label(end)
            return self.value(f"load i64, ptr {slot}")
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            pointer, width = self.place(node)
            return self.load(pointer, width)
        if isinstance(node, ast.Call):
            return self.call(node)
        raise self.error(node, f"{type(node).__name__} is not part of the dialect")

    def slot(self) -> str:
        name = "%" + self.fresh("slot")
        self.lines.insert(0, f"  {name} = alloca i64")
        return name

    def truth_value(self, node: ast.expr) -> str:
        slot = self.slot()
        true, false, end = self.fresh("true"), self.fresh("false"), self.fresh("end")
        self.condition(node, true, false)
        self.label(true)
        self.emit(f"store i64 1, ptr {slot}")
        self.branch(end)
        self.label(false)
        self.emit(f"store i64 0, ptr {slot}")
        self.label(end)
        return self.value(f"load i64, ptr {slot}")

    def condition(self, node: ast.expr, true: str, false: str) -> None:
        if isinstance(node, ast.BoolOp):
            for inner in node.values[:-1]:
                following = self.fresh("next")
                if isinstance(node.op, ast.And):
                    self.condition(inner, following, false)
                else:
                    self.condition(inner, true, following)
                self.label(following)
            self.condition(node.values[-1], true, false)
            return
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.condition(node.operand, false, true)
            return
        test = self.value(f"icmp ne i64 {self.expression(node)}, 0")
        self.emit(f"br i1 {test}, label %{true}, label %{false}")
        self.terminated = True

    def compare(self, node: ast.Compare) -> str:
        if len(node.ops) != 1:
            raise self.error(node, "one comparison at a time")
        one_of = node.comparators[0]
        if isinstance(node.ops[0], (ast.In, ast.NotIn)) and isinstance(one_of, ast.Tuple):
            found = isinstance(node.ops[0], ast.In)
            tests = [
                ast.Compare(node.left, [ast.Eq() if found else ast.NotEq()], [one])
                for one in one_of.elts
            ]
            whole = ast.BoolOp(ast.Or() if found else ast.And(), list(tests))
            return self.truth_value(ast.copy_location(whole, node))
        kind = _COMPARE.get(type(node.ops[0]))
        if kind is None:
            raise self.error(node, "unknown comparison")
        left, right = self.expression(node.left), self.expression(node.comparators[0])
        test = self.value(f"icmp {kind} i64 {left}, {right}")
        return self.value(f"zext i1 {test} to i64")

    def binary(self, node: ast.BinOp) -> str:
        left, right = self.expression(node.left), self.expression(node.right)
        if isinstance(node.op, (ast.LShift, ast.RShift)):
            # Shift counts of 64 and more give 0, as in Python.
            name = "shl" if isinstance(node.op, ast.LShift) else "lshr"
            if right.isdigit():
                return self.value(f"{name} i64 {left}, {right}") if int(right) < 64 else "0"
            small = self.value(f"icmp ult i64 {right}, 64")
            count = self.value(f"and i64 {right}, 63")
            shifted = self.value(f"{name} i64 {left}, {count}")
            return self.value(f"select i1 {small}, i64 {shifted}, i64 0")
        name = _BINARY.get(type(node.op), "")
        if not name:
            raise self.error(node, "unknown operator")
        return self.value(f"{name} i64 {left}, {right}")

    def call(self, node: ast.Call) -> str:
        target = node.func
        value: Any = None
        if isinstance(target, ast.Name):
            value = self.scope.get(target.id)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            value = getattr(self.scope.get(target.value.id), target.attr, None)
        if isinstance(value, NativeFunction):
            self.unit.need(value)
            count = value.function.__code__.co_argcount
            if count != len(node.args):
                raise self.error(node, f"{value.name} takes {count} arguments")
            arguments = ", ".join(f"i64 {self.expression(a)}" for a in node.args)
            return self.value(f"call i64 @{value.symbol}({arguments})")
        name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "?")
        return self.intrinsic(node, name)

    def intrinsic(self, node: ast.Call, name: str) -> str:
        if name == "address_of":
            inner = node.args[0]
            if isinstance(inner, ast.Name) and inner.id in self.structs:
                return self.expression(inner)
            pointer, _ = self.place(inner)
            return self.value(f"ptrtoint ptr {pointer} to i64")
        if name == "cast":
            return self.expression(node.args[1])
        values = [self.expression(a) for a in node.args]
        if name.startswith("load") and name[4:].isdigit():
            pointer = self.value(f"inttoptr i64 {values[0]} to ptr")
            return self.load(pointer, int(name[4:]) // 8)
        if name.startswith("store") and name[5:].isdigit():
            pointer = self.value(f"inttoptr i64 {values[0]} to ptr")
            self.store(pointer, int(name[5:]) // 8, values[1])
            return "0"
        if name in ("slt", "sle"):
            test = self.value(f"icmp {name} i64 {values[0]}, {values[1]}")
            return self.value(f"zext i1 {test} to i64")
        if name == "sar":
            return self.value(f"ashr i64 {values[0]}, {values[1]}")
        if name == "sext":
            bits = values[1]
            narrow = self.value(f"trunc i64 {values[0]} to i{bits}")
            return self.value(f"sext i{bits} {narrow} to i64")
        if name == "mulhi":
            wide = [self.value(f"zext i64 {v} to i128") for v in values]
            product = self.value(f"mul i128 {wide[0]}, {wide[1]}")
            high = self.value(f"lshr i128 {product}, 64")
            return self.value(f"trunc i128 {high} to i64")
        if name == "popcount":
            return self.value(f"call i64 @llvm.ctpop.i64(i64 {values[0]})")
        if name == "ctz":
            return self.value(f"call i64 @llvm.cttz.i64(i64 {values[0]}, i1 false)")
        if name == "rdtsc":
            return self.value("call i64 @llvm.readcyclecounter()")
        if name in ("atomic_cas64", "atomic_cas32"):
            kind = f"i{name[-2:]}"
            pointer = self.value(f"inttoptr i64 {values[0]} to ptr")
            old, new = values[1:]
            if kind == "i32":
                old, new = (self.value(f"trunc i64 {v} to i32") for v in (old, new))
            pair = self.value(f"cmpxchg ptr {pointer}, {kind} {old}, {kind} {new} seq_cst seq_cst")
            done = self.value(f"extractvalue {{{kind}, i1}} {pair}, 1")
            return self.value(f"zext i1 {done} to i64")
        if name in ("atomic_or64", "atomic_and64"):
            pointer = self.value(f"inttoptr i64 {values[0]} to ptr")
            operation = name[7:-2]
            return self.value(f"atomicrmw {operation} ptr {pointer}, i64 {values[1]} seq_cst")
        if name == "sched_yield":
            # Linux's system call 24: let other threads of the host run first.
            clobbered = "~{rcx},~{r11},~{memory},~{dirflag},~{fpsr},~{flags}"
            return self.value(
                f'call i64 asm sideeffect "syscall", "={{rax}},0,{clobbered}"(i64 24)'
            )
        if name == "rep_movsb":
            self.string("cld; rep movsb", "={rdi},={rsi},={rcx},0,1,2", values)
            return "0"
        if name == "rep_stosb":
            self.string("cld; rep stosb", "={rdi},={rax},={rcx},0,1,2", values)
            return "0"
        raise self.error(node, f"{name} is neither a native function nor an intrinsic")

    def string(self, text: str, constraints: str, values: list[str]) -> None:
        arguments = ", ".join(f"i64 {v}" for v in values)
        self.value(
            f'call {{i64, i64, i64}} asm sideeffect "{text}", '
            f'"{constraints},~{{memory}},~{{dirflag}},~{{fpsr}},~{{flags}}"({arguments})'
        )


def _as_load(node: ast.expr) -> ast.expr:
    """What an assignment's target is as a value."""
    if isinstance(node, ast.Name):
        return ast.Name(node.id, ast.Load())
    if isinstance(node, ast.Attribute):
        return ast.Attribute(node.value, node.attr, ast.Load())
    assert isinstance(node, ast.Subscript)
    return ast.Subscript(node.value, node.slice, ast.Load())


class Unit:
    """A set of ``@native`` functions and all that they call, as one LLVM module.

    Parameters
    ----------
    roots : iterable of native functions
        What has to be in it.
    assembled : collection of str
        Names of external functions that assembly beside it defines.
    """

    def __init__(self, roots: Iterable[Any], assembled: Collection[str] = ()) -> None:
        self.assembled = assembled
        self.functions: dict[str, NativeFunction] = {}
        self.pending: list[NativeFunction] = []
        for root in roots:
            self.need(root)

    def need(self, function: Any) -> None:
        """Add a function; one that is only declared waits for its definition."""
        if not isinstance(function, NativeFunction):
            raise DialectError(f"{function!r} is not a native function")
        known = self.functions.get(function.symbol)
        if known is None or (known.external and not function.external):
            self.functions[function.symbol] = function
            if not function.external:
                self.pending.append(function)
        elif not function.external and known.function is not function.function:
            raise DialectError(f"two native functions are called {function.name}")

    def ir(self) -> str:
        """The module as LLVM IR text."""
        bodies = []
        while self.pending:
            bodies.append(_Function(self, self.pending.pop()).compile())
        declared = []
        for name, function in self.functions.items():
            if name in self.assembled:
                arguments = ", ".join(["i64"] * function.function.__code__.co_argcount)
                declared.append(f"declare i64 @{name}({arguments})")
            elif function.external:
                raise DialectError(f"external function {name} has no definition in this unit")
        return "\n\n".join(
            [
                "declare i64 @llvm.ctpop.i64(i64)",
                "declare i64 @llvm.cttz.i64(i64, i1)",
                "declare i64 @llvm.readcyclecounter()",
                *declared,
                *bodies,
                "attributes #0 = { " + _ATTRIBUTES.format(features=NO_VECTOR) + " }",
            ]
        )
