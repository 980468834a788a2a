"""Parameters and gradients in one piece on two ranks, under FSDP 1 and 2, with nothing but PyTorch and gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist
from common.ranks import run_on_ranks, use_fsdp2_over_gloo
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from itt_composer.model import ITTConfig, ITTForCausalLM
from itt_composer.model.sharding import unsharded, whole


class Net(nn.Module):
    """Layers of their own FSDP unit, as a decoder's are, and a head that is in the root unit; odd sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7)) for _ in range(2))
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def wanted(net: nn.Module) -> dict[str, nn.Module]:
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 5
    return {f'linear{i}': linear for i, linear in enumerate(linears)}


def backward(net: nn.Module, x: torch.Tensor) -> None:
    net(x).square().mean().backward()


def check_version(version: int) -> None:
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    expected = Net()
    backward(expected, x)

    net = Net()
    if version == 1:
        for i, layer in enumerate(net.layers):
            net.layers[i] = FullyShardedDataParallel(layer, use_orig_params=True, device_id=torch.device('cpu'))
        net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device('cpu'))
    else:
        for layer in net.layers:
            fully_shard(layer)
        fully_shard(net)
        use_fsdp2_over_gloo()
    backward(net, x)

    keys = []
    for (key, linear), reference in zip(
        unsharded(net, wanted(net), with_grads=True), wanted(expected).values(), strict=True
    ):
        keys.append(key)
        for name in ('weight', 'bias'):
            parameter, like = getattr(linear, name), getattr(reference, name)
            torch.testing.assert_close(whole(parameter), like.detach(), rtol=0, atol=0)
            torch.testing.assert_close(whole(parameter.grad), like.grad)
    assert sorted(keys) == sorted(wanted(expected))


def check_initial_values() -> None:
    """Composer's order for ``init_device: meta`` under FSDP2: shards first, then values."""
    shape = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    with torch.device('meta'):
        model = ITTForCausalLM(ITTConfig(**shape, thinking='itt', residual_scale_init=2.0))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device='cpu')
    for module in model.modules():
        model._init_weights(module)
    layer = model.model.layers[0]
    phi_TD, router_TD = whole(layer.phi_TD), whole(layer.router_TD)
    assert (phi_TD[0] == 2).all() and (phi_TD[1:] == model.config.step_encoding_init).all()
    assert 0 < router_TD.abs().max() < 0.02 and not layer.threshold_T.any()


def test_parameters_and_gradients_come_back_whole_and_values_are_set_after_sharding():
    def check_rank():
        dist.init_process_group('gloo')
        check_version(1)
        check_version(2)
        check_initial_values()

    run_on_ranks(2, check_rank)


def test_a_model_that_is_not_sharded_is_passed_through():
    net = Net()
    linears = wanted(net)
    assert dict(unsharded(net, linears)) == linears
    assert whole(net.head.weight).data_ptr() == net.head.weight.data_ptr()
