"""Keys and values cached between calls, so that decoding computes only what is new.

B batch, P tokens of earlier calls, N new tokens of this call, R sequences that have routed tokens, K routed tokens of
each of them, G key-value heads, E head size, W width (the most tokens that a sequence has routed to a step).

A later token's step t sees the earlier tokens as they were at step t, so what must be cached depends on the model.
Memory per token, in units of one dense layer's 2 * G * E numbers:

    dense layer                 1
    loop                        N = T + 1, one for each pass
    itt, thinking_kv refresh    1 + T: at each step every token has keys and values, its own or those of an earlier step
    itt, thinking_kv shared     1: those of step 0
    itt, thinking_kv routed_only 1 + the fractions routed (and 8 bytes per routed token for its position)

A step removed by a ratio of 0 caches nothing. Tokens of a call in which no token is routed to a step of ``refresh``
have the keys and values of an earlier step there, and are copied from it when the step is next taken. While tokens are
added one by one, there is room for up to half as many again behind those cached, so that adding one does not copy the
others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from itt_composer.model.config import ITTConfig
from itt_composer.model.selection import Selection

NOWHERE = 2**31 - 1


class ThinkingCache(DynamicCache):
    """The cache of a loop or ITT model: a slot for each pass of each layer.

    A :class:`DynamicCache` by its interface alone: how that stores its layers differs between versions of transformers.
    Slots hold [B, G, P, E] in ``keys`` and ``values``. A step's slot under
    ``thinking_kv: routed_only`` is [B, G, W, E]: each sequence's routed tokens, first to last, with ``position[slot]``
    ([B, W]) saying which they are, ``NOWHERE`` where a sequence has fewer.
    """

    is_compileable = False

    def __init__(self, config: ITTConfig):
        super().__init__()
        options = config.thinking_options
        self.thinking_kv = options.thinking_kv if options.thinking == 'itt' else 'refresh'
        passes = 1 if self.thinking_kv == 'shared' else 1 + options.steps
        thinks = {i for block in options.thinking_blocks for i in block}
        counts = [passes if i in thinks else 1 for i in range(config.num_hidden_layers)]
        self.first_slot = list(itertools.accumulate(counts, initial=0))
        self.seen = 0
        self.keys = [torch.tensor([]) for _ in range(sum(counts))]
        self.values = [torch.tensor([]) for _ in range(sum(counts))]
        self.position: dict[int, Tensor] = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Put [B, G, N, E] keys and values behind those of slot ``layer_idx``, and return all of them."""
        if layer_idx == 0:
            self.seen += key_states.shape[2]
        key = self.keys[layer_idx] = append(self.keys[layer_idx], key_states)
        value = self.values[layer_idx] = append(self.values[layer_idx], value_states)
        return key, value

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """P, the number of tokens cached."""
        return self.seen

    def catch_up(self, slot: int, length: int) -> None:
        """Give ``slot`` the tokens before ``length`` that it lacks, with the keys and values of their last step."""
        P, earlier = _length(self.keys[slot]), slot
        while length > P:
            earlier -= 1
            end = min(length, _length(self.keys[earlier]))
            if end > P:
                for cached in (self.keys, self.values):
                    cached[slot] = append(cached[slot], cached[earlier].narrow(2, P, end - P))
                P = end

    def crop(self, max_length: int) -> None:
        """Forget the tokens from ``max_length`` on, or the last ones where it is negative."""
        self.seen = min(self.seen, max_length if max_length >= 0 else self.seen + max_length)
        for cached in (self.keys, self.values):
            for slot, x_BGPE in enumerate(cached):
                if slot not in self.position and x_BGPE.dim() == 4:  # An untouched slot has one dimension.
                    cached[slot] = x_BGPE[:, :, : self.seen]
        for slot, position_BW in self.position.items():
            self.position[slot] = position_BW.masked_fill(position_BW >= self.seen, NOWHERE)
        self._trim()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence b go on from sequence ``beam_idx[b]``."""
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self._map_batch(lambda x: x[indices])

    def batch_split(self, full_batch_size: int, split_size: int) -> list[DynamicCache]:
        """Refused: transformers joins the parts again as a plain cache, which would lose the steps."""
        raise ValueError('low_memory: not supported by a model with extra steps; leave it out')

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        for cache in (self.keys, self.values):
            cache[:] = [function(x) if x.dim() == 4 else x for x in cache]
        self.position = {slot: function(x) for slot, x in self.position.items()}
        self._trim()

    def _trim(self) -> None:
        """Leave the steps' slots no wider than the most tokens of a sequence; one sequence alone then has no gaps."""
        for slot, position_BW in self.position.items():
            W = int((position_BW < NOWHERE).sum(-1).max())
            self.position[slot] = position_BW[:, :W]
            for cached in (self.keys, self.values):
                cached[slot] = cached[slot][:, :, :W]


def _length(x_BGPE: Tensor) -> int:
    return x_BGPE.shape[2] if x_BGPE.numel() else 0


def append(old_BGPE: Tensor, new_BGNE: Tensor) -> Tensor:
    """``new`` behind ``old``, as ``torch.cat`` along the tokens gives it, but most of the time only ``new`` is copied.

    The result may be the first part of a larger tensor, and a later call writes into the room behind it; its stride
    from head to head tells how much there is. At most half as much again as is filled lies empty.
    """
    if not old_BGPE.numel():
        # A copy, since ``new`` may be part of another slot, whose room is not this one's.
        return new_BGNE.clone(memory_format=torch.contiguous_format)
    (B, G, P, E), N = old_BGPE.shape, new_BGNE.shape[2]
    if new_BGNE.requires_grad or old_BGPE.requires_grad:
        return torch.cat((old_BGPE, new_BGNE), dim=2)  # What a backward pass needs must not be written over.
    room = (old_BGPE.stride(1) - old_BGPE.storage_offset() % old_BGPE.stride(1)) // E - P
    if room < N or (old_BGPE.is_inference() and not torch.is_inference_mode_enabled()):
        larger_BGCE = new_BGNE.new_empty(B, G, (P + N) * 3 // 2, E)
        larger_BGCE.narrow(2, 0, P).copy_(old_BGPE)
        old_BGPE = larger_BGCE
    all_BGPE = old_BGPE.as_strided((B, G, P + N, E), old_BGPE.stride())
    all_BGPE.narrow(2, P, N).copy_(new_BGNE)
    return all_BGPE


@dataclass
class PassCache:
    """What one pass (``step`` 0, or an extra step) of one layer has cached."""

    cache: DynamicCache
    layer: int
    step: int = 0

    def at(self, step: int) -> PassCache:
        """The same layer's pass ``step``."""
        return PassCache(self.cache, self.layer, step)

    def of(self, layer: int) -> PassCache:
        """The same pass of another layer of the block."""
        return PassCache(self.cache, layer, self.step)

    def extend(
        self, k_BNGE: Tensor, v_BNGE: Tensor, index_RK: Tensor | None = None, routed: Selection | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cache the new tokens' keys and values for later calls.

        Args:
            k_BNGE: the keys of the new tokens at this pass; of the routed ones alone, [R, K, G, E], in a step of
                ``thinking_kv: routed_only``.
            v_BNGE: their values.
            index_RK: where among the new tokens the queries are; None: they are the new tokens.
            routed: the tokens that are routed to this step; None: all.

        Returns:
            All keys and values that the pass has seen, the new ones last, and where among them the queries are (None:
            the queries are the last of them).
        """
        cache = self.cache
        if not isinstance(cache, ThinkingCache):
            k_BGPE, v_BGPE = cache.update(k_BNGE.transpose(1, 2), v_BNGE.transpose(1, 2), self.layer)
        elif self.step and cache.thinking_kv == 'routed_only':
            return self._extend_routed(k_BNGE, v_BNGE, routed)
        elif self.step and cache.thinking_kv == 'shared':
            slot = cache.first_slot[self.layer]
            k_BGPE, v_BGPE = cache.keys[slot], cache.values[slot]
        else:
            slot = cache.first_slot[self.layer] + self.step
            if self.step:
                cache.catch_up(slot, cache.get_seq_length() - k_BNGE.shape[1])
            k_BGPE, v_BGPE = cache.update(k_BNGE.transpose(1, 2), v_BNGE.transpose(1, 2), slot)
        N = k_BNGE.shape[1]
        if index_RK is not None:
            index_RK = None if N == 1 else index_RK + (k_BGPE.shape[2] - N)
        return k_BGPE.transpose(1, 2), v_BGPE.transpose(1, 2), index_RK

    def _extend_routed(
        self, k_RKGE: Tensor, v_RKGE: Tensor, routed: Selection | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put each sequence's routed tokens behind those that it has routed before."""
        cache, slot = self.cache, self.cache.first_slot[self.layer] + self.step
        R, K, G, E = k_RKGE.shape
        routed = routed or Selection((R, K), torch.arange(K, device=k_RKGE.device).expand(R, K))
        (B, N), valid_RK = routed.shape, routed.valid_RK
        index_RK = routed.index_RK + (cache.get_seq_length() - N)
        if slot not in cache.position:
            cache.position[slot] = index_RK.new_empty(B, 0)
            cache.keys[slot], cache.values[slot] = k_RKGE.new_empty(B, G, 0, E), v_RKGE.new_empty(B, G, 0, E)

        if B == 1 and valid_RK is None:  # One sequence alone has no gaps.
            cache.position[slot] = torch.cat([cache.position[slot], index_RK], dim=1)
            k_BGWE, v_BGWE = cache.update(k_RKGE.transpose(1, 2), v_RKGE.transpose(1, 2), slot)
            return k_BGWE.transpose(1, 2), v_BGWE.transpose(1, 2), None

        # Sequences of a batch have routed different numbers of tokens.
        valid_RK = torch.ones_like(index_RK, dtype=torch.bool) if valid_RK is None else valid_RK
        count_R = (routed.sequences(cache.position[slot]) < NOWHERE).sum(-1)
        wider = int((count_R + valid_RK.sum(-1)).max()) - cache.position[slot].shape[1]
        if wider > 0:
            cache.position[slot] = F.pad(cache.position[slot], (0, wider), value=NOWHERE)
            for cached in (cache.keys, cache.values):
                cached[slot] = F.pad(cached[slot], (0, 0, 0, wider))
        if cache.position[slot].is_inference() and not torch.is_inference_mode_enabled():
            for cached in (cache.position, cache.keys, cache.values):
                cached[slot] = cached[slot].clone()
        place_RK = count_R[:, None] + torch.arange(K, device=count_R.device)
        sequence_R = torch.arange(B, device=count_R.device) if routed.sequence_R is None else routed.sequence_R
        sequence_C, place_C = sequence_R[:, None].expand(R, K)[valid_RK], place_RK[valid_RK]
        cache.position[slot][sequence_C, place_C] = index_RK[valid_RK]
        cache.keys[slot][sequence_C, :, place_C] = k_RKGE[valid_RK]
        cache.values[slot][sequence_C, :, place_C] = v_RKGE[valid_RK]
        k_RWGE, v_RWGE = (routed.sequences(cached[slot]).transpose(1, 2) for cached in (cache.keys, cache.values))
        # Where no token stands, no kernel may look behind the last.
        return k_RWGE, v_RWGE, place_RK.clamp(max=k_RWGE.shape[1] - 1)
