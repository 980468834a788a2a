"""Two ways to the same tensor, compared backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.testing import assert_close


def assert_same_gradients(got: Tensor, expected: Tensor, inputs: Sequence[Tensor], probe: Tensor) -> None:
    """The gradients of both by ``inputs`` are the same bits, or both absent."""
    got_grads = torch.autograd.grad(got, inputs, probe, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, inputs, probe, allow_unused=True)
    for got_grad, expected_grad in zip(got_grads, expected_grads, strict=True):
        assert (got_grad is None) == (expected_grad is None)
        assert got_grad is None or torch.equal(got_grad, expected_grad)


def assert_same_logits_and_loss(ours: nn.Module, theirs: nn.Module, ids_BS: Tensor, labelled: int) -> None:
    """Both give the same logits and loss, with only ``labelled`` labels of the second text; both keep gradients."""
    labels_BS = ids_BS.clone()
    labels_BS[1, labelled:] = -100
    expected, got = theirs(ids_BS, labels=labels_BS), ours(ids_BS, labels=labels_BS)
    assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    got.loss.backward()
