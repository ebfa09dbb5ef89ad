"""Counting the characters of a text that a reader can see.

The record holds a scope's intent so that people can read why an action was allowed. `str.strip` does not
treat a text of zero-width spaces as blank, although a reader sees nothing.

1. Characters without a glyph of their own do not count: controls (Cc, which includes tab and line break),
   format characters (Cf), nonspacing marks (Mn), line and paragraph separators (Zl, Zp), and the letters and
   symbols that Unicode ignores in display or whose glyph is empty.
2. Unassigned (Cn), private (Co) and surrogate (Cs) characters do not count either. Their glyph depends on the
   fonts of the reader's machine, and a record must be readable on every machine.
3. A space counts if it stands between characters that count. Spaces at either end do not count, even if
   invisible characters stand outside of them.
4. The text itself is not changed: the record keeps it as it was given.
"""

from __future__ import annotations

import unicodedata

_UNSEEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Mn", "Zl", "Zp"})
# Letters that Unicode lists as default-ignorable. What else is on that list is of the categories above.
FILLERS = "\u115f\u1160\u3164\uffa0"
# With the empty Braille pattern and the empty notehead.
UNSEEN_LETTERS = frozenset(FILLERS + "\u2800\U0001d159")


def visible_chars(text: str) -> int:
    """The number of visible characters of a text, and of the spaces between them."""
    if text.isascii() and text.isprintable():
        return len(text.strip(" "))
    seen = spaces = 0
    for char in text:
        category = unicodedata.category(char)
        if category == "Zs":
            spaces += seen > 0
        elif category not in _UNSEEN and char not in UNSEEN_LETTERS:
            seen += spaces + 1
            spaces = 0
    return seen
