"""Which checkpoints of a run are whole: a marker with every file's size is written last, so a torn one is seen as such."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


def mark_complete(folder: Path) -> None:
    """Records the size of every file of a finished checkpoint, atomically."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    sizes.pop(MARKER, None)
    temporary = folder / f"{MARKER}.part"
    temporary.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    os.replace(temporary, folder / MARKER)


def is_complete(folder: Path) -> bool:
    """Returns whether every recorded file is there in its recorded size."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Returns a run's checkpoint folders, newest first, whole or not."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def last_complete(output_dir: Path) -> Path | None:
    """Returns the newest whole checkpoint, or None."""
    return next((path for path in checkpoints_of(output_dir) if is_complete(path)), None)


def check_output_dir(output_dir: Path, resumes: bool) -> None:
    """Makes the run's folder; raises ValueError where an earlier run left checkpoints, and as :func:`make_output_dir`."""
    make_output_dir(output_dir)
    if checkpoints_of(output_dir) and not resumes:
        raise ValueError(
            f"--output_dir {output_dir} holds checkpoints of an earlier run; go on with --resume_from_checkpoint latest, or "
            "choose another folder."
        )


def make_output_dir(output_dir: Path) -> None:
    """Makes a folder; raises ValueError where a file is in the way, OSError where nothing can be written."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"--output_dir {output_dir} cannot be a folder, a file is in the way; choose another folder."
        ) from None
    except OSError as error:
        raise OSError(
            f"--output_dir {output_dir} cannot be made ({error.strerror}); choose another folder."
        ) from None
    if not os.access(output_dir, os.W_OK):
        raise PermissionError(f"--output_dir {output_dir} is not writable; choose another folder.")


def choose_checkpoint(wanted: str, output_dir: Path) -> Path:
    """Returns the whole checkpoint to resume from: the wanted one, else the newest whole one before it, with a warning.

    Args:
        wanted: 'latest' or a checkpoint folder.
        output_dir: the run's folder, for 'latest'.

    Raises:
        ValueError: if the folder does not exist or no whole checkpoint is left.
    """
    if wanted == "latest":
        candidates = checkpoints_of(output_dir)
    else:
        folder = Path(wanted)
        if not folder.is_dir():
            raise ValueError(
                f"--resume_from_checkpoint {wanted}: no such folder; give 'latest' or a checkpoint folder."
            )
        beside = checkpoints_of(folder.parent)
        candidates = beside[beside.index(folder) :] if folder in beside else [folder]
    for folder in candidates:
        if is_complete(folder):
            logger.info("resuming from %s", folder)
            return folder
        logger.warning(
            "%s is not whole (the run was cut while it was saved); the one before it is used.", folder
        )
    raise ValueError(
        f"--resume_from_checkpoint {wanted}: no whole checkpoint found; start again without this flag."
    )
