"""Two ways to the same tensor, compared backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_same_gradients(got: Tensor, expected: Tensor, inputs: Sequence[Tensor], probe: Tensor) -> None:
    """The gradients of both by ``inputs`` are the same bits, or both absent."""
    got_grads = torch.autograd.grad(got, inputs, probe, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, inputs, probe, allow_unused=True)
    for got_grad, expected_grad in zip(got_grads, expected_grads, strict=True):
        assert (got_grad is None) == (expected_grad is None)
        assert got_grad is None or torch.equal(got_grad, expected_grad)
