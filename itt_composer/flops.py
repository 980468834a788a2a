"""Parameters and FLOPs of a decoder: the paper's FLOPs column, and an exact count per component.

``itt flops itt_x4_162m`` prints them. Standard library only.

Legend: S sequence length, D hidden size, V vocabulary, L layers, T extra steps, N parameters of the dense
baseline, k routed tokens, rho_t the fraction of tokens that extra step t routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from itt_composer.checks import check_value
from itt_composer.options import ModelOptions, token_count

TRAINING_TO_FORWARD = 3
"""The backward pass costs two forward passes: one for the inputs' gradients, one for the weights'."""


class Decoder(ModelOptions):
    """The options of a model, and what follows from them for its cost."""

    @classmethod
    def from_model_config(cls, model: Mapping[str, Any]) -> Decoder:
        """Return the decoder of a training config's ``model`` section; keys that are no options are ignored."""
        return cls(**{key: model[key] for key in cls.keys() if key in model})

    @property
    def q_size(self) -> int:
        """Width of the queries of all heads together; D unless ``head_dim`` is set."""
        assert self.head_dim is not None
        return self.head_dim * self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Width of the keys (and of the values) of all key-value heads together."""
        assert self.num_key_value_heads is not None and self.head_dim is not None
        return self.head_dim * self.num_key_value_heads

    @property
    def mlp_matrices(self) -> int:
        """Number of matrices of D times ``intermediate_size`` in the MLP."""
        return 3 if self.mlp == 'swiglu' else 2

    @property
    def num_thinking_layers(self) -> int:
        """Number of layers that the extra steps run, those within blocks included."""
        return sum(map(len, self.thinking_blocks))

    def dense(self) -> Decoder:
        """Return the dense baseline of the same shape."""
        shape = {key: getattr(self, key) for key in self.keys() if key not in ('alpha', 'residual_scale_init')}
        return Decoder(**shape | {'thinking': 'none', 'thinking_layers': [], 'thinking_steps': 0, 'token_ratios': []})


@dataclass(frozen=True)
class Parameters:
    """Number of parameters: the dense decoder's, and those that thinking adds."""

    dense: int
    phi: int
    router: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.dense + self.phi + self.router


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass per component: a multiply-add is two.

    Norms, activations, biases and softmax are not counted.
    """

    projections: int = 0
    """Projections to queries, keys and values, and of the attention output."""
    attention: int = 0
    """Scores and weighted sums of the values, over the keys that the causal mask leaves."""
    mlp: int = 0
    router: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """Sum over the components."""
        return sum(self.components().values())

    def components(self) -> dict[str, int]:
        """Component name to FLOPs."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        theirs = other.components()
        return ForwardFlops(**{name: mine + theirs[name] for name, mine in self.components().items()})

    def __mul__(self, times: int) -> ForwardFlops:
        return ForwardFlops(**{name: mine * times for name, mine in self.components().items()})


def routed_tokens(ratio: float, sequence_length: int, token_multiple: int = 1) -> int:
    """Return k of a step as :func:`token_count` does, and 0 for a step removed by ratio 0 (Table 2)."""
    return token_count(ratio, sequence_length, token_multiple) if ratio else 0


def parameters(decoder: Decoder) -> Parameters:
    """Count the parameters of the decoder (Tables 5 and 7), and of phi [T+1, D] and the routers [T, D]."""
    D, I, V = decoder.hidden_size, decoder.intermediate_size, decoder.vocab_size  # noqa: E741
    norm = D if decoder.norm == 'rmsnorm' else 2 * D
    layer = 2 * D * decoder.q_size + 2 * D * decoder.kv_size + decoder.mlp_matrices * D * I + 2 * norm
    layer += decoder.q_size + 2 * decoder.kv_size if decoder.qkv_bias else 0
    layer += D if decoder.o_bias else 0
    layer += I + D if decoder.mlp == 'gelu' else 0
    layer += 2 * (decoder.head_dim or 0) if decoder.qk_norm else 0
    embeddings = V * D * (1 if decoder.tie_word_embeddings else 2)
    embeddings += decoder.max_position_embeddings * D if decoder.position == 'learned' else 0
    T = decoder.steps
    encoded = decoder.thinking == 'residual_scale' or (decoder.thinking == 'itt' and decoder.step_encoding)
    routed = decoder.thinking == 'itt' and decoder.token_routing
    blocks = len(decoder.thinking_blocks)
    return Parameters(
        dense=decoder.num_hidden_layers * layer + norm + embeddings,
        phi=blocks * (T + 1) * D if encoded else 0,
        router=blocks * T * D if routed else 0,
    )


def paper_flops(decoder: Decoder, sequence_length: int = 4096, ratios: Sequence[float] | None = None) -> float:
    """Compute the FLOPs column of Tables 1 to 4: S (2N + 4 L S D) (1 + share * sum_t rho_t) per sequence, forward.

    The embeddings count as a matrix product, and attention without its causal mask. ``share`` is the fraction of
    thinking layers; the column of 230M and 466M counts one in eight, although the text says every other layer.

    Args:
        decoder: Shape and options.
        sequence_length: S, in tokens.
        ratios: rho_t of each extra step, instead of ``token_ratios``; 0 removes a step (Table 2).
    """
    S, L, D = sequence_length, decoder.num_hidden_layers, decoder.hidden_size
    share = decoder.num_thinking_layers / L
    dense = S * (2 * parameters(decoder).dense + 4 * L * S * D)
    return dense * (1 + share * sum(_ratios(decoder, ratios)))


def exact_flops(decoder: Decoder, sequence_length: int = 4096, ratios: Sequence[float] | None = None) -> ForwardFlops:
    """Count the FLOPs of one forward pass of one sequence, per component; the embedding look-up costs none.

    The routed tokens are assumed to be spread evenly over the sequence, so that under ``refresh`` and ``shared`` a
    query attends to (S + 1) / 2 keys on average. With ``top_p`` and ``threshold``, whose number of tokens depends on
    the data, the ratios are the fractions that they route on average.

    Args:
        decoder: Shape and options.
        sequence_length: S, in tokens.
        ratios: Fraction of tokens of each extra step, instead of ``token_ratios``: a capacity during its warm-up, or 0
            for a step that is removed.
    """
    S = sequence_length
    pairs = S * (S + 1) // 2
    flops = _block(decoder, tokens=S, pairs=pairs) * decoder.num_hidden_layers
    for ratio in _ratios(decoder, ratios):
        k = routed_tokens(ratio, S, decoder.token_multiple)
        step = _block(
            decoder,
            tokens=k,
            pairs=k * (k + 1) // 2 if decoder.thinking_kv == 'routed_only' else k * (S + 1) // 2,
            new_kv=not (decoder.thinking == 'itt' and decoder.thinking_kv == 'shared'),
        )
        # Every token is scored before the step, routed or not, once for all layers of a block.
        routed = decoder.thinking == 'itt' and decoder.token_routing and k > 0
        score = ForwardFlops(router=2 * S * decoder.hidden_size if routed else 0)
        flops += step * decoder.num_thinking_layers + score * len(decoder.thinking_blocks)
    return flops + ForwardFlops(head=2 * S * decoder.hidden_size * decoder.vocab_size)


def training_flops(decoder: Decoder, sequence_length: int = 4096, ratios: Sequence[float] | None = None) -> int:
    """Count the exact FLOPs of the forward and backward pass of one sequence; arguments as for ``exact_flops``."""
    return TRAINING_TO_FORWARD * exact_flops(decoder, sequence_length, ratios).total


def report(decoder: Decoder, sequence_length: int) -> dict[str, Any]:
    """Return what the command prints: parameters, and TFLOPs per forward pass of one sequence."""
    count = parameters(decoder)
    exact, dense = exact_flops(decoder, sequence_length), exact_flops(decoder.dense(), sequence_length)
    return {
        'parameters': count.total,
        'dense_parameters': count.dense,
        'phi_parameters': count.phi,
        'router_parameters': count.router,
        'sequence_length': sequence_length,
        'thinking': decoder.thinking,
        'thinking_layers': decoder.thinking_layers,
        'token_ratios': decoder.token_ratios,
        'thinking_kv': decoder.thinking_kv,
        'paper_tflops': paper_flops(decoder, sequence_length) / 1e12,
        'exact_tflops': exact.total / 1e12,
        'components': {name: flops / 1e12 for name, flops in exact.components().items()},
        'training_tflops': training_flops(decoder, sequence_length) / 1e12,
        'flops_ratio_to_dense': exact.total / dense.total,
    }


def _ratios(decoder: Decoder, ratios: Sequence[float] | None) -> Sequence[float]:
    """Return the fraction of tokens of each extra step: the model's own, or ``ratios``, checked."""
    own = decoder.token_ratios
    assert own is not None
    ratios = own if ratios is None else ratios
    if len(ratios) != len(own):
        raise ValueError(f'ratios: {len(ratios)} for {len(own)} extra steps; set one per step, 0 for a step removed')
    for t, ratio in enumerate(ratios, start=1):
        check_value(f'ratios: step {t}', ratio, 'float', minimum=0, maximum=1)
    if decoder.thinking == 'itt' and decoder.token_routing:
        return ratios
    return [1.0 if ratio else 0.0 for ratio in ratios]  # Without a router every token takes the step.


def _block(decoder: Decoder, tokens: int, pairs: int, new_kv: bool = True) -> ForwardFlops:
    """Count one pass of one decoder layer over ``tokens`` tokens whose queries attend to ``pairs`` keys in all."""
    D = decoder.hidden_size
    query_and_output = 2 * 2 * tokens * D * decoder.q_size
    key_and_value = 2 * 2 * tokens * D * decoder.kv_size if new_kv else 0
    return ForwardFlops(
        projections=query_and_output + key_and_value,
        attention=4 * pairs * decoder.q_size,
        mlp=decoder.mlp_matrices * 2 * tokens * D * decoder.intermediate_size,
    )
