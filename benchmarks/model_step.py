"""Time a training step of the dense, Loop and ITT models relative to their FLOPs and to other libraries.

    python benchmarks/model_step.py [--size 162m] [--compiled] [--profile] [--out benchmarks/results/<name>.csv]

Each model takes its steps in turn with the dense baseline, so that a machine that slows down slows both. It is deleted
before the next one is built. Ratios are taken within a round; the table shows medians over the rounds. The learning
rate is 0, so that every step routes the same tokens.

- ``pairs``: query-key pairs of routed attention relative to an even spread of the routed tokens.
- ``time ratio``: time relative to the dense baseline.
- ``FLOPs ratio``: exact FLOPs, at the positions that were routed, relative to the dense baseline.
- ``overhead``: time ratio / FLOPs ratio. 1.05 means that routing costs 5 % more than its arithmetic.
- ``fraction of peak``: relative to a large matrix product on this device, measured in the same run.
- ``MFU``: llm-foundry's count for the dense baseline, times the FLOPs ratio, relative to the peak of the data sheet.

A layer alone is one decoder layer, or one thinking layer, forward and backward. ``--profile`` writes the kernels with
the most time of each model beside ``--out``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from contestants import BLOCKS, COMPILED, FAMILIES, build, names, peak_flops, shape, step_of
from mfu import foundry_flops, nominal_peak
from report import check_results, show, write
from rich.progress import track
from routed_pairs import RoutedPairs
from timing import seconds
from top_kernels import top_kernels
from torch import nn

from itt_composer.flops import TRAINING_TO_FORWARD, Decoder, exact_flops
from itt_composer.model import ITTConfig, ITTForCausalLM
from itt_composer.model.rotary import Rotation
from itt_composer.model.routing_state import routing_state

LAYER = 'layer: '


def decoder_of(name: str, shape: dict) -> Decoder:
    """Return what a model, or a layer alone, is counted as."""
    family = FAMILIES.get(name.removeprefix(LAYER).removesuffix(COMPILED), {})
    alone = {'num_hidden_layers': 1} if name.startswith(LAYER) else {}
    return Decoder.from_model_config({**shape, **family, **alone})


def flops(name: str, shape: dict, S: int, pairs: RoutedPairs | None = None) -> float:
    """Count the exact FLOPs of one sequence, forward and backward, with the pairs of the tokens that were routed."""
    decoder = decoder_of(name, shape)
    count = exact_flops(decoder, S)
    more = pairs.more_flops(decoder) if pairs else 0
    return TRAINING_TO_FORWARD * (count.total + more - (count.head if name.startswith(LAYER) else 0))


def reference_of(name: str) -> str:
    """Return the dense baseline, compiled for compiled ITT and Loop models; for a layer alone, the dense layer."""
    if name.startswith(LAYER):
        return LAYER + 'dense'
    return 'dense' + COMPILED if name.endswith(COMPILED) and name.removesuffix(COMPILED) in FAMILIES else 'dense'


def layer_of(name: str, shape: dict, device: str) -> nn.Module:
    """Build one layer of a family."""
    config = ITTConfig(**{**shape, **FAMILIES[name.removeprefix(LAYER)], 'num_hidden_layers': 1})
    return ITTForCausalLM(config).model.layers[0].to(device)


def layer_pass(layer: nn.Module, shape: dict, B: int, S: int, device: str) -> Callable[[], None]:
    """Return a function that does forward and backward of one layer."""
    x_BSD = torch.randn(B, S, shape['hidden_size'], device=device, requires_grad=True)
    rotation = Rotation.at(torch.arange(S, device=device)[None], ITTConfig(**shape))

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
            y_BSD, _ = layer(x_BSD, rotation)
        y_BSD.float().square().mean().backward()
        layer.zero_grad()
        x_BSD.grad = None

    return run


def warm_up(name: str, module: nn.Module, run: Callable[[], None], shape: dict) -> RoutedPairs | None:
    """Do two steps, and return the pairs of the second one; None for a model that routes nothing."""
    run()
    state = routing_state(module)
    if state is None:
        run()
        return None
    with state.recording() as records:
        run()
    return RoutedPairs.of(records, decoder_of(name, shape).thinking_kv)


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
    autocast_residual: Annotated[bool, typer.Option(help="Our hidden states in autocast's dtype.")] = False,
    layers: Annotated[bool, typer.Option(help='Also a layer of each family alone.')] = True,
    only: Annotated[str, typer.Option(help='Only models with one of these in their names: dense,loop.')] = '',
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
    profile: Annotated[
        bool, typer.Option(help='Also write the top kernels of each model, to <out>-kernels.csv.')
    ] = False,
) -> None:
    """Run the benchmark and print its table."""
    check_results(out)
    if profile and out is None:
        raise SystemExit('benchmark: --profile: no place for its table; set --out')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    gpu = device == 'cuda'
    if autocast_residual and layers:
        raise SystemExit('benchmark: --autocast-residual: a layer alone has float32 states; add --no-layers')
    S, B = sequence_length or (4096 if gpu else 1024), batch_size or (4 if gpu else 2)
    size = size or ('162m' if gpu else 'reduced')
    keys = shape(size, S) | BLOCKS[block]
    torch.manual_seed(0)
    ids_BS = torch.randint(keys['vocab_size'], (B, S), device=device)

    def start(name: str) -> tuple[Callable[[], None], RoutedPairs | None]:
        if name.startswith(LAYER):
            module = layer_of(name, keys, device)
            run = layer_pass(module, keys, B, S, device)
        else:
            module = build(name, keys, device, block, autocast_residual)
            run = step_of(module, ids_BS)
        return run, warm_up(name, module, run, keys)

    everyone = names(peers, gpu if compiled is None else compiled)
    everyone += [LAYER + family for family in FAMILIES] if layers else []
    rows, kernels, references, nominal = [], [], {}, nominal_peak()
    for name in track([name for name in everyone if any(part in name for part in only.split(','))], 'models'):
        dense, run, pairs = reference_of(name), None, None
        if dense not in references:
            references.clear()
            references[dense], _ = start(dense)
        try:
            run, pairs = (references[dense], None) if name == dense else start(name)
        except Exception as error:
            if name.removesuffix(COMPILED) in FAMILIES:
                raise
            print(f'{name} is left out: {" ".join(str(error).split())[:200]}')  # A model of another library.
            continue
        times = [(seconds(run, device), seconds(references[dense], device)) for _ in range(rounds)]
        took = statistics.median(own for own, _ in times)
        time_ratio = 1.0 if name == dense else statistics.median(own / reference for own, reference in times)
        count = flops(name, keys, S, pairs)
        flops_ratio = count / flops(dense, keys, S)
        counted_by_foundry = flops_ratio * foundry_flops(decoder_of(dense, keys), S)
        known = nominal is not None and not name.startswith(LAYER)
        rows.append(
            {
                'model': name,
                'step ms': f'{1000 * took:.1f}',
                'tokens/s': f'{B * S / took:.0f}',
                'TFLOP/s': f'{B * count / took / 1e12:.3f}',
                'fraction of peak': f'{B * count / took / peak_flops(device):.3f}',
                'MFU': f'{B * counted_by_foundry / took / nominal:.3f}' if known else '',
                'pairs': f'{pairs.routed / pairs.even:.3f}' if pairs else '',
                'time ratio': f'{time_ratio:.3f}',
                'FLOPs ratio': f'{flops_ratio:.3f}',
                'overhead': f'{time_ratio / flops_ratio:.3f}',
            }
        )
        if profile:
            kernels += top_kernels(name, run)
    title = f'{size}, {block}, S {S}, batch {B}{", autocast_residual" if autocast_residual else ""}'
    show(rows, f'Training step, {title}, peak {peak_flops(device) / 1e12:.3f} TFLOP/s', out)
    if out is not None and profile:
        write(kernels, f'Kernels of a training step, {title}', out.with_name(f'{out.stem}-kernels.csv'))


if __name__ == '__main__':
    typer.run(main)
