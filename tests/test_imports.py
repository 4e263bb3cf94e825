"""The parent process stays without torch: `--help`, argument errors and reports answer at once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "module",
    ["dataset_tps", "report", "sensitivity", "tune_spec_stream", "models", "datasets_code", "models.loading"],
)
def test_module_imports_no_torch(module):
    code = f"import {module}, sys; sys.exit(', '.join({{'torch', 'transformers'}} & set(sys.modules)) or 0)"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 0, child.stderr


def test_house_does_not_shadow_the_real_packages():
    code = "import transformers, huggingface.transformers as ours; print(transformers.__file__); print(ours.__file__)"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    upstream, ours = child.stdout.split()
    assert "site-packages" in upstream or "huggingface/transformers" not in upstream
    assert ours == str(ROOT / "huggingface" / "transformers" / "__init__.py")
