"""Command line and YAML file -> `RunConfig`. The command line wins over the file, the file over the defaults."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from benchmark.config import RunConfig
from benchmark.errors import UsageError
from models import TECHNIQUES

DESCRIPTION = """Measure decoding techniques on the same prompts: speed, quality and agreement with the baseline.

exit codes: 0 all cells done; 1 the run could not start or go on; 2 bad arguments; 3 finished, but a cell failed or
a row was skipped; 130 interrupted, the same command resumes"""

IN_WORDS = {"N": "a whole number", "X": "a number", "N[,N...]": "whole numbers with commas between"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UsageErrors; for an unknown flag the nearest known one is named."""

    def values(self, words: Sequence[str]) -> dict[str, Any]:
        """Returns each flag's value by name."""
        given, unknown = self.parse_known_args(words)
        if unknown:
            raise UsageError(_unknown("argument", unknown[0], list(self._option_string_actions)))
        return vars(given)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: Sequence[str]) -> RunConfig:
    """Returns the options of a command line, with those of its `--config` file beneath.

    Raises:
        UsageError: unknown flag or YAML key (the nearest is named), unreadable file, wrong value.
    """
    flags = _parser().values([_with_underscores(word) for word in argv])
    file = flags.pop("config", None)
    values = _read_yaml(Path(file)) if file else {}
    known = _known()
    values |= {name: _read(known[name], text) for name, text in flags.items()}
    own = {name: values.pop(name) for name in technique_fields() if name in values}
    return RunConfig(**values, technique_options=own)


def technique_fields() -> dict[str, "Field[Any]"]:
    """Returns the fields of all techniques that are flags beside those of the run."""
    own = {item.name for item in fields(RunConfig)}
    every = (
        item
        for technique in TECHNIQUES.values()
        for item in fields(technique)  # type: ignore[arg-type]  # typed by a base that is none, yet all are dataclasses
    )
    return {item.name: item for item in every if item.name not in own}


def _known() -> dict[str, "Field[Any]"]:
    run = {item.name: item for item in fields(RunConfig) if "help" in item.metadata}
    return run | technique_fields()


def _with_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    flag = flag.replace("-", "_")
    return "--" + ("no-" + flag[3:] if flag.startswith("no_") else flag) + equals + value


def _epilog() -> str:
    lines = [f"  {name:<15} {technique.summary}" for name, technique in TECHNIQUES.items()]
    return "\n".join(["techniques:", *lines])


def _parser() -> Parser:
    parser = Parser(
        prog="dataset_tps.py",
        description=DESCRIPTION,
        epilog=_epilog(),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="options in a file; the command line wins")
    for item in _known().values():
        _add_flag(parser, item)
    return parser


def _add_flag(parser: Parser, item: "Field[Any]") -> None:
    text = item.metadata["help"].replace("%", "%%") + f" [{_shown(item.default)}]"
    if item.type is bool:
        parser.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, help=text)
        return
    names = [f"--{name}" for name in (item.name, item.metadata.get("alias")) if name]
    choices = item.metadata.get("choices")
    shape = "{" + ",".join(choices) + "}" if choices else _shape(item)
    parser.add_argument(*names, dest=item.name, metavar=shape, help=text)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "off"
    return "none" if value is None else str(value)


def _read(item: "Field[Any]", text: Any) -> Any:
    if isinstance(text, bool):
        return text
    try:
        kind = str if item.default is None else type(item.default)
        return item.metadata.get("read", kind)(text)
    except ValueError:
        shape = _shape(item)
        raise UsageError(f"--{item.name} got '{text}', expected {IN_WORDS.get(shape, shape)}.") from None


def _shape(item: "Field[Any]") -> str:
    automatic = {int: "N", float: "X"}.get(type(item.default), "TEXT")
    return str(item.metadata.get("shape") or automatic)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]  # ships no type information

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds a {type(content).__name__}, expected 'flag: value' lines.")
    by_name = {
        name: item for item in _known().values() for name in (item.name, item.metadata.get("alias")) if name
    }
    pairs = [_from_yaml(path, str(key).replace("-", "_"), value, by_name) for key, value in content.items()]
    names = [
        by_name[key.value.replace("-", "_")].name for key, _ in yaml.compose(text, yaml.SafeLoader).value
    ]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--config {path} gives {name} more than once; leave one line of it.")
    return dict(pairs)


def _from_yaml(path: Path, key: str, value: Any, by_name: "dict[str, Field[Any]]") -> tuple[str, Any]:
    if key not in by_name:
        raise UsageError(f"--config {path}: " + _unknown("key", key, list(by_name)))
    item = by_name[key]
    if item.type is bool:
        if not isinstance(value, bool):
            raise UsageError(f"--config {path}: {key} got '{value}', expected true or false.")
        return item.name, value
    if value is None:
        if item.default is not None:
            raise UsageError(f"--config {path}: {key} has no value, expected {_shape(item)}.")
        return item.name, None
    if isinstance(value, dict):
        raise UsageError(f"--config {path}: {key} holds a mapping, expected {_shape(item)}.")
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return item.name, _read(item, text)


def _unknown(kind: str, word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.split("=")[0], known, n=1, cutoff=0.5)
    return f"unknown {kind} '{word}'" + (f": did you mean '{near[0]}'?" if near else "; see --help.")


def command_line(config: RunConfig) -> list[str]:
    """Returns the shortest argument list that gives this config again, for the command that resumes a run."""
    words: list[str] = []
    values = {item.name: getattr(config, item.name) for item in fields(config)} | dict(
        config.technique_options
    )
    for name, item in _known().items():
        value = values.get(name, item.default)
        if value == item.default or name == "overwrite":
            continue
        if item.type is bool:
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words
