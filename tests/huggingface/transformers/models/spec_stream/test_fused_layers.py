"""The fused walk is the eager walk: same rows, same weights, same checkpoint; what it does not know it refuses.

Everything runs on the plain references here, in float64, so that a difference is a mistake and not a rounding.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from huggingface.transformers.cache_utils import StaticTreeCache
from huggingface.transformers.generation.decode_step import DecodeState, _forward
from huggingface.transformers.generation.draft_tree import DraftTree, TreeShape
from huggingface.transformers.integrations.divided_linear import Parts
from huggingface.transformers.integrations.fused_norm import settle
from huggingface.transformers.integrations.tree_attention import AttentionWorkspace, StepRows
from huggingface.transformers.integrations.tree_drafting import as_bits
from huggingface.transformers.models.spec_stream import fused_layers
from huggingface.transformers.models.spec_stream.fused_layers import FusedLayers, fused_layers_of
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.quantizer import quantize_model

EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def fresh(make_model):
    """Returns `fresh(architecture, dtype, **fields)`: a model of one's own, whose weights may be laid out anew."""
    return lambda *args, **fields: copy.deepcopy(make_model(*args, **fields))


class Walk:
    """A fused walk with a cache of its own."""

    def __init__(self, model, batch: int, slots: int = 90):
        self.model, self.layers = model, FusedLayers(model)
        self.cache = StaticTreeCache.for_model(model, batch, slots, 1)
        keys = self.cache.layers[0].keys
        heads = model.config.num_attention_heads
        self.space = AttentionWorkspace.for_step(
            batch, 80, heads, keys.shape[1], keys.shape[3], slots, model.device
        )

    def run(self, indices, hidden, update, positions, lengths, rows):
        rotary = self.model.rotary(hidden, positions)
        return self.layers.run(indices, hidden, update, rotary, lengths, rows, self.cache, self.space)

    def whole(self, tokens, positions, lengths, rows, with_streams):
        """Returns states after the last norm; `with_streams` says what follows the rows below the stream layers."""
        model, first = self.model, self.model.first_stream_layer
        hidden = model.embed_rows(tokens, positions).contiguous()
        plain = StepRows(rows.nodes, 0, rows.ancestors, rows.depths)
        hidden, update = self.run(range(first), hidden, None, positions, lengths, plain)
        if with_streams is not None:
            hidden, update = settle(hidden, update), None
            hidden, positions = with_streams(hidden)
        upper = range(first, len(model.decoder_layers()))
        hidden, update = self.run(upper, hidden, update, positions, lengths, rows)
        return model.final_norm(settle(hidden, update))


def sequences(model, ids: torch.Tensor, anchors: torch.Tensor, streams: int) -> torch.Tensor:
    """Returns (batch, seq + streams, hidden) states of whole sequences, the streams' last."""
    batch, seq = ids.shape
    positions = torch.arange(seq).expand(batch, seq)

    def append(hidden):
        at = anchors[:, None, None].expand(-1, 1, hidden.shape[2])
        started = model.streams.start(hidden.gather(1, at), streams)
        numbers = torch.arange(1, streams + 1)
        return torch.cat([hidden, started], 1), torch.cat([positions, anchors[:, None] + numbers], 1)

    rows = StepRows(seq, streams, anchors=anchors if streams else None)
    lengths = torch.zeros(batch, dtype=torch.int64)
    return Walk(model, batch).whole(ids, positions, lengths, rows, append if streams else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch, seq, streams", [(1, 1, 0), (1, 7, 3), (3, 20, 2), (2, 40, 3), (2, 13, 0)])
@torch.no_grad()
def test_sequences_equal_the_eager_walk(architecture, dtype, batch, seq, streams, fresh):
    """Shorter and longer than the local window of 8; few rows, where products add the residual, and many, where norms do."""
    model = fresh(architecture, dtype)
    assert any(parameter.abs().sum() for name, parameter in model.named_parameters() if "lora" in name)
    ids = torch.randint(1, 13, (batch, seq), generator=torch.Generator().manual_seed(seq))
    anchors = torch.arange(batch) % seq + (seq - 1) // 2
    anchors = anchors.clamp(max=seq - 1)
    want, stream_want = model.stream_forward(ids, anchors[:, None], streams=streams)
    got = sequences(model, ids, anchors, streams)
    close = {"atol": EXACT[dtype], "rtol": EXACT[dtype]}
    torch.testing.assert_close(got[:, :seq], want, **close)
    if streams:
        torch.testing.assert_close(got[:, seq:], stream_want[:, 0], **close)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("streams, lora", [(0, 2), (3, 0), (3, 2)])
@torch.no_grad()
def test_products_in_parts_equal_the_eager_walk(architecture, streams, lora, count, fresh, monkeypatch):
    """More than 32 rows, where output and second MLP product are left in parts, but for those whose streams LoRA changes."""
    model = fresh(architecture, torch.float32, lora_rank=lora)
    ids = torch.randint(1, 13, (2, 40), generator=torch.Generator().manual_seed(count))
    anchors = torch.tensor([39, 17])
    want, stream_want = model.stream_forward(ids, anchors[:, None], streams=streams)
    divided = []

    def parts_for(rows, weight):
        divided.append(rows.shape[1])
        return count

    monkeypatch.setattr(fused_layers, "runs_here", lambda rows, inner: rows <= 32)
    monkeypatch.setattr(fused_layers, "parts_for", parts_for)
    got = sequences(model, ids, anchors, streams)
    layers, first = len(model.decoder_layers()), model.first_stream_layer
    above = 0 if streams and lora else layers - first
    assert divided == [40] * (2 * first) + [40 + streams] * (2 * above)
    close = {"atol": EXACT[torch.float32], "rtol": EXACT[torch.float32]}
    torch.testing.assert_close(got[:, :40], want, **close)
    if streams:
        torch.testing.assert_close(got[:, 40:], stream_want[:, 0], **close)


@torch.no_grad()
def test_packed_products_are_not_divided(fresh, monkeypatch):
    model = quantize_model(fresh("llama", torch.float32, lora_rank=0), PackedWeightsConfig(bits=8))
    monkeypatch.setattr(fused_layers, "runs_here", lambda rows, inner: False)
    monkeypatch.setattr(fused_layers, "parts_for", lambda rows, weight: 2)
    walk, ids = Walk(model, 1), torch.ones(1, 5, dtype=torch.int64)
    hidden = model.embed_rows(ids, torch.arange(5)[None]).contiguous()
    lengths = torch.zeros(1, dtype=torch.int64)
    _, update = walk.run(range(1), hidden, None, torch.arange(5)[None], lengths, StepRows(5))
    assert not isinstance(update, Parts)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("parents", [(-1,), (-1, 0, 1, 2), (-1, 0, 0, 1, 1, 2, 5, 0, 7, 3)])
@pytest.mark.parametrize("streams", [0, 2])
@torch.no_grad()
def test_a_tree_behind_a_prompt_equals_the_eager_step(architecture, lora, parents, streams, fresh):
    """Ragged committed rows, siblings, and windows that end inside the tree."""
    model = fresh(architecture, lora_rank=lora)
    shape, batch = TreeShape(parents, streams), 2
    generator = torch.Generator().manual_seed(len(parents))
    prompts = torch.randint(1, 13, (batch, 11), generator=generator)
    lengths = torch.tensor([11, 4])
    tokens = torch.randint(1, 13, (batch, shape.nodes), generator=generator)
    eager = StaticTreeCache.for_model(model, batch, 20, shape.rows)
    model.stream_forward(prompts, lengths[:, None] - 1, eager, streams=0)
    state = DecodeState(tokens[:, 0], lengths, torch.zeros(batch, dtype=torch.bool), None, [], 11, 4)
    want, stream_want, _ = _forward(model, eager, state, DraftTree(shape, tokens), None)

    walk = Walk(model, batch, 20 + shape.rows)
    positions = torch.arange(11).expand(batch, 11)
    walk.whole(prompts, positions, torch.zeros(batch, dtype=torch.int64), StepRows(11), None)
    depths = torch.tensor([shape.depths] * batch, dtype=torch.int32)
    bits = torch.tensor([[as_bits(set(shape.path(node))) for node in range(shape.nodes)]] * batch)
    rows = StepRows(shape.nodes, streams, bits, depths)
    positions = lengths[:, None] + depths

    def append(hidden):
        numbers = torch.arange(1, streams + 1)
        further = (positions[:, :, None] + numbers).flatten(1)
        return torch.cat([hidden, model.streams.start(hidden, streams)], 1), torch.cat(
            [positions, further], 1
        )

    got = walk.whole(tokens, positions, lengths, rows, append if streams else None)
    torch.testing.assert_close(got[:, : shape.nodes], want, atol=1e-10, rtol=1e-10)
    if streams:
        torch.testing.assert_close(got[:, shape.nodes :], stream_want.flatten(1, 2), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_lora_reaches_stream_rows_and_no_others(architecture, fresh):
    """The comparison with the eager walk can fail: without its update every stream changes, and no token row does."""
    model = fresh(architecture)
    ids, anchors = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([4])
    before = sequences(model, ids, anchors, 2)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.zero_()
    after = sequences(model, ids, anchors, 2)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before - after)[:, 6:].abs().amax(-1) > 1e-3).all()


def test_values_and_names_stay(architecture, fresh, make_model):
    model, before = fresh(architecture, seed=3), make_model(architecture, seed=3).state_dict()
    FusedLayers(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_are_not_held_twice(architecture, fresh):
    model = fresh(architecture)
    fused, names = FusedLayers(model), model.layer_names
    for index, layer in enumerate(model.decoder_layers()):
        own = fused.layers[index]
        groups = [
            (own.project, names.projections), (own.output, (names.output,)),
            (own.expand, names.expand), (own.contract, (names.contract,)),
        ]  # fmt: skip
        for product, parts in groups:
            weights = [layer.get_submodule(part).weight for part in parts]
            start = product.weight.data_ptr()
            for weight in weights:
                assert weight.data_ptr() == start
                start += weight.nbytes
            assert product.weight.nbytes == sum(weight.nbytes for weight in weights)


@pytest.mark.parametrize("packed", [{"bits": 8}, {"bits": 4, "group_size": 32, "zero_point": True}])
def test_packed_weights_are_not_held_twice(packed, architecture, fresh):
    """Integers, scales and zero points of modules that share a product are views of the product's."""
    model = quantize_model(fresh(architecture, torch.float32), PackedWeightsConfig(**packed))
    before = sum(parameter.nbytes for parameter in model.parameters())
    fused, names = FusedLayers(model), model.layer_names
    storages = {parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}
    for index, layer in enumerate(model.decoder_layers()):
        own = fused.layers[index]
        for product, parts in ((own.project, names.projections), (own.expand, names.expand)):
            for name, together in product.weight.tensors().items():
                tensors = [getattr(layer.get_submodule(part), name) for part in parts]
                assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {together.data_ptr()}
                assert together.nbytes == sum(tensor.nbytes for tensor in tensors)
    assert sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) == before


@torch.no_grad()
def test_a_weight_loaded_in_place_is_seen(architecture, fresh):
    """Parameters and fused weights are one memory: a checkpoint loaded later reaches both."""
    model, other = fresh(architecture), fresh(architecture, seed=7)
    walk = Walk(model, 1)
    model.load_state_dict(other.state_dict())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    positions = torch.arange(5)[None]
    got = walk.whole(ids, positions, torch.zeros(1, dtype=torch.int64), StepRows(5), None)
    want, _ = other.stream_forward(ids, torch.tensor([[4]]), streams=0)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_fusing_twice_changes_nothing(architecture, fresh):
    model = fresh(architecture)
    ids, anchors = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([4])
    first = sequences(model, ids, anchors, 3)
    assert torch.equal(sequences(model, ids, anchors, 3), first)


@pytest.mark.parametrize("base", [False, True])
def test_checkpoints_survive_fusing(architecture, base, fresh, tmp_path):
    """Weights are views of one tensor then; what is saved must be each by itself, no more and no less."""
    model = fresh(architecture, torch.float32)
    model.save_pretrained(tmp_path / "plain")
    FusedLayers(model)
    model.save_pretrained(tmp_path / "fused")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "fused")]
    assert sizes[0] == sizes[1]
    again = type(model).from_pretrained(tmp_path / "fused")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    if base:
        model.config.base_model_name_or_path = str(tmp_path / "plain")
        model.save_pretrained(tmp_path / "streams")
        again = type(model).from_pretrained(tmp_path / "streams")
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


@torch.no_grad()
def test_projections_with_bias(fresh):
    model = fresh("llama", attention_bias=True, hidden_size=32)
    for layer in model.decoder_layers():
        for name in model.layer_names.projections:
            nn.init.normal_(layer.get_submodule(name).bias)
    ids, anchors = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([4])
    want, streams = model.stream_forward(ids, anchors[:, None], streams=2)
    got = sequences(model, ids, anchors, 2)
    torch.testing.assert_close(got, torch.cat([want, streams[:, 0]], 1), atol=1e-10, rtol=1e-10)


def test_layers_are_fused_once_and_anew_for_other_weights(make_model):
    model = copy.deepcopy(make_model("gpt_neo"))
    layers = fused_layers_of(model)
    assert fused_layers_of(model) is layers
    with torch.no_grad():
        model.streams.embedding.weight.add_(1)  # as training does; read where it is
    assert fused_layers_of(model) is layers
    last = model.decoder_layers()[-1].get_submodule(model.layer_names.contract)
    last.weight = nn.Parameter(last.weight.detach().clone())
    assert fused_layers_of(model) is not layers


def test_a_copy_of_a_model_lays_out_its_own_weights(make_model):
    model = copy.deepcopy(make_model("gpt_neo"))
    layers = fused_layers_of(model)
    twin = copy.deepcopy(model)
    assert fused_layers_of(twin) is not layers
    first = twin.decoder_layers()[0].get_submodule(twin.layer_names.output)
    assert fused_layers_of(twin).layers[0].output.weight.data_ptr() == first.weight.data_ptr()
    assert fused_layers_of(pickle.loads(pickle.dumps(model))) is not layers  # noqa: S301 - our own bytes
