from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training.batches import IGNORE, Collator
from training.objective import LossWeights, StreamObjective, stream_losses
from training.tokens import Encoded, pack

from .conftest import make_model

WEIGHTS = LossWeights(1.0, 0.5, (1.0, 1.0))
EXAMPLES = pack([Encoded([[3, 4, 5], [6]], [[7, 8, 9, 0], [2, 1, 0]])], ("hand",))


class Oracle(nn.Module):
    """Knows every token to come: its states are the tokens' one-hot rows, and the head is the identity."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(30.0))
        self.config = SimpleNamespace(pruning_rank=0)
        self.first_stream_layer = 1

    def one_hot(self, tokens):
        return F.one_hot(tokens, 10).float() * self.scale

    def stream_forward(self, input_ids, anchors):
        padded = F.pad(input_ids, (0, 4))
        offsets = torch.arange(2, 4)
        streams = padded.gather(1, (anchors[:, :, None] + offsets).flatten(1)).view(*anchors.shape, 2)
        return self.one_hot(padded[:, 1 : 1 + input_ids.shape[1]]), self.one_hot(streams)

    def get_output_embeddings(self):
        return nn.Identity()

    def stream_logits(self, hidden, parents):
        return hidden


def loss_of(model, batch, weights=WEIGHTS) -> dict[str, torch.Tensor]:
    return StreamObjective(model, weights)(**batch)


def test_a_model_that_knows_the_future_has_no_loss():
    output = loss_of(Oracle(), Collator(EXAMPLES, 2, 0)([0, 1]))
    assert output["loss"] < 1e-6
    named = dict(
        zip(
            StreamObjective(Oracle(), LossWeights(1, 1, (1.0, 1.0))).metric_names,
            output["metrics"],
            strict=True,
        )
    )
    assert named["main_accuracy"] == named["stream_1_accuracy"] == named["stream_2_accuracy"] == 1


@pytest.mark.parametrize("name", ["completion_labels", "stream_labels"])
def test_labels_one_place_off_are_seen(name):
    batch = Collator(EXAMPLES, 2, 0)([0, 1])
    batch[name] = batch[name].roll(1, dims=0)
    assert loss_of(Oracle(), batch)["loss"] > 5


def test_streams_take_labels_of_their_own():
    batch = Collator(EXAMPLES, 2, 0)([0, 1])
    batch["stream_labels"] = batch["stream_labels"].flip(1)
    assert loss_of(Oracle(), batch)["loss"] > 5


@pytest.mark.parametrize("weights", [(1.0, 0.0, (0.5, 0.1)), (0.7, 0.3, (0.0, 2.0)), (0.0, 0.0, (1.0, 1.0))])
def test_loss_equals_a_plain_loop(tokenizer, token_set, weights):
    model = make_model(tokenizer)
    nn.init.normal_(model.streams.transition_out.weight, std=0.1)
    batch = Collator(token_set, 2, 0)([0, 3, 5])
    output = loss_of(model, batch, LossWeights(*weights))
    torch.testing.assert_close(
        output["loss"], plain_loss(model, token_set, [0, 3, 5], *weights), rtol=1e-4, atol=1e-5
    )


def plain_loss(model, examples, indices, main_weight, prompt_weight, stream_weights) -> torch.Tensor:
    """The definition, one example and one position at a time, without padding."""
    parts: dict[str, list[torch.Tensor]] = {"main": [], "prompt": [], "0": [], "1": []}
    for index in indices:
        prompt, completion = examples.example(index)
        ids = torch.tensor([prompt + completion])
        rows = torch.arange(ids.shape[1])[None]
        main, streams = model.stream_forward(ids, rows)
        logits = model.get_output_embeddings()(main[0])
        for row in range(ids.shape[1] - 1):
            part = "prompt" if row < len(prompt) - 1 else "main"
            parts[part].append(F.cross_entropy(logits[row], ids[0, row + 1]))
        for row in range(len(prompt) - 1, ids.shape[1]):
            for j in (1, 2):
                if row + 1 + j < ids.shape[1]:
                    hidden = streams[0, row, j - 1]
                    said = model.stream_logits(hidden[None], ids[0, row + j][None])[0]
                    parts[str(j - 1)].append(F.cross_entropy(said, ids[0, row + 1 + j]))
    mean = {name: torch.stack(values).mean() for name, values in parts.items()}
    total = main_weight * mean["main"] + prompt_weight * mean["prompt"]
    return total + sum(weight * mean[str(j)] for j, weight in enumerate(stream_weights))


def test_a_stream_without_labels_adds_nothing():
    losses, accuracy = stream_losses(torch.randn(2, 2, 5), torch.tensor([[1, IGNORE], [2, IGNORE]]))
    assert losses[0] > 0
    assert losses[1] == accuracy[1] == 0


def test_a_batch_without_anchors_still_has_gradients(tokenizer):
    examples = pack([Encoded([[3, 4]], [[0]])], ("x",))
    output = loss_of(make_model(tokenizer), Collator(examples, 2, 0)([0]))
    output["loss"].backward()
    assert torch.isfinite(output["loss"])


def test_the_pruning_head_learns_without_touching_the_layers_below(tokenizer, token_set):
    model = make_model(tokenizer, pruning_rank=3)
    loss_of(model, Collator(token_set, 2, 0)([0, 1]), LossWeights(0.0, 0.0, (0.0, 0.0)))["loss"].backward()
    assert model.streams.pruning_up.weight.grad.abs().sum() > 0
    grad = model.decoder_layers()[0].mlp.c_fc.weight.grad
    assert grad is None or grad.abs().sum() == 0
