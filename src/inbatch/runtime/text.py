"""Text for people: characters that a terminal must not obey are written as escapes."""


def printable(text: str) -> str:
    """Text whose control and invisible characters, line ends apart, are written as escapes: names are not ours."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Printable text on one line: a name with a line end in it must not look like a line of ours."""
    return printable(text).replace("\n", "\\n")
