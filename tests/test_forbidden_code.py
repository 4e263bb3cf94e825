"""No code of the project unpickles, evaluates text, starts a shell or runs a checkpoint's own code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "pickle": r"(?:import|from)\s+(?:pickle|dill|joblib|shelve|marshal)\b|allow_pickle\s*=\s*True",
    "torch.load": r"\btorch\.load\(",
    "eval(": r"(?<![\w.])eval\(",
    "exec(": r"(?<![\w.])exec\(",
    "shell": r"shell\s*=\s*True|\bos\.system\(|\bos\.popen\(",
    "remote code": r"trust_remote_code\s*=\s*True",
    "yaml.load(": r"\byaml\.(?:unsafe_|full_)?load\(",
}


def project_files() -> list[Path]:
    folders = ("huggingface", "models", "datasets_code", "benchmark", "precision", "training")
    return sorted(
        [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    )


@pytest.mark.parametrize("name", FORBIDDEN)
def test_project_code_has_none(name):
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in project_files()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(FORBIDDEN[name], line)
    ]
    assert not found


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pickle", "import pickle"), ("pickle", "from dill import load"), ("torch.load", "torch.load(path)"),
        ("eval(", "x = eval(text)"), ("exec(", "exec(code)"), ("shell", "run(cmd, shell=True)"),
        ("remote code", "f(trust_remote_code = True)"), ("yaml.load(", "yaml.load(file)"),
    ],
)  # fmt: skip
def test_search_finds_what_it_looks_for(name, line):
    assert re.search(FORBIDDEN[name], line)
    assert not re.search(FORBIDDEN[name], "model.eval() and yaml.safe_load(file)")
