"""The decode step on fused kernels: fixed buffers, no host work, the same phases as `decode_step.py`.

A tree has no host-side shape here: it is grown on the device, best first, so its parents, depths and ancestor bits are tensors.
Everything that varies between steps (lengths, tokens, the tree) lives in buffers with fixed addresses, so that a step can be
captured once and replayed. The order of the phases is turned by one::

    prefill  draft | forward  verify  commit  draft | forward  verify  commit  draft | ...

What a step emits is known after `verify`; while the host reads it, the device commits and drafts.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..cache_utils import StaticTreeCache
from ..integrations.context_lookup import lookup_continuation
from ..integrations.fused_norm import add_norm, settle
from ..integrations.head_linear import head_linear
from ..integrations.quantized_linear import QuantizedLinear
from ..integrations.row_inputs import embed_nodes, start_streams
from ..integrations.skinny_linear import DTYPES
from ..integrations.tree_acceptance import (
    BestTokensWorkspace,
    StepState,
    accept_and_advance,
    best_tokens,
    commit_rows,
)
from ..integrations.tree_attention import AttentionWorkspace, StepRows
from ..integrations.tree_drafting import DraftWorkspace, TreeTensors, draft_tree
from ..models.spec_stream.fusable import embedding_tables
from ..models.spec_stream.fused_layers import fused_layers_of
from .draft_settings import rank_accuracy
from .tree_tuning import DraftPlan
from .verification import Rule

MOST_HEAD_ROWS, MOST_EXACT_HEAD_ROWS = 256, 64
"""Rows of nodes and streams that go through the LM head together, in half precision and otherwise (float32, packed heads). Up to
here it is read once for what would take two readings, one after the other: of the nodes', then of the accepted node's streams;
more rows compute longer than it is read. Measured in bfloat16 on an H200, to 160 rows; the rest follows from its arithmetic."""
LEAST_SHARE = 1e-4
"""Accuracy assumed of a rank that calibration never saw right; its logarithm must be finite."""


class FusedStep:
    """Buffers and phases of decoding a batch.

    Args:
        model: decoder with streams whose layers can be fused.
        batch: sequences.
        capacity: committed rows a sequence can have.
        plan: what to draft.
        rule: how the target picks tokens; one that looks at scores alone.
    """

    def __init__(self, model: Any, batch: int, capacity: int, plan: DraftPlan, rule: Rule):
        device, dtype = model.device, model.dtype
        # Not held: the model holds its runners, and these would hold each other.
        self.model = weakref.proxy(model)
        self.plan, self.rule = plan, rule
        self.layers = fused_layers_of(model)
        self.embeddings = embedding_tables(model)
        self.nodes = plan.shape.nodes
        self.streams = plan.shape.streams if self.nodes > 1 else 0
        self.carriers = plan.carriers or self.nodes
        self.depth = max(self.streams, plan.lookup) if self.nodes > 1 else 0
        # A finished sequence may take two steps more before the host says so.
        self.cache = StaticTreeCache.for_model(model, batch, capacity, self.nodes + 2 * (self.depth + 1))
        slots = self.cache.capacity + self.cache.scratch

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        vocab = model.get_output_embeddings().weight.shape[0]
        # Held here: a graph knows nothing but addresses.
        self.tables = model.draft_tables() if self.nodes > 1 else (None, None)
        rows = batch * (self.nodes + self.carriers * self.streams)
        half = dtype in DTYPES and not isinstance(model.get_output_embeddings(), QuantizedLinear)
        self.streams_to_head = self.streams > 0 and rows <= (MOST_HEAD_ROWS if half else MOST_EXACT_HEAD_ROWS)
        width = vocab if self.streams_to_head else model.config.hidden_size
        states = torch.zeros(batch, self.streams, width, dtype=dtype, device=device) if self.streams else None
        self.state = StepState(
            root=integers(batch),
            lengths=integers(batch),
            finished=integers(batch, dtype=torch.bool),
            stream_states=states,
            history=integers(batch, slots) if plan.lookup else None,
            base=integers(batch),
        )
        self.tree = TreeTensors.allocate(batch, self.nodes, device)
        self.packed = integers(batch, self.depth + 2)
        self.path = integers(batch, self.depth + 1)
        self.first = integers(batch, 2)
        self.zeros = integers(batch)
        self.continuation = integers(batch, plan.lookup) if plan.lookup else None
        self.numbers = torch.arange(1, self.streams + 1, device=device)
        self.workspaces = {self.nodes: self._attention_workspace(self.nodes + self.carriers * self.streams)}
        self.choosing = {
            count: BestTokensWorkspace.allocate(batch * count, vocab, device) for count in {1, self.nodes}
        }
        self.drafting = self._draft_workspace(batch, vocab, device) if self.nodes > 1 else None
        self.prior = self._prior(device) if self.nodes > 1 else None
        self.turns = self._turns(slots + self.streams + self.depth)
        self.logits = torch.empty(0)
        self.stream_states: torch.Tensor | None = None

    def _attention_workspace(self, rows: int) -> AttentionWorkspace:
        keys = self.cache.layers[0].keys
        batch, kv_heads, slots, size = keys.shape
        heads = self.model.config.num_attention_heads
        return AttentionWorkspace.for_step(batch, rows, heads, kv_heads, size, slots, keys.device)

    def _draft_workspace(self, batch: int, vocab: int, device: torch.device) -> DraftWorkspace:
        return DraftWorkspace.allocate(
            batch,
            self.streams,
            vocab,
            self.plan.beam or 1,
            self.nodes,
            device,
            continued=self.plan.lookup > 0,
        )

    def _prior(self, device: torch.device) -> torch.Tensor:
        """Returns (streams, beam) float32 logarithms of how often each rank was right, as drafting wants them: never rising."""
        beam = self.plan.beam or 1
        rows = [[*ranks, *[ranks[-1]] * beam][:beam] for ranks in rank_accuracy(self.model)[: self.streams]]
        shares = torch.tensor(rows, dtype=torch.float32).clamp_min(LEAST_SHARE)
        return shares.cummin(dim=1).values.log().to(device)

    def _turns(self, positions: int) -> torch.Tensor | None:
        """Returns (positions, 2, head_dim) cosines and sines, `None` where positions are learned.

        Upstream computes them in some ten kernels a step; here a step looks them up.
        """
        like = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
        rotary = self.model.rotary(like, torch.arange(positions, device=like.device)[None])
        return None if rotary is None else torch.stack(rotary, dim=2)[0]

    def prepare_prefill(self, seq: int) -> None:
        """Makes what prompts of `seq` tokens need and a captured graph must not make."""
        if seq not in self.workspaces:
            self.workspaces[seq] = self._attention_workspace(seq + self.streams)

    def prefill(self, prompts: torch.Tensor, lengths: torch.Tensor) -> None:
        """Runs whole prompts and sets the state to their ends; `first` then holds each first token and whether logits are finite.

        Args:
            prompts: (batch, seq) int64, padded on the right with any token.
            lengths: (batch,) int64 tokens of each prompt.
        """
        model, streams = self.model, self.streams
        batch, seq = prompts.shape
        anchors = lengths - 1
        positions = torch.arange(seq, device=prompts.device).expand(batch, seq)
        hidden = model.embed_rows(prompts, positions).contiguous()
        hidden, update = self._below(hidden, positions, self.zeros, StepRows(seq))
        rows = StepRows(seq, streams, anchors=anchors)
        if streams:
            hidden, update = settle(hidden, update), None
            at = anchors[:, None, None].expand(-1, 1, hidden.shape[2])
            hidden = torch.cat([hidden, model.streams.start(hidden.gather(1, at), streams)], dim=1)
            positions = torch.cat([positions, anchors[:, None] + self.numbers], dim=1)
        hidden, update = self._above(hidden, update, positions, self.zeros, rows)
        states = settle(hidden, update)
        last = states.gather(1, anchors[:, None, None].expand(-1, 1, states.shape[2]))
        states = add_norm(torch.cat([last, states[:, seq:]], dim=1), None, model.last_norm())[0]
        logits, states = self._read_out(states, 1)
        self.first[:, :1] = self._choose(logits)
        self.first[:, 1] = torch.isfinite(logits).flatten(1).all(dim=1)
        state = self.state
        state.root.copy_(self.first[:, 0])
        state.lengths.copy_(lengths)
        state.finished.zero_()
        if state.stream_states is not None:
            state.stream_states.copy_(states)
        if state.history is not None:
            state.history[:, :seq] = prompts
            state.history.scatter_(1, lengths[:, None], state.root[:, None])

    def draft(self) -> None:
        """Grows the tree of the next step."""
        states = self.state.stream_states
        if self.drafting is None or states is None:
            self.tree.tokens.copy_(self.state.root[:, None])
            return
        if self.continuation is not None and self.state.history is not None:
            lookup_continuation(self.state.history, self.state.lengths, self.state.root, self.continuation)
        parent_table, token_table = self.tables
        draft_tree(
            states if self.streams_to_head else self._head(states),
            self.state.root,
            parent_table,
            token_table,
            self.tree,
            self.plan.beam or 1,
            self.drafting,
            self.continuation,
            prior=self.prior,
            trust=self.plan.trust,
        )

    def forward(self) -> None:
        """Runs the tree through the model."""
        model, tree, lengths = self.model, self.tree, self.state.lengths
        limit = model.config.max_position_embeddings
        if self.embeddings is not None:
            hidden, positions = embed_nodes(tree.tokens, lengths, tree.depths, limit, *self.embeddings)
        else:
            # A sequence at its end must not run past the last position; what it says there is dropped.
            positions = (lengths[:, None] + tree.depths).clamp(max=limit - 1)
            hidden = model.embed_rows(tree.tokens, positions).contiguous()
        rows = StepRows(self.nodes, 0, tree.ancestors, tree.depths)
        hidden, update = self._below(hidden, positions, lengths, rows)
        if self.streams:
            hidden, update = settle(hidden, update), None
            # Nodes are numbered from the likeliest on.
            offsets = model.streams.embedding.weight[: self.streams]
            hidden = start_streams(hidden, offsets, self.carriers)
            if self.turns is not None:
                ahead = (positions[:, : self.carriers, None] + self.numbers).flatten(1)
                positions = torch.cat([positions, ahead], dim=1)
            rows = StepRows(self.nodes, self.streams, tree.ancestors, tree.depths, carriers=self.carriers)
        hidden, update = self._above(hidden, update, positions, lengths, rows)
        states = add_norm(hidden, update, model.last_norm())[0]
        self.logits, states = self._read_out(states, self.nodes)
        self.stream_states = states.unflatten(1, (self.carriers, self.streams)) if self.streams else None

    def verify(self) -> None:
        """Accepts the longest path that the target agrees with and moves the state to its end."""
        chosen = self._choose(self.logits)
        accept_and_advance(chosen, self.tree, self.stream_states, self.state, self.packed, self.path)

    def commit(self) -> None:
        """Moves the accepted rows of the cache to their positions."""
        if self.nodes > 1:
            commit_rows(self.cache.block, self.path, self.packed, self.state.base, self.state.finished)

    def _below(self, hidden, positions, lengths, rows: StepRows):
        layers = range(self.model.first_stream_layer)
        return self._run(layers, hidden, None, positions, lengths, rows)

    def _above(self, hidden, update, positions, lengths, rows: StepRows):
        layers = range(self.model.first_stream_layer, len(self.layers.layers))
        return self._run(layers, hidden, update, positions, lengths, rows)

    def _run(self, layers, hidden, update, positions, lengths, rows: StepRows):
        turns = None
        if self.turns is not None and layers:
            cos, sin = self.turns[positions].unbind(2)
            turns = cos, sin
        workspace = self.workspaces[rows.nodes]
        return self.layers.run(layers, hidden, update, turns, lengths, rows, self.cache, workspace)

    def _read_out(self, states: torch.Tensor, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the logits of the first rows, which are the nodes', and what the streams are drafted from: states or logits."""
        if not self.streams_to_head:
            return self._head(states[:, :nodes]), states[:, nodes:]
        logits = self._head(states)
        return logits[:, :nodes], logits[:, nodes:]

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        head = self.model.get_output_embeddings()
        states = states.contiguous()
        return (
            head(states) if isinstance(head, QuantizedLinear) else head_linear(states, head.weight, head.bias)
        )

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.rule.do_sample and not self.rule.processors:
            return best_tokens(logits, self.choosing[logits.shape[1]])
        return self.rule.pick(self.rule.scores(logits, []))
