"""Weights in 4 bits, after activation-aware scaling ("AWQ", arXiv 2306.00978).

A checkpoint in AWQ's own format was scaled and rounded by whoever made it: it is read as it is, without calibration text.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from models.int4 import Int4
from models.lm_head import HELP, KEPT, with_head
from models.technique import Recipe, Technique, option

PREFIX = "awq-group"
METHOD = "awq"
"""What a checkpoint in AWQ's format calls its quantisation."""


def unreadable(weights: str | None, method: str | None) -> str | None:
    """Returns why a recipe's weights cannot be had from a checkpoint, or `None` if they can.

    Args:
        weights: the recipe's slot.
        method: how the checkpoint says that its weights are quantised, `None` for not at all.
    """
    ours = weights is not None and weights.startswith(PREFIX)
    if method == METHOD and not ours:
        name = str(weights or "plain").partition(":")[0]
        return (
            f"the checkpoint's weights are in AWQ's format, which the technique awq reads: use awq, alone or combined, or for "
            f"{name} weights the checkpoint they were made from."
        )
    if ours and method != METHOD and ":" not in str(weights):
        return "awq chooses its scales on calibration text; name a file with --calibration_text."
    return None


@dataclass(frozen=True)
class Awq(Technique):
    """As `int4` in groups, its channels scaled by what calibration text shows to pass through them.

    On a checkpoint in AWQ's format nothing is searched, and its own group size holds.
    """

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = (
        "our engine on weights in 4 bits, scaled for calibration text (--calibration_text)"
    )

    calibration_text: str | None = option(None, "text file that 'awq' chooses its scales on; not test data")
    group_size: int = option(128, "inputs that share a scale: 32, 64 or 128")

    lm_head: str = option(KEPT, HELP)

    def __post_init__(self) -> None:
        Int4(group_size=self.group_size, lm_head=self.lm_head)

    def apply(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with the weights claimed; they are named with the text's digest and place.

        Raises:
            ValueError: the text cannot be read, or is empty.
        """
        if self.calibration_text is None:
            return recipe.claim(weights=with_head(f"{PREFIX}{self.group_size}", self.lm_head))
        path = Path(self.calibration_text).resolve()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"--calibration_text {path} cannot be read: {error.strerror}.") from None
        if not content.strip():
            raise ValueError(f"--calibration_text {path} holds no text.")
        digest = hashlib.sha256(content).hexdigest()[:12]
        return recipe.claim(weights=with_head(f"{PREFIX}{self.group_size}:{digest}:{path}", self.lm_head))
