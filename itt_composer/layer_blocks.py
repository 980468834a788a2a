"""``thinking_layers``: ``[0, [2, 3]]`` is layer 0, and layers 2 and 3 as one block. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence


def as_blocks(thinking_layers: Sequence[int | Sequence[int]]) -> list[list[int]]:
    """The layers of each block; a number is a block of one."""
    return [list(part) if isinstance(part, Sequence) else [part] for part in thinking_layers]


def checked_layers(thinking_layers: Sequence[int | Sequence[int]], num_layers: int) -> list[int | list[int]]:
    """The option in ascending order, with numbers for blocks of one.

    Raises:
        ValueError: no layers, a layer that the model lacks or that is named twice, or a block with gaps.
    """
    blocks = as_blocks(thinking_layers)
    for block in blocks:
        if not block or block != list(range(block[0], block[0] + len(block))):
            raise ValueError(
                f'thinking_layers: expected consecutive, ascending layers in a block, got {block}; list each of them '
                'once'
            )
    layers = [i for block in blocks for i in block]
    missing = [i for i in layers if not 0 <= i < num_layers]
    if missing:
        raise ValueError(f'thinking_layers: no layer {missing[0]}; the model has layers 0 to {num_layers - 1}')
    if not layers:
        raise ValueError('thinking_layers: empty; for a model without extra steps set thinking: none')
    if len(set(layers)) < len(layers):
        raise ValueError(f'thinking_layers: {list(thinking_layers)} names a layer twice')
    return [block if len(block) > 1 else block[0] for block in sorted(blocks)]
