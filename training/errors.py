"""What stops a run, apart from wrong flags and unreadable data."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that exists but cannot be used."""


class DivergedError(RuntimeError):
    """The loss or a weight is no longer finite."""
