"""Model FLOPs utilisation in llm-foundry's counting, which other projects report too."""

from __future__ import annotations

import torch

from itt_composer.flops import TRAINING_TO_FORWARD, Decoder, parameters

PEAKS = {'H200': 989e12, 'H100 80GB HBM3': 989e12, 'H100 PCIe': 756e12, 'A100': 312e12}
"""FLOP/s of dense bfloat16 products in NVIDIA's data sheets, by a part of the device's name."""


def nominal_peak() -> float | None:
    """Return the data sheet's FLOP/s of the GPU; None where it is not known, as on a CPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ''
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def foundry_flops(decoder: Decoder, S: int) -> int:
    """Count a training step of one sequence through a dense decoder as MPT's ``flops_per_batch`` does.

    Two FLOPs per token and parameter without the token embedding, and attention without its causal mask.
    """
    weights = parameters(decoder).dense
    if not decoder.tie_word_embeddings:
        weights -= decoder.vocab_size * decoder.hidden_size
    attention = 4 * decoder.num_hidden_layers * decoder.q_size * S * S
    return TRAINING_TO_FORWARD * (2 * weights * S + attention)
