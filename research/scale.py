"""Predict a training on several GPUs: tokens per second, days, cost, and the best settings by this model.

    python -m research scale [yamls/itt_x4_162m.yaml ... key=value ...] [--gpu a100] [--gpus 8] [--price 2.0]

Speed starts from measurements on one H200 (docs/performance.md): the dense 162M's fraction of peak, and ``OVERHEAD``,
which is of ITT x4 at 162M and taken for every ITT. What is **assumed** is in :class:`Assumed` and :class:`Gpu`; both
are printed under the table. A measured speed (``--tokens-per-second``, of one training config, on one GPU) replaces the
first two. Nothing here imports torch.

Legend: N parameters, S sequence length, D hidden size, I intermediate size, H heads, V vocabulary, L layers, n GPUs,
b sequences of a microbatch on each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from itt_composer.config.run_file import resolve_model
from itt_composer.flops import TRAINING_TO_FORWARD, Decoder, exact_flops, parameters
from itt_composer.one_line import one_line_errors

TABLE_1 = [f'{family}_{size}' for size in ('162m', '230m', '466m')
           for family in ('llama', 'loop_x3', 'loop_x4', 'itt_x2', 'itt_x3', 'itt_x4')]  # fmt: skip
OVERHEAD = {'refresh': 1.238, 'shared': 1.111, 'routed_only': 1.043}
"""``thinking_kv`` to the overhead of an ITT x4 step: time ratio / exact FLOPs ratio to dense, on one H200."""
STRATEGIES = ('SHARD_GRAD_OP', 'FULL_SHARD')


@dataclass(frozen=True)
class Gpu:
    """Constants of a device from its public data sheet, and the fraction of its peak that a dense model reaches."""

    name: str
    peak: float
    """Dense bfloat16 FLOP/s."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of that memory, bytes/s."""
    link: float
    """NVLink, bytes/s in one direction: half of what the data sheet adds up."""
    utilisation: float
    """By the FLOPs that foundry counts, of a 162M at S 4096; larger models reach more."""


GPUS = {
    # NVIDIA A100 80GB data sheet, SXM: 312 TFLOPS, 80 GB, 2,039 GB/s, NVLink 600 GB/s. Its fraction of peak is ASSUMED:
    # foundry's for MPT-125M. The H100's, scaled by what foundry's 1B reaches on the two (59 % and 40 %), is the same.
    'a100': Gpu('A100 80 GB SXM', 312e12, 80e9, 2.039e12, 300e9, utilisation=0.46),
    # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s. Its fraction was
    # measured on an H200, which has the same peak and faster memory.
    'h100': Gpu('H100 80 GB SXM', 989.5e12, 80e9, 3.35e12, 450e9, utilisation=0.31),
}


@dataclass(frozen=True)
class Assumed:
    """What no measurement here supports yet."""

    link_share: float = 0.7
    """Fraction of the link's data-sheet speed that collectives reach."""
    bandwidth_share: float = 0.8
    """Fraction of the memory's data-sheet speed that the optimizer reaches."""
    overlap: float = 0.9
    """Fraction of FSDP's traffic that can run while the GPU computes."""
    usable_memory: float = 0.85
    """Fraction of the memory that may be planned for: the rest is CUDA's, NCCL's and fragmentation."""


@dataclass(frozen=True)
class Settings:
    """What is selected per row of the table."""

    microbatch: int
    strategy: str
    checkpointing: bool


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, and bytes at its peak on each GPU."""

    compute: float
    exposed_traffic: float
    optimizer: float
    memory: float

    @property
    def seconds(self) -> float:
        """Of the complete step."""
        return self.compute + self.exposed_traffic + self.optimizer

    def gpu_hours(self, steps: float, n: int) -> float:
        """Return the GPU hours of ``steps`` steps on ``n`` GPUs."""
        return steps * self.seconds * n / 3600


def foundry_flops_per_token(decoder: Decoder, S: int) -> float:
    """Count a dense model's FLOPs per training token as foundry's MFU does: 6 N without the embedding, 12 L D S."""
    V, D, L = decoder.vocab_size, decoder.hidden_size, decoder.num_hidden_layers
    return 6 * (parameters(decoder).dense - V * D) + 12 * L * D * S


def tokens_per_second(decoder: Decoder, S: int, gpu: Gpu) -> float:
    """Predict one GPU's speed: the dense model's at the device's utilisation, divided by FLOPs ratio and overhead."""
    dense = gpu.utilisation * gpu.peak / foundry_flops_per_token(decoder, S)
    ratio = exact_flops(decoder, S).total / exact_flops(decoder.dense(), S).total
    return dense / ratio / (OVERHEAD[decoder.thinking_kv] if decoder.thinking == 'itt' else 1)


def step(
    decoder: Decoder, S: int, batch: int, n: int, gpu: Gpu, settings: Settings, speed: float, assumed: Assumed
) -> Step:
    """One step of ``batch`` sequences on ``n`` GPUs, each of which alone does ``speed`` tokens a second."""
    own = batch // n
    microbatches = own // settings.microbatch
    compute = own * S / speed
    if settings.checkpointing:  # The forward pass of every block once more, of the three that a step costs.
        forward = exact_flops(decoder, S)
        compute *= 1 + (forward.total - forward.head) / (TRAINING_TO_FORWARD * forward.total)
    traffic = _traffic(decoder, n, settings.strategy) / (gpu.link * assumed.link_share)
    hidden = min(assumed.overlap * traffic, compute / microbatches)
    # AdamW reads weight, gradient and two moments and writes three of them, in float32.
    optimizer = 28 * parameters(decoder).total / n / (gpu.bandwidth * assumed.bandwidth_share)
    return Step(compute, microbatches * (traffic - hidden), optimizer, _memory(decoder, S, n, settings))


def _traffic(decoder: Decoder, n: int, strategy: str) -> float:
    """Bytes that each GPU sends for a microbatch: bfloat16 weights once or twice, float32 gradients once."""
    gathers = 2 if strategy == 'FULL_SHARD' else 1
    return (2 * gathers + 4) * parameters(decoder).total * (n - 1) / n


def _memory(decoder: Decoder, S: int, n: int, settings: Settings) -> float:
    N, V, D = parameters(decoder).total, decoder.vocab_size, decoder.hidden_size
    layer = (parameters(decoder).dense - 2 * V * D) / decoder.num_hidden_layers
    layer *= max(map(len, decoder.thinking_blocks), default=1)  # A block of several is one unit.
    # Two units and the root, which holds the embedding and the head, are unsharded at a time; or everything is.
    whole = N if settings.strategy == 'SHARD_GRAD_OP' else 2 * layer + 2 * V * D
    head = 2048 * V * 16 + 4 * V * D  # A chunk of the loss, and the float32 gradient of the head.
    state = 16 * N / n + 2 * whole + 2 * layer + head
    return state + settings.microbatch * S * activation_bytes(decoder, settings.checkpointing)


def activation_bytes(decoder: Decoder, checkpointing: bool = False) -> float:
    """Bytes saved per token for the backward pass, in bfloat16.

    The numbers are those of a count: ``benchmarks/memory.py``'s on this model's own tensors, S 4096, four sizes.
    """
    D = decoder.hidden_size
    one_pass = 28.25 * D + 8 * decoder.intermediate_size + 4 * decoder.num_attention_heads + 8
    assert decoder.token_ratios is not None
    extra = decoder.num_thinking_layers * sum(decoder.token_ratios)
    # Gathering, gating and adding save a third of a pass more per routed token.
    routing = 0.35 * one_pass * extra if decoder.thinking == 'itt' else 0.0
    passes = decoder.num_hidden_layers + extra
    kept = passes * 2 * D + one_pass if checkpointing else passes * one_pass
    return kept + routing + 10 * D


def best(
    decoder: Decoder, S: int, batch: int, n: int, gpu: Gpu, speed: float, assumed: Assumed
) -> tuple[Settings, Step]:
    """The fastest settings that fit the memory; of equally fast ones the smallest memory.

    Raises:
        ValueError: the batch cannot be shared evenly, or one sequence does not fit.
    """
    if batch % n:
        raise ValueError(f'--batch {batch}: {n} GPUs cannot share it evenly')
    sizes = [b for b in range(1, batch // n + 1) if batch // n % b == 0]
    tried = [
        (settings, step(decoder, S, batch, n, gpu, settings, speed, assumed))
        for settings in (Settings(*choice) for choice in product(sizes, STRATEGIES, (False, True)))
    ]
    fitting = [one for one in tried if one[1].memory <= assumed.usable_memory * gpu.memory]
    if not fitting:
        raise ValueError(f'not even one sequence of {S} tokens fits {gpu.memory / 1e9:.0f} GB on {n} GPUs')
    return min(fitting, key=lambda one: (round(one[1].seconds, 4), one[1].memory))


def gpu_hours(decoder: Decoder, S: int, batch: int, batches: int, n: int, gpu: Gpu) -> float:
    """Return the GPU hours of a training with the best settings, without its evaluations."""
    _, took = best(decoder, S, batch, n, gpu, tokens_per_second(decoder, S, gpu), Assumed())
    return took.gpu_hours(batches, n)


def main(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar='[CONFIG ...] [key=value ...]', help='Training configs. Default: those of Table 1.'),
    ] = None,
    gpu: Annotated[list[str] | None, typer.Option(help='a100 or h100; may be repeated. Default: both.')] = None,
    gpus: Annotated[int, typer.Option(min=1, help='How many, on one machine.')] = 8,
    batch: Annotated[int, typer.Option(min=1, help='Sequences of a global batch.')] = 256,
    tokens: Annotated[float, typer.Option(help='Tokens of the complete training.')] = 50e9,
    price: Annotated[float | None, typer.Option(help='Price of one GPU for an hour.')] = None,
    speed: Annotated[
        float | None,
        typer.Option('--tokens-per-second', min=1, help='Measured on one GPU, for one training config and one --gpu.'),
    ] = None,
) -> None:
    """Print the table of predictions."""
    run_files = [text for text in arguments or [] if '=' not in text]
    overrides = [text for text in arguments or [] if '=' in text]
    names, devices = run_files or list(TABLE_1), gpu or list(GPUS)
    assumed, table = Assumed(), Table(title=f'{gpus} GPUs, {batch} sequences a batch, {tokens:.3g} tokens: PREDICTED')
    for column in ('run', 'GPU', 'tokens/s', 'days', 'GPU hours', 'cost', 'b', 'sharding', 'ckpt', 'GB', 'traffic'):
        table.add_column(column, justify='left' if column in ('run', 'GPU', 'sharding') else 'right')
    with one_line_errors('scale'):
        if speed is not None and len(names) * len(devices) != 1:
            raise ValueError('--tokens-per-second is of one training config on one --gpu; set both')
        for device in devices:
            if device not in GPUS:
                raise ValueError(f'--gpu {device}: not one of {", ".join(GPUS)}')
            for file in names:
                model, S = resolve_model(file, overrides)
                decoder, of = Decoder.from_model_config(model), GPUS[device]
                one = speed or tokens_per_second(decoder, S, of)
                settings, took = best(decoder, S, batch, gpus, of, one, assumed)
                together = batch * S / took.seconds
                hours = took.gpu_hours(tokens / (batch * S), gpus)
                table.add_row(
                    Path(file).stem, device, f'{together / 1000:.0f}k', f'{hours / gpus / 24:.2f}', f'{hours:.0f}',
                    '' if price is None else f'{hours * price:.0f}', str(settings.microbatch), settings.strategy,
                    'yes' if settings.checkpointing else 'no', f'{took.memory / 1e9:.0f}',
                    f'{took.exposed_traffic / took.seconds:.1%}',
                )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    guesses = [f'{field.name} {getattr(assumed, field.name)}' for field in fields(assumed)]
    if speed is None:
        measured = [f'overhead of {key} {overhead}' for key, overhead in OVERHEAD.items()]
        console.print(
            f'Measured on one H200 at 162m, of ITT x4: utilisation {GPUS["h100"].utilisation}, {", ".join(measured)}; '
            'the overhead is taken for every size, number of steps and GPU.'
        )
        guesses += [f'utilisation of {name} {GPUS[name].utilisation}' for name in devices if name != 'h100']
    console.print(f'Assumed, not measured: {", ".join(guesses)}.')
