"""How a technique's weights name the format of the LM head: a suffix of the scheme, in front of what follows a colon."""

from __future__ import annotations

KEPT, INT8 = "kept", "int8"
HEADS = (KEPT, INT8)
SUFFIX = "-head8"
HELP = "the LM head of int8, int4 and awq. kept: as it is; int8: in 8 bits, also where it is tied to the embeddings"


def check_head(lm_head: str) -> None:
    """Raises ValueError if `--lm_head` got something that it does not know."""
    if lm_head not in HEADS:
        raise ValueError(f"--lm_head got '{lm_head}', expected one of {', '.join(HEADS)}.")


def with_head(weights: str, lm_head: str) -> str:
    """Returns a recipe's weights with the head's format in their name: `int4-group128-head8`, `awq-group32-head8:digest:path`."""
    scheme, colon, rest = weights.partition(":")
    return scheme + (SUFFIX if lm_head == INT8 else "") + colon + rest


def split_head(weights: str) -> tuple[str, str | None]:
    """Returns a recipe's weights without the head's format, and that: `int8`, or `None` for a head as it is."""
    scheme, colon, rest = weights.partition(":")
    head = INT8 if scheme.endswith(SUFFIX) else None
    return scheme.removesuffix(SUFFIX) + colon + rest, head
