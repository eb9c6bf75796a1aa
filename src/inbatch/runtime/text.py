"""Text for users: characters that could control a terminal, reorder a line or stay unseen are written as escapes."""

_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
"""Invisible characters that Unicode counts as letters, marks or symbols, and Python therefore as printable."""


def printable(text: str) -> str:
    """Return text with control and invisible characters, except line ends, as escapes: names come from outside.

    This includes carriage returns, escape sequences, and the characters that change the direction of text. It is the
    only function that decides what is escaped; every page, table and message passes through it.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c == "\n" or _shown(c) else c.encode("unicode_escape").decode() for c in text)


def _shown(character: str) -> bool:
    return character.isprintable() and character not in _UNSEEN


def one_line(text: str) -> str:
    """Return printable text on one line: a name with a line end must not look like a message of inbatch."""
    return printable(text).replace("\n", "\\n")
