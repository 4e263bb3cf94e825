"""Says in words what a number was measured on: hardware, model, dtype, batch. Every figure and table quotes these."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmark.saved_run import SavedRun, is_measured

HARDWARE_KEYS = ("gpu_name", "device_name", "gpu", "cpu_name", "cpu", "processor", "device")
DATASET_LABELS = {
    "spider": "Spider",
    "dialogsum": "DialogSum",
    "e2e_nlg": "E2E-NLG",
    "synthetic": "synthetic",
    "wikitext2": "WikiText-2",
}


def dataset_label(name: str) -> str:
    """Returns a data set's name as its authors write it."""
    return DATASET_LABELS.get(name, name)


def hardware_label(run: SavedRun) -> str:
    """Returns the device the run was measured on."""
    for key in HARDWARE_KEYS:
        value = run.environment.get(key)
        if isinstance(value, list):
            value = ", ".join(dict.fromkeys(str(item) for item in value))
        if value:
            return str(value)
    return "hardware not recorded"


def model_label(run: SavedRun) -> str:
    """Returns the model in words: the label given to `report.py`, else its shape and directory."""
    if run.config.get("model_label"):
        return str(run.config["model_label"])
    path = str(run.config.get("model_name_or_path") or "model not recorded").rstrip("/")
    parts = ["/".join(path.split("/")[-1:]) if path.startswith(("/", ".", "checkpoints")) else path]
    parts += [text for text in (_shape(_model_config(run)),) if text]
    if run.config.get("random_weights"):
        parts.append("RANDOM WEIGHTS")
    return ", ".join(parts)


def dtype_label(run: SavedRun) -> str:
    """Returns the run's dtype, naming the techniques that differ from it."""
    dtypes = {str(row["model_type"]): str(row.get("dtype")) for row in run.rows if row.get("dtype")}
    if not dtypes:
        return str(run.config.get("dtype", "dtype not recorded"))
    common = Counter(dtypes.values()).most_common(1)[0][0]
    others = [f"{name}: {dtype}" for name, dtype in dtypes.items() if dtype != common]
    return f"{common} ({', '.join(others)})" if others else common


def batch_label(sizes: tuple[int, ...]) -> str:
    """Returns the batch sizes in words."""
    return f"batch {', '.join(str(size) for size in sizes)}" if sizes else "no batch size"


def setting_label(run: SavedRun, batch_sizes: tuple[int, ...] | None = None) -> str:
    """Returns hardware, model, dtype and batch on one line, for a figure's title."""
    sizes = run.batch_sizes if batch_sizes is None else batch_sizes
    return " · ".join((hardware_label(run), model_label(run), dtype_label(run), batch_label(sizes)))


def workload_label(run: SavedRun) -> str:
    """Returns prompts, lengths, repeats, decoding rule and data source, as far as the run recorded them."""
    config = run.config
    known = (
        ("max_new_tokens", "at most {} new tokens"),
        ("num_runs", "median of {} runs"),
        ("draft_nodes", "draft nodes: {}"),
    )
    answered = {int(row["prompts"]) for row in run.ok_rows() if row.get("prompts")}
    span = " to ".join(str(count) for count in sorted({min(answered), max(answered)})) if answered else ""
    parts = [f"{span} prompts a data set"] if span else []
    parts += [text.format(config[key]) for key, text in known if config.get(key) is not None]
    temperature = config.get("temperature")
    parts.append(f"sampling at temperature {temperature}" if temperature else "greedy")
    sources = config.get("data_source")
    if sources:
        parts.append(f"data: {_sources(sources)}")
    if measured := run.environment.get("created_utc"):
        parts.append(f"measured {str(measured)[:10]}")
    return ", ".join(parts)


def failures(run: SavedRun) -> list[str]:
    """Returns one sentence per cell without a number, with its reason."""
    return [
        f"{row['model_type']} on {dataset_label(str(row['dataset']))}, batch {row['batch_size']}: "
        f"{row['status']} ({row.get('reason') or 'no reason recorded'})"
        for row in run.rows
        if not is_measured(row)
    ]


def remarks(run: SavedRun) -> list[str]:
    """Returns what a reader of the numbers must know: paths that fell back, prompts left out or cut, scores missing."""
    found: dict[str, None] = {}
    for row in run.ok_rows():
        where = f"{row['model_type']} on {dataset_label(str(row['dataset']))}"
        found |= dict.fromkeys(f"{row['model_type']}: {fallback}" for fallback in row.get("fallbacks") or ())
        unavailable = (row.get("quality_unavailable") or {}).items()
        found |= dict.fromkeys(
            f"{dataset_label(str(row['dataset']))}: no {name}: {why}" for name, why in unavailable
        )
        for field, text in (
            ("prompts_truncated", "prompts truncated"),
            ("prompts_skipped", "prompts skipped"),
        ):
            found |= {f"{where}: {row[field]} {text}": None} if row.get(field) else {}
    return list(found)


def _sources(sources: Any) -> str:
    """Returns where the prompts came from, by data set where it is not the same for all."""
    if not isinstance(sources, Mapping):
        return str(sources)
    words = {name: _source(str(source)) for name, source in sources.items()}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return "; ".join(f"{dataset_label(name)} {source}" for name, source in words.items())


def _source(source: str) -> str:
    if source.startswith("data_dir:"):
        return "official release files"
    return "the project's own samples" if source == "samples" else source


def _model_config(run: SavedRun) -> Mapping[str, Any]:
    for key in ("model_config", "model"):
        if isinstance(run.config.get(key), Mapping):
            return run.config[key]
    return {}


def _shape(config: Mapping[str, Any]) -> str:
    layers = config.get("num_hidden_layers") or config.get("num_layers")
    hidden, vocab = config.get("hidden_size"), config.get("vocab_size")
    return f"{layers} layers x {hidden}, vocabulary {vocab}" if layers and hidden else ""
