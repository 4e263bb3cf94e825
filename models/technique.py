"""Techniques and the recipe they fold into.

A technique claims *slots* of a recipe and nothing else, so any two combine unless they claim the same slot or slots that exclude
each other. A recipe is plain JSON: the parent folds and checks it, a worker makes it real.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from models.machine import Machine

DTYPES = ("auto", "float32", "float16", "bfloat16")
ATTENTIONS = ("auto", "eager", "sdpa")
HALF = "half"
SLOTS = ("dtype", "attention", "weights", "kv", "decoder", "drafts")
STOCK_DRAFTS = ("prompt_lookup", "assistant")
DRAFT_OPTIONS = (
    "draft_nodes", "prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold",
)  # fmt: skip


class SlotClash(ValueError):
    """A slot, or a generate option, that is claimed twice."""

    def __init__(self, slot: str):
        super().__init__(f"'{slot}' is decided twice")
        self.slot = slot


@dataclass(frozen=True)
class Recipe:
    """What to load and how to decode. An unclaimed slot is `None` until :meth:`resolved`.

    Attributes:
        dtype: `float32`, `float16`, `bfloat16`, or `half` until resolved.
        attention: `default` (the upstream class's own), `eager`, `sdpa` or `flash`.
        weights: how weights are stored: `plain`; ours, `int8`, `int4-naive` or `int4-group128` and the like; a peer's,
            `bnb-int8`, `bnb-nf4` or `torchao-int4`. `-head8` behind one of ours: the LM head in 8 bits too.
        kv: `dynamic` or `none` (stock decoder), `static` (engine).
        decoder: `stock` is upstream's generate, `engine` ours.
        drafts: who proposes tokens, `streams`, `prompt_lookup` or `assistant` (a small model); `None` for nobody.
        generate_options: options of the decoder's `generate`, JSON values.
    """

    dtype: str | None = None
    attention: str | None = None
    weights: str | None = None
    kv: str | None = None
    decoder: str | None = None
    drafts: str | None = None
    generate_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def claim(self, *, generate_options: Mapping[str, Any] | None = None, **slots: str) -> Recipe:
        """Returns the recipe with these slots taken.

        Raises:
            SlotClash: one of them was taken before.
        """
        for slot in slots:
            if getattr(self, slot) is not None:
                raise SlotClash(slot)
        added = dict(generate_options or {})
        for option in added:
            if option in self.generate_options:
                raise SlotClash(option)
        return replace(self, generate_options={**self.generate_options, **added}, **slots)

    def resolved(self, machine: Machine, dtype: str = "auto", attention: str = "auto") -> Recipe:
        """Returns the recipe with every slot decided; resolving again changes nothing.

        Args:
            machine: where it will run: `auto` is float32 on a CPU, bfloat16 on CUDA.
            dtype: the run's `--dtype`, for recipes that do not decide it.
            attention: the run's `--attn_implementation`, likewise.

        Raises:
            ValueError: an unknown dtype or attention, or slots that exclude each other.
        """
        _check_choice("--dtype", dtype, DTYPES)
        _check_choice("--attn_implementation", attention, ATTENTIONS)
        decoder = self.decoder or "engine"
        automatic = "default" if decoder == "stock" else "sdpa"
        full = replace(
            self,
            dtype=_dtype(self.dtype, dtype, machine),
            attention=self.attention or (automatic if attention == "auto" else attention),
            weights=self.weights or "plain",
            kv=self.kv or ("dynamic" if decoder == "stock" else "static"),
            decoder=decoder,
        )
        full.check()
        return full

    def check(self) -> None:
        """Raises ValueError if slots exclude each other."""
        if self.decoder == "stock" and self.drafts == "streams":
            raise ValueError("the stock decoder takes no draft tree; leave out one of the two techniques.")
        if self.decoder == "stock" and self.kv not in (None, "dynamic", "none"):
            raise ValueError(
                f"the stock decoder takes no '{self.kv}' cache; leave out one of the two techniques."
            )
        if self.decoder != "stock" and self.attention == "flash":
            raise ValueError("FlashAttention kernels take no draft tree, and our engine needs one; use sdpa.")
        if self.decoder == "stock" and str(self.weights).startswith("awq"):
            raise ValueError(
                "awq scales models of our engine; leave out the technique with the stock decoder."
            )
        if self.drafts in STOCK_DRAFTS and (self.decoder != "stock" or self.kv == "none"):
            raise ValueError(f"'{self.drafts}' is upstream's and needs its decoder with a KV cache.")

    def without_drafts(self) -> Recipe:
        """Returns the exactness twin: the same recipe with nobody proposing tokens."""
        kept = {name: value for name, value in self.generate_options.items() if name not in DRAFT_OPTIONS}
        return replace(self, drafts=None, generate_options=kept)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON types, which :meth:`from_json` reads."""
        return {**asdict(self), "generate_options": dict(self.generate_options)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Returns the recipe that :meth:`to_json` wrote.

        Raises:
            ValueError: a field this version does not know.
        """
        unknown = set(values) - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(
                f"a saved recipe has unknown fields {sorted(unknown)}; it is from another version."
            )
        return cls(**values)

    @property
    def digest(self) -> str:
        """A short name of the recipe: equal recipes, equal digests."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Technique:
    """One way to decode faster or smaller. Subclasses are frozen dataclasses whose fields are their flags.

    Attributes:
        name: what `--model_type` calls it.
        summary: one line for `--help` and the README.
        largest_batch: most prompts it answers at once; `None` for no limit.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    largest_batch: ClassVar[int | None] = None

    def apply(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with this technique's slots claimed."""
        raise NotImplementedError(f"{type(self).__name__} must say which slots it claims.")

    def unavailable(self, machine: Machine) -> str | None:
        """Returns why the technique cannot run on this machine, or with these options; `None` if it can."""
        del machine
        return None


def option(default: Any, text: str) -> Any:
    """Returns a field of a technique, which is also the flag of that name."""
    return field(default=default, metadata={"help": text})


def missing_package(package: str, extra: str) -> str | None:
    """Returns what to install where a package is missing, `None` where it is there; nothing is imported."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f'{package} is not installed; pip install -c constraints.txt -e ".[{extra}]" installs it.'


def combine(techniques: Iterable[Technique]) -> Recipe:
    """Returns what the techniques decide together, slots nobody claims left open.

    Raises:
        ValueError: two techniques claim one slot, or slots that exclude each other.
    """
    recipe = Recipe()
    owners: dict[str, str] = {}
    names = []
    for technique in techniques:
        before = recipe
        try:
            recipe = technique.apply(before)
        except SlotClash as clash:
            raise ValueError(
                f"{owners[clash.slot]}+{technique.name}: both decide '{clash.slot}'; leave out one of them."
            ) from None
        owners.update(dict.fromkeys(_claimed(before, recipe), technique.name))
        names.append(technique.name)
    try:
        recipe.check()
    except ValueError as error:
        raise ValueError(f"{'+'.join(names)}: {error}") from None
    return recipe


def _claimed(before: Recipe, after: Recipe) -> list[str]:
    slots = [slot for slot in SLOTS if getattr(before, slot) != getattr(after, slot)]
    return slots + [name for name in after.generate_options if name not in before.generate_options]


def _dtype(claimed: str | None, run: str, machine: Machine) -> str:
    """Returns the dtype to compute in; `half` follows the run's dtype where that is a half type."""
    automatic = "bfloat16" if machine.device == "cuda" else "float32"
    chosen = automatic if run == "auto" else run
    if claimed == HALF:
        return chosen if chosen in ("float16", "bfloat16") else "bfloat16"
    return claimed or chosen


def _check_choice(flag: str, got: str, choices: tuple[str, ...]) -> None:
    if got not in choices:
        raise ValueError(f"{flag} got '{got}', expected one of {', '.join(choices)}.")
