"""What a model says of given tokens: one forward pass, no decoding loop, so that it can judge any decoder's output."""

from __future__ import annotations

from typing import Any

import torch

from models.answer import Scores


@torch.no_grad()
def score_tokens(model: Any, prompt_ids: list[int], token_ids: list[int]) -> Scores:
    """Returns log-probabilities and logit distances of tokens after a prompt, computed in float32 from the model's logits.

    Args:
        model: a causal language model.
        prompt_ids: at least one id.
        token_ids: the tokens to judge; each is judged after all before it.
    """
    if not token_ids:
        return Scores([], [], [])
    ids = torch.tensor([prompt_ids + token_ids], device=model.device)
    output = model(input_ids=ids, use_cache=False, logits_to_keep=len(token_ids) + 1)
    logits = output.logits[0, :-1].float()
    given = torch.tensor(token_ids, device=logits.device)[:, None]
    own = logits.gather(1, given)[:, 0]
    best = logits.topk(2, dim=-1).values
    return Scores(
        logprobs=(own - logits.logsumexp(-1)).tolist(),
        margins=(best[:, 0] - best[:, 1]).tolist(),
        gaps=(best[:, 0] - own).tolist(),
    )
