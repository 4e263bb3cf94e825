"""A static key/value cache for draft trees.

A committed row's slot is its position. The rows of a decode step are written behind the longest sequence of the batch, at `base`;
after verification the accepted ones are copied to their positions and the rest is forgotten::

    slots     0 1 2 3 4 | 5 6 7 8      base = 5, tree of 4 nodes, path (0, 2) accepted
    step      c c c c c | 0 1 2 3
    commit    c c c c c   0 2          length 7

One block holds all layers, so that one copy commits them. Where a tree was pruned, lower and upper layers hold different rows of
it and are committed apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Base:
    """First slot of the rows of the next step, which a cache and its layers share.

    Were they to share the cache, the two would hold each other, and its memory would wait for the garbage collector.
    """

    slot: int = 0


class StaticTreeLayer(CacheLayerMixin):
    """One layer's view of the cache: writes the rows of a step at `base`, returns everything up to them."""

    is_compileable = True
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, base: _Base, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.base = base
        self.keys = keys
        self.values = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The cache is allocated whole; nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (batch, kv_heads, rows, head_dim) and returns views (batch, kv_heads, base + rows, head_dim)."""
        start = self.base.slot
        end = start + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.base.slot + query_length, 0

    def get_seq_length(self) -> int:
        return self.base.slot

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class StaticTreeCache(Cache):
    """Keys and values of all layers, committed by position."""

    def __init__(
        self,
        num_layers: int,
        first_upper: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        scratch: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Allocates the cache.

        Args:
            num_layers: layers of the decoder.
            first_upper: index of the first layer above the pruning point; `num_layers` for none.
            batch: sequences.
            kv_heads: key/value heads a layer.
            head_dim: features a head.
            capacity: committed rows a sequence can have.
            scratch: rows of the largest step, streams included.
            dtype: of keys and values.
            device: where they live.

        Raises:
            ValueError: `capacity` or `scratch` leaves no room for a single row.
        """
        if capacity < 1 or scratch < 1:
            raise ValueError(
                f"a cache needs at least one row; got capacity {capacity} and scratch {scratch}."
            )
        self._base = _Base()
        self.capacity = capacity
        self.scratch = scratch
        # Zeros, not empty: a masked key weighs nothing, but nothing times an unset NaN is NaN.
        shape = (2, batch, kv_heads, capacity + scratch, head_dim)
        self.block = torch.zeros((num_layers, *shape), dtype=dtype, device=device)
        self.below, self.above = self.block[:first_upper], self.block[first_upper:]
        super().__init__(layers=[StaticTreeLayer(self._base, keys, values) for keys, values in self.block])

    @property
    def base(self) -> int:
        """First slot of the rows of the next step; the longest committed length."""
        return self._base.slot

    @base.setter
    def base(self, slot: int) -> None:
        self._base.slot = slot

    @classmethod
    def for_model(cls, model, batch: int, capacity: int, scratch: int) -> StaticTreeCache:
        """Returns a cache with the geometry of a decoder with streams."""
        config = model.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            num_layers=len(model.decoder_layers()),
            first_upper=model.first_stream_layer,
            batch=batch,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            capacity=capacity,
            scratch=scratch,
            dtype=model.dtype,
            device=model.device,
        )

    def check_step(self, rows: int) -> None:
        """Raises ValueError if a step of `rows` rows does not fit behind the committed ones."""
        if self.base + rows > self.capacity + self.scratch:
            raise ValueError(
                f"a step of {rows} rows does not fit: {self.base} committed, {self.capacity + self.scratch} slots; "
                "build the cache with more scratch."
            )

    def nbytes(self) -> int:
        """Returns the bytes of keys and values."""
        return self.block.nbytes

    def commit(self, paths_below: torch.Tensor, paths_above: torch.Tensor, lengths: torch.Tensor) -> None:
        """Copies the accepted rows of the last step to their positions, in place.

        Entries past the accepted length may name any row: what they write lies behind the committed rows and is written over by
        the next step.

        Args:
            paths_below: (batch, depth + 1) int64, accepted rows of the step in the layers below the pruning point, root first.
            paths_above: the same for the layers above it, counted among the rows that survived pruning.
            lengths: (batch,) int64 committed length of each sequence before this step.
        """
        if paths_below is paths_above:
            self._move(self.block, paths_below, lengths)
            return
        for block, paths in ((self.below, paths_below), (self.above, paths_above)):
            if block.shape[0]:
                self._move(block, paths, lengths)

    def _move(self, block: torch.Tensor, paths: torch.Tensor, lengths: torch.Tensor) -> None:
        layers, _, batch, heads, _, dim = block.shape
        target = lengths[:, None] + torch.arange(paths.shape[1], device=paths.device)
        shape = (layers, 2, batch, heads, paths.shape[1], dim)
        source = (paths + self.base)[None, None, :, None, :, None].expand(shape)
        rows = block.gather(4, source)
        block.scatter_(4, target[None, None, :, None, :, None].expand(shape), rows)
