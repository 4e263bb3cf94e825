"""Weights in 4 bits, two in a byte; with a precision plan, some layers in 8 bits or as they are."""

from dataclasses import dataclass
from typing import ClassVar

from models.lm_head import HELP, KEPT, check_head, with_head
from models.precision_plan import plan_text, read_plan
from models.technique import Recipe, Technique, option

SCHEMES = ("group", "naive")
GROUP_SIZES = (32, 64, 128)
PLAN = "int4-plan:"
"""A recipe's weights of a plan: this, then the plan itself, so that a worker needs no file and equal plans hash equal."""


@dataclass(frozen=True)
class Int4(Technique):
    """Our engine on weights of 4 bits; embeddings and streams stay as they are, and unless told the LM head."""

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "our engine on weights in 4 bits"

    int4_scheme: str = option("group", "group: a scale for each group of inputs; naive: one an output")
    group_size: int = option(128, "inputs that share a scale: 32, 64 or 128")
    precision_plan: str | None = option(
        None, "file of sensitivity.py that says which layers keep more bits, and all formats"
    )

    lm_head: str = option(KEPT, HELP)

    def __post_init__(self) -> None:
        check_head(self.lm_head)
        if self.int4_scheme not in SCHEMES:
            raise ValueError(f"--int4_scheme got '{self.int4_scheme}', expected one of {', '.join(SCHEMES)}.")
        if self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"--group_size got {self.group_size}, expected one of {sizes}.")
        if not self.precision_plan:
            return
        for name in ("int4_scheme", "group_size"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"--{name} and --precision_plan both say the format; leave out --{name}.")
        read_plan(self.precision_plan)

    def apply(self, recipe: Recipe) -> Recipe:
        if self.precision_plan:
            plan = PLAN + plan_text(read_plan(self.precision_plan))
            return recipe.claim(weights=with_head(plan, self.lm_head))
        scheme = "naive" if self.int4_scheme == "naive" else f"group{self.group_size}"
        return recipe.claim(weights=with_head(f"int4-{scheme}", self.lm_head))
