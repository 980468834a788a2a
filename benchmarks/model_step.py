"""Time a training step of the plain, Loop and ITT models against their exact FLOPs, and the plain one against LLaMA.

    python benchmarks/model_step.py [--sequence-length 1024] [--rounds 7] [--out results.csv]

The models take their steps in turn, so that a machine that slows down slows all of them; each figure is the median
over the rounds of a ratio within one round. ``tax`` is the time ratio over the exact FLOPs ratio: 1.05 means that
routing costs 5 % more than the arithmetic it asks for. Shapes have the proportions of the 162M model, scaled to the
device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from report import show
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from itt_composer.flops import TRAINING_TO_FORWARD, Decoder, exact_flops
from itt_composer.model import ITTConfig, ITTForCausalLM

CPU = dict(vocab_size=8000, hidden_size=256, intermediate_size=640, num_attention_heads=8, num_key_value_heads=8)
GPU = dict(vocab_size=32000, hidden_size=1024, intermediate_size=2560, num_attention_heads=32, num_key_value_heads=32)
FAMILIES = {
    'plain': {},
    'loop x4': {'thinking': 'loop', 'thinking_steps': 3},
    'itt x4 refresh': {'thinking': 'itt'},
    'itt x4 shared': {'thinking': 'itt', 'thinking_kv': 'shared'},
    'itt x4 chosen': {'thinking': 'itt', 'thinking_kv': 'chosen'},
}


def step_of(model: nn.Module, ids_BS: torch.Tensor) -> Callable[[], None]:
    """One optimizer step on ``ids_BS``; bfloat16 autocast on a GPU, float32 on a CPU."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(ids_BS.device.type, torch.bfloat16, enabled=ids_BS.is_cuda):
            loss = model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """Wall time of one call, with the device's work finished."""
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(
    sequence_length: Annotated[int | None, typer.Option(help='S; 1024 on a CPU, 4096 on a GPU.')] = None,
    batch_size: Annotated[int | None, typer.Option(help='Sequences a step; 2 on a CPU, 8 on a GPU.')] = None,
    rounds: Annotated[int, typer.Option(help='Steps of each model that count, after one that does not.')] = 7,
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the benchmark and print its table."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    S, B = sequence_length or (4096 if device == 'cuda' else 1024), batch_size or (8 if device == 'cuda' else 2)
    shape = dict(GPU if device == 'cuda' else CPU, num_hidden_layers=8, max_position_embeddings=S)
    torch.manual_seed(0)
    ids_BS = torch.randint(shape['vocab_size'], (B, S), device=device)
    llama = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation='sdpa')).to(device)
    steps = {'LLaMA (Hugging Face, SDPA)': step_of(llama, ids_BS)}
    flops = {'LLaMA (Hugging Face, SDPA)': exact_flops(Decoder.from_model_config(shape), S).total}
    for name, thinking in FAMILIES.items():
        steps[name] = step_of(ITTForCausalLM(ITTConfig(**shape, **thinking)).to(device), ids_BS)
        flops[name] = exact_flops(Decoder.from_model_config({**shape, **thinking}), S).total

    for step in steps.values():
        step()
    times = [{name: seconds(step, device) for name, step in steps.items()} for _ in range(rounds)]

    rows = []
    for name in steps:
        took = statistics.median(round_[name] for round_ in times)
        time_ratio = statistics.median(round_[name] / round_['plain'] for round_ in times)
        flops_ratio = flops[name] / flops['plain']
        rows.append(
            {
                'model': name,
                'step ms': f'{1000 * took:.0f}',
                'tokens/s': f'{B * S / took:.0f}',
                'GFLOP/s': f'{TRAINING_TO_FORWARD * B * flops[name] / took / 1e9:.0f}',
                'time / plain': f'{time_ratio:.3f}',
                'exact FLOPs / plain': f'{flops_ratio:.3f}',
                'tax': f'{time_ratio / flops_ratio:.3f}',
            }
        )
    show(rows, f'Training step, S {S}, batch {B}', out)


if __name__ == '__main__':
    typer.run(main)
