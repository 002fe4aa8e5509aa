"""What is known about instructions is kept from machine to machine, whole or not at all."""

from __future__ import annotations

import functools
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from engine.harness import Guest
from engine.native import CODE, END_BYTES, Case
from ringfence.engine.translate.answers import KEPT_RECIPES, Answers
from ringfence.engine.translate.forms import Forms
from ringfence.engine.translate.recipe import Recipes
from ringfence.engine.translate.tables import RAW_BYTES, Form, RawRecipe
from ringfence.native.library import write_image


def form(key: int) -> bytes:
    """A row with nothing in it but its key."""
    return Form.packed(key=key)


def recipe(context: int, raw: bytes, behind: int = 0) -> bytes:
    """A row with ``behind`` bytes of code."""
    made = RawRecipe.packed(context=context, raw=raw, extent=RawRecipe.size + behind)
    return made + bytes(behind)


def raw(number: int) -> bytes:
    """An instruction's bytes."""
    return number.to_bytes(RAW_BYTES, "little")


def fill(path: Path, first: int, count: int) -> Answers:
    """Answers that know some forms and recipes, kept in a file."""
    answers = Answers(path)
    for n in range(first, first + count):
        answers.form(n, functools.partial(form, n))
        answers.recipe(n, raw(n), functools.partial(recipe, n, raw(n), 8 * (n % 5)))
    answers.save()
    return answers


def test_kept(tmp_path: Path) -> None:
    """Others know what one has asked."""
    path = tmp_path / "answers.bin"
    one = fill(path, 1, 20)
    other = Answers(path)
    assert list(other.forms()) == list(one.forms())
    assert list(other.recipes()) == list(one.recipes())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_writers(tmp_path: Path) -> None:
    """Who writes later keeps what the other has learned meanwhile."""
    path = tmp_path / "answers.bin"
    late = Answers(path)
    late.form(7, lambda: form(7))
    fill(path, 100, 5)
    late.save()
    known = {int.from_bytes(row[:8], "little") for row in Answers(path).forms()}
    assert known == {7, 100, 101, 102, 103, 104}


def test_bounded(tmp_path: Path) -> None:
    """A guest that executes whatever it can think of fills no disk."""
    path = tmp_path / "answers.bin"
    answers = Answers(path)
    for n in range(1000):
        answers.recipe(n, raw(n), functools.partial(recipe, n, raw(n), 4096))
    answers.save()
    assert 0 < path.stat().st_size < KEPT_RECIPES + 4096


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 39, 40, 100, -1])
def test_cut_off(tmp_path: Path, cut: int) -> None:
    """What is not whole is not there."""
    path = tmp_path / "answers.bin"
    fill(path, 1, 20)
    path.write_bytes(path.read_bytes()[:cut])
    answers = Answers(path)
    assert not list(answers.forms()) and not list(answers.recipes())
    fill(path, 1, 20)
    assert len(list(Answers(path).forms())) == 20


@pytest.mark.parametrize("extent", [0, 8, RawRecipe.size - 1, RawRecipe.size + 8, 1 << 31])
def test_senseless_rows(tmp_path: Path, extent: int) -> None:
    """A file of ours with rows that can't be ends where they begin."""
    path = tmp_path / "answers.bin"
    bad = RawRecipe.packed(context=2, raw=raw(2), extent=extent)
    rows = recipe(1, raw(1)) + bad
    write_image(path, struct.pack("<II", 1, len(rows)) + form(9) + rows)
    answers = Answers(path)
    assert list(answers.forms()) == [form(9)]
    assert list(answers.recipes()) == [recipe(1, raw(1))]


def test_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second machine asks neither about an opcode nor about an odd instruction."""
    code = bytes.fromhex("4801d8 0fa2 c5fc58c1 9f")  # add, cpuid, vaddps, lahf
    case = Case(CODE, code + bytes(END_BYTES), len(code), [n << 8 for n in range(16)])
    asked: list[str] = []
    describe, build = Forms.describe, Recipes.build

    def counted_describe(*arguments: Any) -> Any:
        asked.append("form")
        return describe(*arguments)

    def counted_build(*arguments: Any) -> Any:
        asked.append("recipe")
        return build(*arguments)

    monkeypatch.setattr(Forms, "describe", counted_describe)
    monkeypatch.setattr(Recipes, "build", counted_build)
    outcomes, questions = [], []
    for _ in range(2):
        asked.clear()
        guest = Guest(answers=tmp_path)
        outcomes.append(guest.run(case))
        guest.close()
        questions.append(set(asked))
    assert questions == [{"form", "recipe"}, set()]
    assert outcomes[0] == outcomes[1]
