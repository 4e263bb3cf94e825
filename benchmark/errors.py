"""What can end a run, and the exit code each ending has."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
EXIT_INTERRUPTED = 130


class UsageError(ValueError):
    """A wrong argument, or a technique named alone that cannot run here (exit code 2)."""


class RunError(RuntimeError):
    """The run cannot start or go on: corrupt checkpoint, unreadable data, full disk (exit code 1)."""
