"""Tokens per second of ``generate()``: the dense and ITT x4 models relative to Hugging Face's model of the same size.

    python benchmarks/decode.py [--prompt-length 64] [--new-tokens 128] [--rounds 5] [--out results.csv]

Greedy decoding. The models take turns, so that a machine that slows down slows all of them. Ratios are taken within a
round; the table shows medians over the rounds. ITT's thresholds are calibrated on random tokens to the paper's ratios.

- ``routed``: the fraction of tokens that ITT routed in decoding.
- ``FLOPs ratio``: exact FLOPs relative to Hugging Face's model, of a token at the mean length. With a cache that of
  the token alone, without one that of the complete text and the last token's logits. Generations without a cache are
  short and around that length.
- ``speed by FLOPs``: the speed relative to Hugging Face's model that the FLOPs alone would allow.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from contestants import BLOCKS, HUGGING_FACE, hugging_face
from report import check_results, show
from rich.progress import track
from transformers import PreTrainedModel

from itt_composer.evaluation.calibrate import calibrate
from itt_composer.flops import Decoder, exact_flops
from itt_composer.model import ITTConfig, ITTForCausalLM, routing_state

CPU = dict(vocab_size=8000, hidden_size=512, intermediate_size=1280, num_attention_heads=16, num_key_value_heads=16)
GPU = dict(vocab_size=32000, hidden_size=1024, intermediate_size=2560, num_attention_heads=32, num_key_value_heads=32)
ITT = {'itt x4 refresh': 'refresh', 'itt x4 shared': 'shared', 'itt x4 routed_only': 'routed_only'}
UNCACHED_TOKENS = 8


def itt(shape: dict, kv: str, device: str, S: int) -> ITTForCausalLM:
    """Build an ITT x4 model whose thresholds route the paper's fraction of random tokens."""
    config = ITTConfig(
        **shape, thinking='itt', thinking_kv=kv, embedding_initializer_range=0.5, router_initializer_range=0.3
    )
    model = ITTForCausalLM(config).to(device).eval()
    calibrate(model, torch.randint(shape['vocab_size'], (16, S)), config.token_ratios)
    model.set_thinking(config.token_ratios)
    return model


def seconds(model: PreTrainedModel, prompt_BS: torch.Tensor, new_tokens: int, use_cache: bool) -> float:
    """Measure the wall time of ``generate()``."""
    if prompt_BS.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    text = model.generate(
        prompt_BS,
        attention_mask=torch.ones_like(prompt_BS),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )
    if prompt_BS.is_cuda:
        torch.cuda.synchronize()
    assert text.shape[1] == prompt_BS.shape[1] + new_tokens
    return time.perf_counter() - start


def routed_fraction(model: PreTrainedModel, prompt_BS: torch.Tensor, new_tokens: int) -> float | None:
    """Measure the mean fraction of generated tokens that a step routed."""
    state = routing_state(model)
    if state is None:
        return None
    with state.recording() as records:
        seconds(model, prompt_BS, new_tokens, use_cache=True)
    decoded = [record.routed_BS for record in records if record.routed_BS.shape[1] == 1]
    return torch.stack(decoded).float().mean().item()


def token_flops(shape: dict, length: int, share: float | None, kv: str, cached: bool) -> float:
    """Count the exact FLOPs of one more token at ``length``.

    Without a cache those of the complete text, of which the head sees only the last token.
    """
    thinking = {} if share is None else {'thinking': 'itt', 'thinking_kv': kv}
    decoder = Decoder.from_model_config({**shape, **thinking})
    ratios = None if share is None else [share] * 3
    if not cached:
        text = exact_flops(decoder, length, ratios)
        return text.total - text.head * (length - 1) / length
    span = 100  # The number of routed tokens is an integer, which makes one token's difference rough.
    longer, shorter = exact_flops(decoder, length + span, ratios).total, exact_flops(decoder, length, ratios).total
    return (longer - shorter) / span


def main(
    prompt_length: Annotated[int, typer.Option(help='Tokens of each prompt.')] = 64,
    new_tokens: Annotated[int, typer.Option(help='Tokens generated for each prompt.', min=UNCACHED_TOKENS)] = 128,
    batch_size: Annotated[int, typer.Option(help='Prompts decoded together.')] = 1,
    rounds: Annotated[int, typer.Option(help='Timed generations per model, after one warm-up.')] = 5,
    block: Annotated[str, typer.Option(help=f'The block: {", ".join(BLOCKS)}.')] = 'llama',
    uncached: Annotated[bool, typer.Option(help='Also without a cache.')] = True,
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the benchmark and print its table."""
    check_results(out)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    length = prompt_length + new_tokens
    size = GPU if device == 'cuda' else CPU
    shape = dict(size, num_hidden_layers=8, max_position_embeddings=length) | BLOCKS[block]
    torch.manual_seed(0)
    theirs = hugging_face(block, shape).to(device).eval()
    models: dict[str, PreTrainedModel] = {
        HUGGING_FACE: theirs,
        'dense': ITTForCausalLM.from_pretrained_dense(theirs).eval(),
    }
    models |= {name: itt(shape, kv, device, prompt_length) for name, kv in ITT.items()}
    prompt_BS = torch.randint(3, shape['vocab_size'], (batch_size, prompt_length), device=device)

    middle = prompt_length + new_tokens // 2
    middle_BS = torch.randint(3, shape['vocab_size'], (batch_size, middle - UNCACHED_TOKENS // 2), device=device)
    texts = {True: (prompt_BS, new_tokens), False: (middle_BS, UNCACHED_TOKENS)}
    shares = {name: routed_fraction(model, prompt_BS, new_tokens) for name, model in models.items()}
    runs = [(name, cached) for cached in ((True, False) if uncached else (True,)) for name in models]
    flops = {
        (name, cached): token_flops(shape, middle, shares[name], ITT.get(name, 'refresh'), cached)
        for name, cached in runs
    }
    for name, cached in runs:
        seconds(models[name], *texts[cached], cached)
    times = [
        {(name, cached): seconds(models[name], *texts[cached], cached) for name, cached in runs}
        for _ in track(range(rounds), 'rounds')
    ]

    rows = []
    for name, cached in runs:
        took = statistics.median(round_[name, cached] for round_ in times)
        speed = statistics.median(round_[HUGGING_FACE, cached] / round_[name, cached] for round_ in times)
        ratio, share, tokens = flops[name, cached] / flops[HUGGING_FACE, cached], shares[name], texts[cached][1]
        rows.append(
            {
                'model': name,
                'cache': 'yes' if cached else 'no',
                'tokens/s': f'{batch_size * tokens / took:.1f}',
                'ms/token': f'{1000 * took / tokens:.2f}',
                'speed / Hugging Face': f'{speed:.3f}',
                'routed': '' if share is None else f'{share:.2f}',
                'FLOPs ratio': f'{ratio:.3f}',
                'speed by FLOPs': f'{1 / ratio:.3f}',
            }
        )
    show(rows, f'generate(), {block}, batch {batch_size}, {prompt_length} + {new_tokens} tokens', out)


if __name__ == '__main__':
    typer.run(main)
