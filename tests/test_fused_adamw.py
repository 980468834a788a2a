"""The fused optimizer against Composer's own: weights over a schedule, its state, and what it asks of the device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from common.operations import Operations
from composer.optim import DecoupledAdamW
from torch import nn

from itt_composer.training.fused_adamw import DecoupledAdamW as FusedDecoupledAdamW

OPTIONS = dict(lr=3e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-2)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, by_closure: bool = False) -> None:
    """Do the steps ``first`` to ``last`` of a schedule that ends at 20; in step 7 a gradient is missing."""
    for step in range(first, last):
        for group in optimizer.param_groups:
            group['lr'] = group['initial_lr'] * min(step / 5, (20 - step) / 15)
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))

        def loss(x=x, step=step):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :4].sin()).square().mean()
            loss.backward()
            if step == 7:
                model[0].bias.grad = None
            return loss

        if by_closure:
            assert optimizer.step(loss).requires_grad
        else:
            loss()
            optimizer.step()


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize('changed', [{}, {'weight_decay': 0.0}, {'amsgrad': True}])
def test_weights_are_composers(changed):
    ours, theirs = model(), model()
    train(ours, FusedDecoupledAdamW(ours.parameters(), **OPTIONS | changed), 0, 20)
    train(theirs, DecoupledAdamW(theirs.parameters(), **OPTIONS | changed), 0, 20)
    assert largest_difference(theirs, model()) > 0.1
    assert largest_difference(ours, theirs) < 1e-6


def test_groups_and_closures_are_composers():
    ours, theirs = model(), model()
    groups = [
        [{'params': m[0].parameters()}, {'params': m[2].parameters(), 'lr': 1e-2, 'weight_decay': 0.1}]
        for m in (ours, theirs)
    ]
    train(ours, FusedDecoupledAdamW(groups[0], **OPTIONS), 0, 20, by_closure=True)
    train(theirs, DecoupledAdamW(groups[1], **OPTIONS), 0, 20, by_closure=True)
    assert largest_difference(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    ('first_half', 'second_half'),
    [
        (FusedDecoupledAdamW, FusedDecoupledAdamW),
        (DecoupledAdamW, FusedDecoupledAdamW),
        (FusedDecoupledAdamW, DecoupledAdamW),
    ],
)
def test_a_state_goes_on(first_half, second_half, tmp_path):
    whole, halves = model(), model()
    train(whole, FusedDecoupledAdamW(whole.parameters(), **OPTIONS), 0, 20)
    assert first_half.__qualname__ == FusedDecoupledAdamW.__qualname__, 'by which a checkpoint finds the state'
    first = first_half(halves.parameters(), **OPTIONS)
    train(halves, first, 0, 10)
    torch.save(first.state_dict(), tmp_path / 'state.pt')
    second = second_half(halves.parameters(), **OPTIONS)
    second.load_state_dict(torch.load(tmp_path / 'state.pt'))
    assert all(group['weight_decay'] == OPTIONS['weight_decay'] for group in second.param_groups)
    assert second_half is DecoupledAdamW or all(group['fused'] for group in second.param_groups)
    train(halves, second, 10, 20)
    assert largest_difference(whole, halves) < 1e-6


def operations(kind: type[torch.optim.Optimizer]) -> Counter:
    """Operations of the second step."""
    trained = model()
    optimizer = kind(trained.parameters(), **OPTIONS)
    train(trained, optimizer, 1, 2)
    with Operations() as seen:
        optimizer.step()
    return Counter({name: n for name, n in seen.counts.items() if name.startswith('aten::')})


def test_a_step_is_one_kernel_and_waits_for_nothing():
    assert operations(FusedDecoupledAdamW) == {'aten::_foreach_add_.Scalar': 1, 'aten::_fused_adamw_': 1}
    assert operations(DecoupledAdamW)['aten::_local_scalar_dense'] == 4, 'the count sees a wait for the device'
