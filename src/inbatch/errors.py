"""Errors for people: each says what was wrong, where, and what to do, and carries the exit code of the process."""


class InbatchError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback."""

    exit_code = 1
    alone = False
    """Whether this process, of several, may be the only one to tell of it."""


class ConfigError(InbatchError):
    """Wrong usage, unknown or contradictory settings."""

    exit_code = 2


class DataError(InbatchError):
    """Images or labels that cannot be used as asked."""

    exit_code = 3


class TrainingError(InbatchError):
    """Training diverged, collapsed, or did not reach what was promised."""

    exit_code = 4


class Preempted(InbatchError):
    """Stopped by SIGTERM, SIGHUP or SIGUSR1; a run that had finished a step saved a checkpoint and can be resumed."""

    exit_code = 75


class Interrupted(InbatchError):
    """Stopped by Ctrl-C; as Preempted."""

    exit_code = 130


class RankError(InbatchError):
    """Another process of the run died, hangs, or ended with an error.

    speaks: whether this process is the first of those that are left, and reports for them.
    """

    def __init__(self, message: str, speaks: bool = False) -> None:
        super().__init__(message)
        self.speaks = speaks


def many(count: int, noun: str) -> str:
    """A number with its noun: "1 image", "6,000 images"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def unreadable(count: int) -> str:
    """The beginning of a sentence on images that cannot be read."""
    return f"{many(count, 'image')} cannot be read and {'is' if count == 1 else 'are'}"
