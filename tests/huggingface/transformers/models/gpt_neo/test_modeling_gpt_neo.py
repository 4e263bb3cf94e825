"""GPT-Neo on the attention interface against upstream's eager attention, on sequences, caches, padding and trees."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, StaticCache
from transformers.cache_utils import DynamicCache

from huggingface.transformers.masking_utils import attention_mask_from, visible_in_step
from huggingface.transformers.models.gpt_neo.modeling_gpt_neo import SpecGPTNeoForCausalLM

WINDOW = 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A checkpoint that stock transformers saved."""
    torch.manual_seed(1)
    config = GPTNeoConfig(
        vocab_size=29,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=WINDOW,
        max_position_embeddings=96,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.1,
    )
    directory = tmp_path_factory.mktemp("stock")
    GPTNeoForCausalLM(config).save_pretrained(directory)
    return str(directory)


def _pair(saved: str, implementation: str, dtype: torch.dtype):
    ours = SpecGPTNeoForCausalLM.from_pretrained(
        saved, attn_implementation=implementation, dtype=dtype
    ).eval()
    theirs = GPTNeoForCausalLM.from_pretrained(saved, dtype=dtype).eval()
    return ours, theirs


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_upstream_past_the_window(saved, implementation):
    ours, theirs = _pair(saved, implementation, torch.float32)
    ids = torch.randint(1, 29, (2, 5 * WINDOW))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padded_batch_generates_what_upstream_generates(saved, implementation):
    ours, theirs = _pair(saved, implementation, torch.float32)
    ids = torch.randint(1, 29, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[2, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


def test_static_cache_equals_dynamic_past_the_window(saved):
    """Upstream's own local layers go by slot and fail this."""
    ours, _ = _pair(saved, "sdpa", torch.float32)
    ids = torch.randint(1, 29, (1, 3 * WINDOW))
    static = StaticCache(config=ours.config, max_cache_len=64)
    with torch.no_grad():
        plain = ours(ids).logits[:, -1]
        ours(ids[:, :-1], past_key_values=static)
        stepped = ours(ids[:, -1:], past_key_values=static).logits[:, -1]
    torch.testing.assert_close(stepped, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("prefix", [3, WINDOW - 2, 3 * WINDOW])
def test_tree_equals_one_causal_pass_per_branch(saved, implementation, prefix):
    """Also where prefix and tree cross the window, and where siblings shift slots against positions."""
    ours, theirs = _pair(saved, implementation, torch.float64)
    parents = [-1, 0, 0, 1, 1, 2, 3]
    paths = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    context = torch.randint(1, 29, (1, prefix))
    tree = torch.randint(1, 29, (1, len(parents)))
    ancestors = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node, path in enumerate(paths):
        ancestors[node, path] = True
    positions = torch.tensor([[prefix + len(path) - 1 for path in paths]])
    masks = {
        kind: attention_mask_from(
            visible_in_step(
                ancestors[None, None], positions, torch.tensor([prefix]), prefix, window, ragged=False
            ),
            torch.float64,
        )
        for kind, window in (("global", None), ("local", WINDOW))
    }
    cache = DynamicCache()
    with torch.no_grad():
        ours(context, past_key_values=cache)
        got = ours(tree, past_key_values=cache, attention_mask=masks, position_ids=positions).logits
        for node, path in enumerate(paths):
            branch = torch.cat([context, tree[:, path]], dim=1)
            want = _double_precision(theirs, branch)
            torch.testing.assert_close(got[:, node], want, atol=1e-10, rtol=1e-10)


def _double_precision(theirs, ids):
    """Returns upstream's last logits with scores in float64; upstream forces float32 there, which costs 1e-7."""
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

    def attend(self, query, key, value, attention_mask=None):
        scores = query @ key.transpose(-1, -2)
        causal = self.bias[:, :, key.shape[2] - query.shape[2] : key.shape[2], : key.shape[2]]
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        return weights @ value, weights

    original = GPTNeoSelfAttention._attn
    GPTNeoSelfAttention._attn = attend
    try:
        return theirs(ids).logits[:, -1]
    finally:
        GPTNeoSelfAttention._attn = original


def test_unknown_layer_kind_is_refused(saved):
    config = GPTNeoConfig.from_pretrained(saved)
    config.attention_layers = ["global", "sparse", "global", "local"]
    with pytest.raises(ValueError, match="attention_types"):
        SpecGPTNeoForCausalLM(config)
