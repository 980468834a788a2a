"""Time a training step of the dense, Loop and ITT models relative to their FLOPs and to other libraries.

    python benchmarks/model_step.py [--size 162m] [--compiled] [--rounds 7] [--out benchmarks/results/<name>.csv]

Each model takes its steps in turn with the dense baseline, so that a machine that slows down slows both. It is deleted
before the next one is built. Ratios are taken within a round; the table shows medians over the rounds.

- ``time ratio``: time relative to the dense baseline.
- ``FLOPs ratio``: exact FLOPs relative to the dense baseline.
- ``overhead``: time ratio / FLOPs ratio. 1.05 means that routing costs 5 % more than its arithmetic.
- ``fraction of peak``: relative to a large matrix product on this device, measured in the same run.

A layer alone is one decoder layer, or one thinking layer, forward and backward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from contestants import BLOCKS, COMPILED, FAMILIES, build, names, peak_flops, seconds, shape, step_of
from report import check_results, show
from rich.progress import track
from torch import nn

from itt_composer.flops import TRAINING_TO_FORWARD, Decoder, exact_flops
from itt_composer.model import ITTConfig, ITTForCausalLM
from itt_composer.model.rotary import Rotation

LAYER = 'layer: '


def flops(name: str, shape: dict, S: int) -> int:
    """Count the exact FLOPs of one sequence, forward and backward."""
    alone = name.startswith(LAYER)
    family = FAMILIES.get(name.removeprefix(LAYER).removesuffix(COMPILED), {})
    keys = {**shape, **family, 'num_hidden_layers': 1} if alone else {**shape, **family}
    count = exact_flops(Decoder.from_model_config(keys), S)
    return TRAINING_TO_FORWARD * (count.total - (count.head if alone else 0))


def reference_of(name: str) -> str:
    """Return the dense baseline, compiled for compiled ITT and Loop models; for a layer alone, the dense layer."""
    if name.startswith(LAYER):
        return LAYER + 'dense'
    return 'dense' + COMPILED if name.endswith(COMPILED) and name.removesuffix(COMPILED) in FAMILIES else 'dense'


def layer_pass(name: str, shape: dict, B: int, S: int, device: str) -> Callable[[], None]:
    """Return a function that does forward and backward of one layer of a family."""
    config = ITTConfig(**{**shape, **FAMILIES[name.removeprefix(LAYER)], 'num_hidden_layers': 1})
    layer: nn.Module = ITTForCausalLM(config).model.layers[0].to(device)
    x_BSD = torch.randn(B, S, config.hidden_size, device=device, requires_grad=True)
    rotation = Rotation.at(torch.arange(S, device=device)[None], config)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
            y_BSD, _ = layer(x_BSD, rotation)
        y_BSD.float().square().mean().backward()
        layer.zero_grad()
        x_BSD.grad = None

    return run


def main(
    size: Annotated[
        str | None, typer.Option(help='A size of yamls/parts/size; 162m on a GPU, reduced on a CPU.')
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help='S; 1024 on a CPU, 4096 on a GPU.')] = None,
    batch_size: Annotated[int | None, typer.Option(help='Sequences per step; 2 on a CPU, 4 on a GPU.')] = None,
    rounds: Annotated[int, typer.Option(help='Timed steps per model, after two warm-up steps.')] = 7,
    block: Annotated[str, typer.Option(help=f'The block: {", ".join(BLOCKS)}.')] = 'llama',
    peers: Annotated[bool, typer.Option(help="Hugging Face's model and llm-foundry's MPT of the same size.")] = True,
    compiled: Annotated[bool | None, typer.Option(help='Also each of them compiled; the default on a GPU.')] = None,
    layers: Annotated[bool, typer.Option(help='Also a layer of each family alone.')] = True,
    only: Annotated[str, typer.Option(help='Only models with this in their names.')] = '',
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the benchmark and print its table."""
    check_results(out)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    gpu = device == 'cuda'
    S, B = sequence_length or (4096 if gpu else 1024), batch_size or (4 if gpu else 2)
    size = size or ('162m' if gpu else 'reduced')
    keys = shape(size, S) | BLOCKS[block]
    torch.manual_seed(0)
    ids_BS = torch.randint(keys['vocab_size'], (B, S), device=device)

    def start(name: str) -> Callable[[], None]:
        if name.startswith(LAYER):
            run = layer_pass(name, keys, B, S, device)
        else:
            run = step_of(build(name, keys, device, block), ids_BS)
        run(), run()
        return run

    everyone = names(peers, gpu if compiled is None else compiled)
    everyone += [LAYER + family for family in FAMILIES] if layers else []
    rows, references = [], {}
    for name in track([name for name in everyone if only in name], 'models'):
        dense, run = reference_of(name), None
        if dense not in references:
            references.clear()
            references[dense] = start(dense)
        try:
            run = references[dense] if name == dense else start(name)
        except Exception as error:
            if name.removesuffix(COMPILED) in FAMILIES:
                raise
            print(f'{name} is left out: {" ".join(str(error).split())[:200]}')  # A model of another library.
            continue
        times = [(seconds(run, device), seconds(references[dense], device)) for _ in range(rounds)]
        took = statistics.median(own for own, _ in times)
        time_ratio = 1.0 if name == dense else statistics.median(own / reference for own, reference in times)
        count, flops_ratio = flops(name, keys, S), flops(name, keys, S) / flops(dense, keys, S)
        rows.append(
            {
                'model': name,
                'step ms': f'{1000 * took:.1f}',
                'tokens/s': f'{B * S / took:.0f}',
                'TFLOP/s': f'{B * count / took / 1e12:.3f}',
                'fraction of peak': f'{B * count / took / peak_flops(device):.3f}',
                'time ratio': f'{time_ratio:.3f}',
                'FLOPs ratio': f'{flops_ratio:.3f}',
                'overhead': f'{time_ratio / flops_ratio:.3f}',
            }
        )
    show(rows, f'Training step, {size}, {block}, S {S}, batch {B}, peak {peak_flops(device) / 1e12:.3f} TFLOP/s', out)


if __name__ == '__main__':
    typer.run(main)
