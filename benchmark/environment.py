"""What a result depends on beside its options: versions, device, driver, commit, variables. Secrets are left out."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmark.machine import cpu_name, host_memory
from benchmark.redaction import HIDDEN, is_secret, redact

PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "triton", "flash_attn",
    "bitsandbytes", "torchao", "scikit-learn", "rouge-score", "sacrebleu", "matplotlib", "tqdm", "rich",
)  # fmt: skip
VARIABLES = (
    "CUDA_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH", "PYTORCH", "OMP_", "MKL_", "KMP_", "GOMP_", "NVIDIA_VISIBLE_DEVICES",
    "CUBLAS_", "TRITON_",
)  # fmt: skip


def collect(machine: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Returns the content of `environment.json`.

    Args:
        machine: what a worker said of its device.
        root: the project's folder, for its commit.
    """
    commit = _git(root, "rev-parse", "HEAD")
    changes = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    return {
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "device_name": machine.get("device_name"),
        "machine": dict(machine),
        "driver": _driver() if machine.get("cuda") else None,
        "cpu_name": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": host_memory()[1],
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit,
        "uncommitted_changes": changes if commit else None,
        "variables": variables(os.environ),
    }


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that can change a measurement, those that hold secrets by name only."""
    return {
        name: HIDDEN if is_secret(name) else redact(value, environment)
        for name, value in sorted(environment.items())
        if name.startswith(VARIABLES)
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *words: str) -> str | None:
    return _output("git", "-C", str(root), *words)


def _driver() -> str | None:
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
