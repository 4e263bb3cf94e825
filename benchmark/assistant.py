"""The small model that drafts for the technique `assisted`, looked at before anything loads.

Its drafts are token ids, so both models must mean the same by an id. No torch: `config.json` and the tokenizer's file tell.
"""

from pathlib import Path
from typing import Any

from benchmark import checkpoint as checkpoints
from benchmark.checkpoint import Checkpoint, read_config
from benchmark.config import RunConfig
from benchmark.errors import UsageError
from benchmark.hub_checkpoint import fetch

FLAG = "--assistant_model"
ADVICE = "an assistant must share the model's tokenizer: choose a smaller model of the same family."


def open_assistant(config: RunConfig, model: Checkpoint, root: Path) -> Checkpoint:
    """Returns the checkpoint that `--assistant_model` names, after its checks.

    Args:
        config: the run's options; they name one.
        model: the checkpoint it drafts for.
        root: the project's folder.

    Raises:
        UsageError: there is none of this name, or it has another vocabulary than the model.
        RunError: it is unsafe, incomplete or corrupt.
    """
    name = str(config.assistant_model)
    path = checkpoints.locate(name, root, FLAG) or fetch(name, FLAG)
    assistant = checkpoints.inspect(path, config.random_weights)
    own, other = (one.config.get("vocab_size") for one in (model, assistant))
    if own is not None and other is not None and own != other:
        raise UsageError(
            f"{FLAG} {name} has a vocabulary of {other} tokens, the model one of {own}; {ADVICE}"
        )
    tokens = [_vocabulary(one.path) for one in (model, assistant)]
    if None not in tokens and tokens[0] != tokens[1]:
        raise UsageError(f"{FLAG} {name} has a tokenizer with other tokens than the model's; {ADVICE}")
    return assistant


def _vocabulary(path: Path) -> Any:
    """Returns the tokens of a checkpoint's tokenizer as its file lists them, None where there is no such file."""
    file = path / "tokenizer.json"
    model = read_config(file).get("model") if file.is_file() else None
    return model.get("vocab") if isinstance(model, dict) else None
