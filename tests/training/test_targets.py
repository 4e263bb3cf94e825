from __future__ import annotations

import json

import torch

from training.targets import (
    Continuer,
    own_continuations,
    read_targets,
    targets_key,
    unique_prompts,
    write_missing,
)

from .conftest import make_model


class Counting(Continuer):
    """Counts the prompts it was asked for."""

    def __call__(self, prompts):
        for chosen, texts in super().__call__(prompts):
            self.asked.extend(chosen)
            yield chosen, texts


def continuer(model, kind=Continuer) -> Continuer:
    made = kind(model, 0, 0, 8, 3)
    object.__setattr__(made, "asked", [])
    return made


def test_targets_are_plain_greedy_decoding(tiny_model, token_set):
    texts = own_continuations(continuer(tiny_model), unique_prompts(token_set, 5))
    for index in range(len(texts)):
        prompt, completion = texts.example(index)
        ids = torch.tensor([prompt])
        for token in completion:
            assert tiny_model(ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert len(completion) == 8 or completion[-1] == 0
        assert 0 not in completion[:-1]


def test_a_cut_run_writes_only_what_is_missing(tiny_model, token_set, tmp_path):
    examples = unique_prompts(token_set, 7)
    whole = own_continuations(continuer(tiny_model), examples)
    first = continuer(tiny_model, Counting)
    own_continuations(first, examples, tmp_path)
    assert len(first.asked) == len(examples)
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][: len(lines[4]) // 2]]))
    second = continuer(tiny_model, Counting)
    again = own_continuations(second, examples, tmp_path)
    assert len(second.asked) == len(examples) - 3  # the first line is empty, the last one torn
    assert again.tokens.tolist() == whole.tokens.tolist()


def test_the_key_follows_weights_prompts_and_length(tokenizer):
    model = make_model(tokenizer)
    key = targets_key(continuer(model), [[1, 2]])
    assert key == targets_key(continuer(model), [[1, 2]])
    assert key != targets_key(continuer(model), [[1, 3]])
    assert key != targets_key(Continuer(model, 0, 0, 9, 3), [[1, 2]])
    model.streams.embedding.weight.data += 1
    assert key == targets_key(continuer(model), [[1, 2]])
    model.transformer.ln_f.weight.data += 1
    assert key != targets_key(continuer(model), [[1, 2]])


def test_processes_share_the_work(tiny_model, token_set, tmp_path):
    prompts = [token_set.example(index)[0] for index in range(5)]
    key = targets_key(continuer(tiny_model), prompts)
    for index in range(2):
        write_missing(continuer(tiny_model), prompts, tmp_path, key, (index, 2))
    assert sorted(read_targets(tmp_path, key)) == [0, 1, 2, 3, 4]
    rows = [
        json.loads(line)
        for path in tmp_path.glob("*.jsonl")
        for line in path.read_text().splitlines()
        if line
    ]
    assert len(rows) == 5
