"""Small models of every family with routers that route about half of the tokens."""

import torch

from itt_composer.model import ITTConfig, ITTForCausalLM, thinking_layers
from itt_composer.model.rotary import Rotation

COMBINE = ['weighted', 'equation7', 'algorithm1', 'delta']
KV = ['refresh', 'shared', 'routed_only']
MODELS = {
    'plain': {},
    'loop': dict(thinking='loop', thinking_steps=2),
    'residual_scale': dict(thinking='residual_scale'),
    **{f'itt weighted {kv}': dict(thinking='itt', thinking_kv=kv) for kv in KV},
    'itt equation7 routed_only': dict(thinking='itt', combine='equation7', thinking_kv='routed_only'),
    'itt algorithm1 refresh': dict(thinking='itt', combine='algorithm1', thinking_kv='refresh'),
    'itt delta shared': dict(thinking='itt', combine='delta', thinking_kv='shared'),
    'itt symmetric': dict(thinking='itt', reweighting='symmetric'),
    'itt replaced': dict(thinking='itt', residual_thinking=False, thinking_kv='routed_only', step_encoding_init=1.0),
    'loop blocks': dict(thinking='loop', thinking_steps=2, thinking_layers=[0, [2, 3]]),
    **{f'itt blocks {kv}': dict(thinking='itt', thinking_kv=kv, thinking_layers=[[0, 1], 3]) for kv in KV},
    'itt unrouted': dict(thinking='itt', token_routing=False, thinking_kv='routed_only', token_ratios=[1, 1, 1]),
}
SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def build(seed: int = 0, **options) -> ITTForCausalLM:
    """A model whose routers route about half of the tokens, unlike at each step and layer."""
    torch.manual_seed(seed)
    model = ITTForCausalLM(ITTConfig(**{**SHAPE, **options})).eval()
    for layer in thinking_layers(model).values():
        layer.threshold_updates.fill_(1)
        layer.threshold_T.copy_(torch.tensor([0.1, -0.1, 0.05])[: len(layer.threshold_T)])
        layer.phi_TD.data.add_(0.1 * torch.randn_like(layer.phi_TD))
        if layer.router_TD is not None:
            layer.router_TD.data.copy_(4 * torch.randn_like(layer.router_TD))
    return model


def share_routed(model, ids) -> list[float]:
    """The fraction of the tokens that each step of each layer routes."""
    if model.routing is None:
        return []
    with model.routing.recording() as records:
        model(ids)
    return [record.routed_BS.float().mean().item() for record in records]


def rotation(model, S: int) -> Rotation:
    """The rotary embedding at positions 0..S-1."""
    return Rotation.at(torch.arange(S)[None], model.config)
