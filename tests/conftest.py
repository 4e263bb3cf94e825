"""Settings of every test: no network, one thread, kernels interpreted where there is no GPU."""

import os
from importlib.metadata import PackageNotFoundError, version

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read when torch is first imported; tiny models are slower on more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402  after the settings it reads


def _let_interpreter_loop() -> None:
    """Lets loops in interpreted kernels end at a loaded number, which it holds as an array of one element.

    NumPy 2.4 no longer takes such an array for a number, and Triton 3.6 relies on it.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:  # then there are no kernels to interpret
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


TRIED_TRITON = "3.6."
"""Version whose interpreter and compiler the kernel tests were tried with; beside another they are skipped, and say so."""


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


if not torch.cuda.is_available() and _triton_version().startswith(TRIED_TRITON):
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    _let_interpreter_loop()
