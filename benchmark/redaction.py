"""Keeps secrets out of everything a run writes: by the value of variables that hold them, and by the look of a token."""

import os
import re
from collections.abc import Mapping
from typing import TextIO

SECRET_NAME = re.compile(
    r"TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH", re.IGNORECASE
)
TOKEN_LOOK = re.compile(
    r"\b(hf_|sk-|ghp_|github_pat_|glpat-)[A-Za-z0-9_-]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
HIDDEN = "<redacted>"
SHORTEST = 6


def is_secret(name: str) -> bool:
    """Returns whether a variable of this name holds a secret."""
    return bool(SECRET_NAME.search(name))


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Returns a text without secrets."""
    for name, value in environment.items():
        if len(value) >= SHORTEST and is_secret(name):
            text = text.replace(value, HIDDEN)
    return TOKEN_LOOK.sub(HIDDEN, text)


class Redacted:
    """A text stream that hides secrets in what is written to it.

    Args:
        stream: where the text goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text without its secrets; returns the length of the text as given."""
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
