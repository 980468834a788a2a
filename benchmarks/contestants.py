"""The models in the benchmarks of training: shapes, models, and one optimizer step."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from timing import seconds
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from itt_composer.model import ITTConfig, ITTForCausalLM
from itt_composer.model.compiled import compile_blocks

SIZES = Path(__file__).parents[1] / 'yamls' / 'parts' / 'size'
REDUCED = dict(
    vocab_size=8000,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
)
"""The proportions of the 162M model at a width for a CPU."""

FAMILIES = {
    'dense': {},
    'loop x4': {'thinking': 'loop', 'thinking_steps': 3},
    'itt x4 refresh': {'thinking': 'itt'},
    'itt x4 shared': {'thinking': 'itt', 'thinking_kv': 'shared'},
    'itt x4 routed_only': {'thinking': 'itt', 'thinking_kv': 'routed_only'},
}
BLOCKS = {
    'llama': {},
    'mistral': {},
    'qwen2': {'qkv_bias': True},
    'qwen3': {'qk_norm': True},
    'gpt2': {'norm': 'layernorm', 'mlp': 'gelu', 'qkv_bias': True, 'o_bias': True, 'position': 'learned'},
}
"""Options that make our block that of a family of Hugging Face's models."""
HUGGING_FACE, MPT, COMPILED = 'Hugging Face, SDPA', 'MPT (llm-foundry)', ', compiled'
WHOLE = 'dense, complete model' + COMPILED


def shape(size: str, S: int) -> dict:
    """Return the keys of a model: ``reduced``, or a size of ``yamls/parts/size``."""
    if size == 'reduced':
        return dict(REDUCED, max_position_embeddings=S)
    models = sizes()
    if size not in models:
        raise SystemExit(f'--size {size}: no such size; reduced, or one of {", ".join(models)}')
    return dict(models[size], max_position_embeddings=S)


def sizes() -> dict[str, dict]:
    """Return the shapes of ``yamls/parts/size`` by name, without those that take the vocabulary of the data."""
    models = {file.stem: yaml.safe_load(file.read_text()).get('model', {}) for file in sorted(SIZES.glob('*.yaml'))}
    return {size: model for size, model in models.items() if model.get('vocab_size')}


def names(peers: bool, compiled: bool) -> list[str]:
    """Return the names: the families, other libraries' dense models with ``peers``, and each of them compiled too.

    Of the families the blocks are compiled, of :data:`WHOLE` the complete dense model.
    """
    first = [HUGGING_FACE, MPT] if peers else []
    eager = [*first, *FAMILIES]
    return [*eager, *(name + COMPILED for name in eager), WHOLE] if compiled else eager


def hugging_face(block: str, shape: dict) -> PreTrainedModel:
    """Build Hugging Face's model of a family in :data:`BLOCKS`, without dropout and sliding window."""
    keys = {key: value for key, value in shape.items() if key not in BLOCKS[block]}
    if block == 'gpt2':
        keys['n_inner'] = keys.pop('intermediate_size')
        assert keys.pop('num_key_value_heads') == keys['num_attention_heads'], 'GPT-2 has no grouped queries'
    if block == 'qwen3':
        keys['head_dim'] = keys['hidden_size'] // keys['num_attention_heads']  # Its default is 128.
    plain = {'sliding_window': None, 'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
    config = AutoConfig.for_model(block, **keys, **plain, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config, attn_implementation='sdpa')


def build(name: str, shape: dict, device: str, block: str = 'llama', autocast_residual: bool = False) -> nn.Module:
    """Build a model whose call on token ids returns the loss of the next token.

    Args:
        name: one of :func:`names`.
        shape: the keys of :func:`shape`.
        device: where the model is to be.
        block: one of :data:`BLOCKS`, for Hugging Face's model.
        autocast_residual: hidden states of our models have autocast's dtype.
    """
    family = 'dense' if name == WHOLE else name.removesuffix(COMPILED)
    if family == MPT:
        model: nn.Module = Mpt(shape)
    elif family == HUGGING_FACE:
        model = Loss(hugging_face(block, shape))
    else:
        ours = ITTForCausalLM(ITTConfig(**shape, **FAMILIES[family]))
        ours.model.autocast_residual = autocast_residual
        model = Loss(ours, with_logits=False)
    model = model.to(device)
    if name.endswith(COMPILED):
        if family in FAMILIES and name != WHOLE:
            compile_blocks(model)
        else:
            model.compile()
    return model


class Loss(nn.Module):
    """A Hugging Face causal language model as a function from token ids to its loss."""

    def __init__(self, model: nn.Module, **options: bool):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.model(input_ids=ids_BS, labels=ids_BS, **self.options).loss


class Mpt(nn.Module):
    """Foundry's MPT decoder with the parts of LLaMA: RMSNorm, rotary embedding, gated SiLU, no biases, untied head."""

    def __init__(self, shape: dict):
        super().__init__()
        from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM

        attention = {
            'attn_type': 'grouped_query_attention',
            'kv_n_heads': shape['num_key_value_heads'],
            'attn_impl': 'flash' if importlib.util.find_spec('flash_attn') else 'torch',
            'rope': True,
            'rope_impl': 'hf',
        }
        activation = {'name': 'silu'}
        config = MPTConfig(
            d_model=shape['hidden_size'],
            n_heads=shape['num_attention_heads'],
            n_layers=shape['num_hidden_layers'],
            max_seq_len=shape['max_position_embeddings'],
            vocab_size=shape['vocab_size'],
            learned_pos_emb=False,
            attn_config=attention,
            ffn_config={
                'ffn_type': 'mptglu',
                'ffn_hidden_size': shape['intermediate_size'],
                'ffn_act_fn': activation,
            },
            norm_type='low_precision_rmsnorm',
            no_bias=True,
            tie_word_embeddings=False,
        )
        self.model = MPTForCausalLM(config)

    def forward(self, ids_BS: Tensor) -> Tensor:
        next_BS = F.pad(ids_BS[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(self.model(ids_BS).logits.flatten(0, 1), next_BS.flatten())


def step_of(model: nn.Module, ids_BS: Tensor) -> Callable[[], None]:
    """Return a function that does one optimizer step on ``ids_BS``; bfloat16 autocast on a GPU, float32 on a CPU.

    The learning rate is 0: on one batch again and again, routers soon route only early or only late tokens, and the
    time of attention with them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        with torch.autocast('cuda', torch.bfloat16, enabled=ids_BS.is_cuda):
            loss = model(ids_BS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@functools.lru_cache
def peak_flops(device: str) -> float:
    """Measure FLOP/s: the best of ten products of two large square matrices, in the dtype of the steps."""
    n, dtype = (8192, torch.bfloat16) if device == 'cuda' else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10))
