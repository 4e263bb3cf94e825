"""A checkpoint named by its hub id: taken from the cache, or fetched if the hub answers at once."""

from pathlib import Path

from benchmark.errors import UsageError
from datasets_code.hub import PROBE_S, within

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]


def fetch(repo: str, flag: str = "--model_name_or_path") -> Path:
    """Returns the local directory of a hub checkpoint; pickled weights and code are never fetched.

    Args:
        repo: its id.
        flag: who asks, for messages.

    Raises:
        UsageError: there is no such folder here, and the hub has it not, or is out of reach while the cache lacks it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    try:
        if offline is None:
            within(PROBE_S, lambda: HfApi().model_info(repo, timeout=PROBE_S))
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        raise UsageError(
            f"{flag} {repo}: no such directory here, and the hub answers {status}; "
            "check the name, or set HF_TOKEN if the model is gated."
        ) from None
    except Exception as error:  # noqa: BLE001 - DNS, proxy, TLS, time: each means that the hub is out of reach
        offline = f"the hub does not answer ({type(error).__name__})"
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES, local_files_only=offline is not None))
    except Exception as error:  # noqa: BLE001 - the client's own family of errors is as wide
        why = offline or f"the download failed ({type(error).__name__})"
    raise UsageError(
        f"{flag} {repo}: no such directory, and as a hub id it is not in the local cache while {why}; "
        "give a checkpoint directory, or run once online (HF_HUB_OFFLINE=0)."
    )
