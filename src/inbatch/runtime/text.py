"""Text for users: characters that could control a terminal are written as escapes."""


def printable(text: str) -> str:
    """Return text with control and invisible characters, except line ends, as escapes: names come from outside."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Return printable text on one line: a name with a line end must not look like a message of inbatch."""
    return printable(text).replace("\n", "\\n")
