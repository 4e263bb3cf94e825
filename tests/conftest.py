"""Settings of every test: no network, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read when torch is first imported; tiny models are slower on more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
