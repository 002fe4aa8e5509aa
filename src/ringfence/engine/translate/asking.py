"""The native translator's questions, answered by way of iced-x86.

Imported when the first question comes that no earlier run has asked (`answers`): mostly never, and
importing the decoder takes longer than making the engine.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.engine.translate import special
from ringfence.engine.translate.block import MODE_CAREFUL, MODE_SLOW
from ringfence.engine.translate.forms import Forms
from ringfence.engine.translate.natives import EFFECT_NUMBERS
from ringfence.engine.translate.recipe import Piece, Recipe, Recipes
from ringfence.engine.translate.tables import NONE, Fix, Form, RawRecipe
from ringfence.engine.translate.writer import EFFECT_EMULATE
from ringfence.engine.translate.x86 import Decoder

MAKERS_MAX = 256
"""Modes and arrangements whose makers of recipes are kept."""
assert special.KEEP  # importing the module enters its recipes in the table


class Expert:
    """Knows what becomes of an opcode, and what of an odd instruction.

    Parameters
    ----------
    offers : callable
        Whether the virtual CPU has a feature, by iced-x86's name.
    scaled_tsc, alone : bool
        See `recipe.Recipes`.
    """

    def __init__(self, offers: Callable[[str], bool], *, scaled_tsc: bool, alone: bool) -> None:
        self.forms = Forms(offers)
        self._scaled_tsc = scaled_tsc
        self._alone = alone
        self._makers: dict[tuple[int, int], Recipes] = {}

    def form(self, raw: bytes, key: int, mode: int) -> bytes:
        """The row of `Form` for the key of an instruction that begins with ``raw``."""
        return Form.packed(key=key, **self.forms.describe(raw, key, mode))

    def recipe(self, raw: bytes, context: int, mode: int) -> bytes:
        """The row of `RawRecipe` for an instruction's bytes in a context, with its pieces."""
        plain, swaps = mode & ~MODE_CAREFUL, context >> 32
        maker = self._makers.get((plain, swaps))
        if maker is None:
            if len(self._makers) >= MAKERS_MAX:
                self._makers.clear()
            maker = self._makers[plain, swaps] = Recipes(
                plain,
                bool(plain & MODE_SLOW),
                swaps,
                scaled_tsc=self._scaled_tsc,
                alone=self._alone,
            )
        i = Decoder(maker.bits, raw, ip=0).decode()
        unavailable = "" if i.is_invalid else self.forms.unavailable(i, plain)
        return recipe_row(context, raw, maker.build(i, raw, unavailable))


def recipe_row(context: int, raw: bytes, recipe: Recipe) -> bytes:
    """A recipe as native code wants it: the row, and behind it the pieces with their fixes."""
    behind = bytearray()
    places: dict[str, int] = {}
    pieces = {
        "lead": recipe.lead,
        "before": recipe.before,
        "op": recipe.op,
        "after": recipe.after,
        "operands": Piece(recipe.operands),
    }
    for name, piece in pieces.items():
        places[name] = RawRecipe.size + len(behind)
        places[f"{name}_length"] = len(piece.code)
        places[f"{name}_fixes"] = len(piece.fixes)
        behind += piece.code + bytes(-len(piece.code) % 8)
        for position, what, retry, write, kind in piece.fixes:
            behind += Fix.packed(position=position, what=what, retry=retry, write=write, kind=kind)
    row = RawRecipe.packed(
        context=context,
        raw=raw,
        kind=recipe.kind,
        reads=recipe.reads,
        writes=recipe.writes,
        kills=recipe.kills,
        clobbers=recipe.clobbers,
        addressing=recipe.addressing,
        effect=(
            EFFECT_EMULATE
            if recipe.effect == "emulate"
            else EFFECT_NUMBERS.get(recipe.effect, EFFECT_EMULATE)
        ),
        written=recipe.written,
        fixed=recipe.fixed,
        named=bytes((*recipe.named, NONE, NONE, NONE, NONE)[:4]),
        extent=RawRecipe.size + len(behind),
        **places,
    )
    return row + bytes(behind)
