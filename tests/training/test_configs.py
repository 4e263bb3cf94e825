from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.arguments import TrainingFlags
from training.models import model_from_file, read_model_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = {"spec_stream_9m": 9e6, "llama_9m": 8e6, "gpt_neo_125m": 93e6, "gpt_neo_1.3b": 1.23e9}


class Tokenizer:
    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self) -> int:
        return 8192


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_a_configuration_makes_a_model_of_its_size(name):
    path = CONFIGS / f"{name}.json"
    flags = TrainingFlags(mode="scratch", output_dir=Path("x"), model_config=path)
    with torch.device("meta"):
        model = model_from_file(flags, read_model_file(path), Tokenizer())
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(SIZES[name], rel=0.1)
    assert model.config.streams == 6
    assert model.config.stream_layers >= model.config.num_hidden_layers / 4
