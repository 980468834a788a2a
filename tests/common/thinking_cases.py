"""A small ITT layer far from its initial values, and its comparison with the written-out recurrence."""

from __future__ import annotations

import copy

import torch
from torch.testing import assert_close

from common import reference
from itt_composer.model import ITTConfig, ITTLayer, RoutingState
from itt_composer.model.rotary import Rotation

B, S, D = 2, 7, 12
CHOICES = {
    'combine': ['weighted', 'equation7', 'algorithm1', 'delta'],
    'thinking_kv': ['refresh', 'shared', 'routed_only'],
    'residual_thinking': [True, False],
    'step_encoding': [True, False],
    'selection': ['top_k', 'top_p', 'threshold'],
    'weight_norm': ['sigmoid', 'tanh'],
    'reweighting': ['routed_only', 'symmetric'],
}


def small_config(**options) -> ITTConfig:
    shape = dict(vocab_size=31, hidden_size=D, intermediate_size=10, num_hidden_layers=2, num_attention_heads=3)
    options = {'thinking': 'itt', 'token_ratios': [0.75, 0.45], **options}
    # In evaluation mode too the training rules are what is compared.
    options.setdefault('evaluation_selection', options.get('selection', 'top_k'))
    return ITTConfig(**shape, num_key_value_heads=1, **options)


def small_layer(config: ITTConfig, seed: int = 0) -> ITTLayer:
    """A layer with every parameter far from its initial value, so that none of them is neutral."""
    generator = torch.Generator().manual_seed(seed)
    layer = ITTLayer(config, 0, RoutingState.of(config))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * (12 / D) ** 0.5 * torch.randn(parameter.shape, generator=generator))
        if layer.phi_TD is not None:
            layer.phi_TD += 1
        layer.threshold_T.copy_(torch.tensor([-0.2, 0.1])[: config.thinking_steps])
    return layer.eval()


def states(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed))


def rotation(config: ITTConfig, device: str = 'cpu') -> Rotation:
    return Rotation.at(torch.arange(S, device=device)[None], config)


def compare_with_reference(options: dict, device: str = 'cpu') -> None:
    """The layer on ``device``, in training and in evaluation, against the recurrence on the CPU."""
    config = small_config(**options)
    layer, x_BSD = small_layer(config), states().requires_grad_()
    probe = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2))
    expected = torch.stack([reference.itt_layer(layer, config, x_SD) for x_SD in x_BSD])
    expected_grads = torch.autograd.grad((expected * probe).sum(), [x_BSD, *layer.parameters()])
    names = ['x', *(name for name, _ in layer.named_parameters())]
    for training in (True, False):
        case = f'{options}, {"training" if training else "evaluation"}'
        there = copy.deepcopy(layer).to(device).train(training)
        y_BSD = there(x_BSD.to(device), rotation(config, device))[0].cpu()
        grads = torch.autograd.grad((y_BSD * probe).sum(), [x_BSD, *there.parameters()])
        assert_close(y_BSD.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda m, case=case: f'{case}: {m}')
        for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
            assert expected_grad.abs().max() > 0, f'{case}: no gradient reaches {name}'
            error = (grad.cpu() - expected_grad).abs().max() / expected_grad.abs().max()
            assert error < 1e-3, f'{case}: gradient of {name} is off by {error:.1e}'
