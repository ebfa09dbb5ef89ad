"""Whether a text says something that a reader can see.

A scope's intent stands in the record so that people can read why an action was allowed. A text of zero-width
spaces is not blank to `str.strip`, yet a reader sees nothing.

1. Characters that show no glyph of their own do not count: controls (Cc, so tab and line break as well),
   format characters (Cf), nonspacing marks (Mn), line and paragraph separators (Zl, Zp), and the letters and
   symbols among them that Unicode says are to be ignored in display or whose glyph is empty.
2. What is unassigned (Cn), private (Co) or half of a pair (Cs) does not count either. What a font shows for
   it depends on the reader's machine, and the same record must be readable on all of them.
3. A space counts where it stands between characters that count. Spaces at either end do not, even if
   invisible characters stand outside of them.
4. Nothing is changed: the record keeps the text as it was given.
"""

from __future__ import annotations

import unicodedata

_UNSEEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Mn", "Zl", "Zp"})
# Letters that Unicode lists as default-ignorable. What else is on that list is of the categories above.
FILLERS = "\u115f\u1160\u3164\uffa0"
# With the empty Braille pattern and the empty notehead.
UNSEEN_LETTERS = frozenset(FILLERS + "\u2800\U0001d159")


def visible_chars(text: str) -> int:
    """How many characters of a text count as said: those that are seen, and the spaces between them."""
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
