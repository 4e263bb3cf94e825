"""Looks at a checkpoint before anything loads it: safe to load, complete, how large. No torch, no tensor is read.

A safetensors file opens with eight bytes (length of its header), then the header, JSON that gives each tensor's bytes;
so a truncated file shows in its size alone.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.errors import RunError, UsageError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
CONFIGS = ("tokenizer_config.json", "generation_config.json")  # beside config.json, where there are any
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")
WEIGHT_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that passed the checks.

    Args:
        path: the directory.
        config: its `config.json`.
        parameters: stored numbers, those of the base model of streams included; 0 with random weights.
        weight_bytes: their bytes on disk.
        fingerprint: changes when the configs, the tokenizer or the weights do, the assistant's included.
        assistant: the small model that drafts for it in this run; None for nobody.
        tensors: names of what is stored, the base model's included; none with random weights.
        quantized: how the main weights are quantised, as `quant_method` names it; None for not at all.
    """

    path: Path
    config: Mapping[str, Any]
    parameters: int
    weight_bytes: int
    fingerprint: str
    assistant: "Checkpoint | None" = None
    tensors: frozenset[str] = frozenset()
    quantized: str | None = None

    def with_assistant(self, assistant: "Checkpoint") -> "Checkpoint":
        """Returns the checkpoint with its assistant."""
        both = f"{self.fingerprint}-{assistant.fingerprint}"
        return replace(self, fingerprint=both, assistant=assistant)


def locate(name: str, root: Path, flag: str = "--model_name_or_path") -> Path | None:
    """Returns the directory that a flag names, None where the name can only be a hub id.

    Args:
        name: what the flag got.
        root: the project's folder, beside the current one.
        flag: for messages.

    Raises:
        UsageError: it is a path, and there is nothing.
    """
    for path in (Path(name).expanduser(), root / name):
        if path.is_dir():
            return path
        if path.exists():
            raise UsageError(f"{flag} {name} is a file, expected a checkpoint directory.")
    is_path = name.startswith((".", "~", "/")) or any(
        (base / name).parent.is_dir() for base in (Path(), root) if "/" in name
    )
    if is_path or not HUB_ID.fullmatch(name):
        raise UsageError(
            f"{flag} {name}: no such directory; give a checkpoint directory or a hub id (owner/name)."
        )
    return None


def inspect(path: Path, random_weights: bool = False) -> Checkpoint:
    """Returns what a checkpoint directory holds, and the base model that streams alone refer to.

    Args:
        path: the directory.
        random_weights: the weights are not wanted; `config.json` is enough.

    Raises:
        RunError: no config, a config that asks for code of its own, pickled, missing, truncated or inconsistent weights,
            or no base model where one is named.
    """
    config = _checked_config(path)
    places = [path]
    if not random_weights and config.get("base_model_name_or_path") is not None:
        places += _base_of(path, str(config["base_model_name_or_path"]))
    digest = hashlib.sha256()
    parameters = weight_bytes = 0
    tensors: set[str] = set()
    for place in places:
        digest.update(json.dumps(_checked_config(place), sort_keys=True).encode())
        for name in (*CONFIGS, *TOKENIZER_FILES):
            if (place / name).is_file():
                digest.update(f"\n{name}\n".encode() + (place / name).read_bytes())
        for file in () if random_weights else weight_files(place):
            header = read_header(file)
            digest.update(_sample(file))
            tensors.update(header)
            for tensor in header.values():
                parameters += math.prod(tensor["shape"])
                weight_bytes += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    # The last place holds the main weights.
    saved = _checked_config(places[-1]).get("quantization_config")
    return Checkpoint(
        path,
        config,
        parameters,
        weight_bytes,
        digest.hexdigest()[:16],
        tensors=frozenset(tensors),
        quantized=saved.get("quant_method") if isinstance(saved, dict) else None,
    )


def _checked_config(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's `config.json`, after a look at the configs beside it."""
    config = read_config(path / "config.json")
    refuse_code(config, path / "config.json")
    for file in (path / name for name in CONFIGS):
        if file.exists():
            refuse_code(read_config(file), file)
    return config


def _base_of(path: Path, name: str) -> list[Path]:
    """Returns the directory of the base model that streams alone name, nothing where the name can only be a hub id."""
    for place in (path / name, Path(name)):
        if place.is_dir():
            return [place]
    if HUB_ID.fullmatch(name) and not ("/" in name and Path(name).parent.is_dir()):
        return []
    raise RunError(
        f"{path / 'config.json'} names the base model {name}, and there is no such directory: put the base model back, "
        "or set base_model_name_or_path to where it is."
    )


def read_config(path: Path) -> dict[str, Any]:
    """Returns a JSON object from a checkpoint. Raises RunError where there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path.parent} has no {path.name}: is it a checkpoint directory?") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}): fetch the checkpoint again.") from None
    if not isinstance(config, dict):
        raise RunError(
            f"{path} holds a {type(config).__name__}, expected an object: fetch the checkpoint again."
        )
    return config


def refuse_code(config: Mapping[str, Any], path: Path) -> None:
    """Raises RunError if a config, at any depth, asks for code from outside the installed packages."""
    for key, value in config.items():
        if key in CODE_KEYS and value:
            raise RunError(
                f"{path} sets '{key}', which asks for code from outside the installed packages; nothing was run. "
                "Remove the key, or use a checkpoint of an architecture that transformers itself has."
            )
        if isinstance(value, Mapping):
            refuse_code(value, path)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Returns how many tokens a model can read, as its `config.json` says; None where it does not."""
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return int(positions) if positions else None


def weight_files(path: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint. Raises RunError where there are none, or a shard is missing."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        shards = read_config(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise RunError(f"{index} has no 'weight_map' of file names: fetch the checkpoint again.")
        files = [path / name for name in sorted(set(shards.values()))]
        for file in files:
            if file.parent != path or not file.is_file():
                raise RunError(
                    f"{index} names the shard {file.name}, which is missing: fetch the checkpoint again."
                )
        return files
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise RunError(
            f"{path} holds pickled weights only ({pickles[0]}), which can run code when loaded; they were not opened. "
            "Convert them where you trust them: model.save_pretrained(directory), which writes safetensors."
        )
    raise RunError(
        f"{path} has no *.safetensors weights: fetch the checkpoint again, or add --random_weights."
    )


def read_header(path: Path) -> dict[str, Any]:
    """Returns the tensors of a safetensors file: name -> dtype, shape, data_offsets.

    Raises:
        RunError: the header is unreadable, or its promises and the file's size disagree.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise _corrupt(path, size, "its header is cut off or is none")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise _corrupt(path, size, "its header is no JSON") from None
    if not isinstance(header, dict):
        raise _corrupt(path, size, "its header is no object")
    header.pop("__metadata__", None)
    end = 0
    for begin, stop in sorted(_spans(header, path, size)):
        if begin != end:
            raise _corrupt(path, size, "its tensors overlap or leave gaps")
        end = stop
    if 8 + length + end != size:
        raise _corrupt(path, size, f"its header promises {8 + length + end} bytes")
    return header


def _spans(header: Mapping[str, Any], path: Path, size: int) -> Iterator[tuple[int, int]]:
    for name, tensor in header.items():
        try:
            begin, stop = (int(offset) for offset in tensor["data_offsets"])
            bits = WEIGHT_BITS.get(tensor["dtype"])
            wanted = (
                None if bits is None else math.prod(int(length) for length in tensor["shape"]) * bits // 8
            )
        except (KeyError, TypeError, ValueError):
            raise _corrupt(path, size, f"the entry of tensor {name!r} is incomplete") from None
        if stop < begin or (wanted is not None and stop - begin != wanted):
            raise _corrupt(path, size, f"the bytes of tensor {name!r} do not fit its shape")
        yield begin, stop


def _corrupt(path: Path, size: int, why: str) -> RunError:
    return RunError(f"{path} is corrupt: it has {size} bytes and {why}. Fetch or save the checkpoint again.")


def _sample(path: Path, ends: int = 1 << 20) -> bytes:
    """Returns a file's size, head and tail: enough to tell two trainings of one model apart, whatever its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(ends)
        file.seek(max(0, size - ends))
        return str(size).encode() + head + file.read(ends)
