"""Translations without end: the code cache, its tables and its bookkeeping stay bounded."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from engine.harness import HIGH, P, W
from hostile.support import DONE, PAGE, HostileGuest, code
from ringfence.engine.translate import engine, translator
from ringfence.engine.translate.codecache import CodeCache

AT = 0x4000_0000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileGuest]:
    """A guest with a code cache of 4 MiB and a table for 8192 traces."""
    monkeypatch.setattr(translator, "CodeCache", lambda: CodeCache(4 << 20))
    monkeypatch.setattr(engine, "TRACE_SLOTS", 1 << 13)
    monkeypatch.setattr(translator, "TRACES_MAX", 6 << 10)
    made = HostileGuest()
    yield made
    made.close()


RETS = f"""
    mov r12d, {AT}
again:
    call r12
    inc r12
    dec ecx
    jnz again
    {DONE}
"""


def test_more_traces_than_the_table_holds(small: HostileGuest) -> None:
    """Every byte of eight pages starts a trace: 32768 of them."""
    pages = small.page(8)
    small.put(pages, b"\xc3" * (8 * PAGE))
    for n in range(8):
        small.map(AT + n * PAGE, pages + n * PAGE, P | W)
    end = small.kernel(RETS, rcx=8 * PAGE)
    assert end.trap == -1
    assert small.engine.stats()["translation"]["full_flushes"] >= 4


def test_more_code_than_the_cache_holds(small: HostileGuest) -> None:
    """Long traces from every second byte of some pages, twice; sums come out right."""
    pages = small.page(4)
    body = b"\x48\xff\xc0" * 40 + b"\xc3"
    small.put(pages, (body * 200)[: 4 * PAGE - 8] + b"\xc3" * 8)
    for n in range(4):
        small.map(AT + n * PAGE, pages + n * PAGE, P | W)
    source = f"""
        xor eax, eax
        mov r13d, 2
    outer:
        mov r12d, {AT}
        mov ecx, {4 * PAGE // 121 - 2}
    one:
        mov ebx, 41
        mov r14, r12
    two:
        call r14
        add r14, 3
        dec ebx
        jnz two
        add r12, 121
        dec ecx
        jnz one
        dec r13d
        jnz outer
        {DONE}
    """
    end = small.kernel(source)
    assert end.trap == -1
    assert end.rax == 2 * (4 * PAGE // 121 - 2) * 820


def test_more_code_pages_than_numbers(guest: HostileGuest) -> None:
    """One page of RAM at very many linear addresses: numbers run out, everything is dropped."""
    page = guest.page()
    guest.put(page, code("inc rax; ret"))
    for n in range(600):
        guest.map(AT + n * PAGE, page, P | W)
    guest.engine.translator.writer.page_count = 49900
    source = f"""
        xor eax, eax
        mov r12d, {AT}
        mov ecx, 600
    again:
        call r12
        add r12, {PAGE}
        dec ecx
        jnz again
        {DONE}
    """
    before = guest.engine.translator.full_flushes
    end = guest.kernel(source)
    assert end.trap == -1 and end.rax == 600
    assert guest.engine.translator.full_flushes > before


@pytest.mark.parametrize("straddling", [False, True])
def test_write_to_a_page_with_very_many_aliases(guest: HostileGuest, straddling: bool) -> None:
    """Dropping the translations of one page at 4000 addresses takes no noticeable time."""
    page = guest.page()
    if straddling:
        guest.put(page + PAGE - 1, b"\xb8")
        guest.put(page, b"\x01\x02\x03\x04\xc3")
    else:
        guest.put(page, b"\xb8\x01\x02\x03\x04\xc3")
    count = 4000
    for n in range(count + 1):
        guest.map(AT + n * PAGE, page, P | W)
    start = AT + (PAGE - 1 if straddling else 0)
    source = f"""
        mov r12d, {start}
        mov ecx, {count}
    again:
        call r12
        add r12, {PAGE}
        dec ecx
        jnz again
        {DONE}
    """
    assert guest.kernel(source).trap == -1
    at = guest.page()
    low = 0 if straddling else 1
    guest.put(at, code(f"mov byte ptr [{AT + low}], 0x77; mov r12d, {start}; call r12; {DONE}"))
    began = time.monotonic()
    guest.begin(HIGH + at)
    end = guest.finish()
    assert end.rax == 0x04030277
    assert time.monotonic() - began < 1.0


def test_stos_over_many_translated_pages(guest: HostileGuest) -> None:
    """One REP STOS over more pages with translated code than can be noted at once."""
    count = 150
    pages = guest.page(count)
    for n in range(count):
        guest.put(pages + n * PAGE, b"\xb8\x01\0\0\0\xc3")
        guest.map(AT + n * PAGE, pages + n * PAGE, P | W)
    for name, width in (("stosb", 1), ("stosq", 8), ("movsb", 1)):
        source = f"""
            xor ebx, ebx
            call all
            mov eax, 0xc3c3c3c3
            mov rax, 0xc3c3c3c3c3c3c3c3
            mov edi, {AT}
            mov rsi, {HIGH + pages + count * PAGE}
            mov ecx, {count * PAGE // width}
            rep {name}
            xor eax, eax
            call all
            {DONE}
        all:
            mov r12d, {AT}
            mov r13d, {count}
        one:
            call r12
            add rbx, rax
            add r12, {PAGE}
            dec r13d
            jnz one
            ret
        """
        guest.forget()
        for n in range(count):
            guest.put(pages + n * PAGE, b"\xb8\x01\0\0\0\xc3")
        guest.put(pages + count * PAGE, b"\xc3" * PAGE)
        if name == "movsb":
            guest.memory.write(0x600000, b"\xc3" * (count * PAGE))
            source = source.replace(str(HIGH + pages + count * PAGE), str(HIGH + 0x600000))
        end = guest.kernel(source)
        assert end.trap == -1
        assert end.rbx == count, name


def test_rewriting_the_same_instruction(guest: HostileGuest) -> None:
    """Thousands of versions of one instruction: the time per version stays what it was."""
    source = f"""
        xor ebx, ebx
        lea rdi, [rip + target + 1]
    again:
        mov [rdi], ecx
    target:
        mov eax, 0
        add rbx, rax
        dec ecx
        jnz again
        {DONE}
    """
    spent = []
    for count in (2000, 2000, 8000):
        began = time.monotonic()
        end = guest.kernel(source, rcx=count)
        spent.append(time.monotonic() - began)
        assert end.rbx == count * (count + 1) // 2
    assert spent[2] < 20 * max(spent[:2])


def test_new_instructions_without_end(guest: HostileGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes are not kept for ever."""
    monkeypatch.setattr(translator, "RECIPES_MAX", 500)
    source = f"""
        mov rbp, rsp
        lea rdi, [rip + target + 1]
    again:
        mov [rdi], cx
    target:
        enter 0, 0
        leave
        dec ecx
        jnz again
        {DONE}
    """
    assert guest.kernel(source, rcx=3000).trap == -1
    assert guest.engine.translator.recipe_count <= 500
