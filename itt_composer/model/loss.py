"""The language-modelling loss without the logits of all tokens.

N tokens (B * S), C tokens of a chunk, D hidden, V vocabulary.

With V = 32000 the logits are the largest tensor of a training step, and softmax and its gradient need them in float32
twice more. Here the forward pass computes the loss and its gradients together, a chunk of tokens at a time. The
derivative by the logits is softmax(logits) minus one-hot(label). Only the gradients are saved for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from itt_composer.ops.precision import product_dtype

IGNORED = -100

LossAndDerivative = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_and_derivative(logits_CV: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and softmax - one-hot in the memory of the logits, rounded once.

    The rows of ignored labels are not zero.
    """
    log_p_CV = _log_softmax(logits_CV)
    at_label_C1 = label_C.masked_fill(label_C == IGNORED, 0)[:, None]
    log_p_C1 = log_p_CV.gather(1, at_label_C1)
    loss = -log_p_C1.masked_fill((label_C == IGNORED)[:, None], 0).sum()
    grad_CV = torch.exp(log_p_CV, out=logits_CV)
    return loss, grad_CV.scatter_(1, at_label_C1, log_p_C1.expm1().to(grad_CV.dtype))


def _log_softmax(logits_CV: Tensor) -> Tensor:
    return F.log_softmax(logits_CV, dim=-1, dtype=torch.promote_types(logits_CV.dtype, torch.float32))


@torch.compiler.disable
def chunked_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    chunk_tokens: int,
    count: Tensor | int | None = None,
    loss_and_derivative: LossAndDerivative = loss_and_derivative,
) -> Tensor:
    """Mean of ``cross_entropy(x @ weight.T, label)`` over the labels that are not -100; NaN where all are.

    The matrix products are in autocast's dtype where it is on, the softmax and the sum over chunks of the weight's
    gradient in float32. The backward pass can be run once.

    Args:
        x_ND: final hidden states.
        weight_VD: the head's weight.
        label_N: the token that follows each state.
        chunk_tokens: C, the tokens whose logits are held at a time.
        count: what the sum is divided by instead of the number of labels.
        loss_and_derivative: the function of that name here, or the same compiled.
    """
    dtype = product_dtype(x_ND)
    count = (label_N != IGNORED).sum() if count is None else torch.as_tensor(count, device=x_ND.device)
    return _ChunkedCrossEntropy.apply(x_ND, weight_VD, label_N, chunk_tokens, dtype, count, loss_and_derivative)


def cross_entropy(logits_NV: Tensor, label_N: Tensor, count: Tensor | int | None = None) -> Tensor:
    """The same loss where the logits are wanted anyway."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if count is None:
        return F.cross_entropy(logits_NV, label_N, ignore_index=IGNORED)
    count = torch.as_tensor(count, device=logits_NV.device)
    return F.cross_entropy(logits_NV, label_N, ignore_index=IGNORED, reduction='sum') / count


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        label_N: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
        count: Tensor,
        loss_and_derivative: LossAndDerivative,
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        weight = weight_VD.to(dtype)
        sum_type = torch.promote_types(dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=sum_type, device=x_ND.device)
        grad_ND = torch.empty_like(x_ND) if needs_x else None
        grad_VD = torch.zeros_like(weight_VD, dtype=sum_type) if needs_weight else None
        for start in range(0, len(x_ND), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            label_C, counts_C1 = label_N[chunk], (label_N[chunk] != IGNORED)[:, None]
            # Here and below, zeros in a token's D numbers leave it out: cheaper than in its V derivatives.
            x_CD = x_ND[chunk].to(dtype) * counts_C1
            logits_CV = x_CD @ weight.T
            if not (needs_x or needs_weight):
                loss_sum += F.nll_loss(_log_softmax(logits_CV), label_C, ignore_index=IGNORED, reduction='sum')
                continue
            loss, grad_CV = loss_and_derivative(logits_CV, label_C)
            loss_sum += loss
            if grad_ND is not None:
                grad_ND[chunk] = (grad_CV @ weight) * counts_C1
            if grad_VD is not None and dtype == sum_type:
                grad_VD.addmm_(grad_CV.T, x_CD)
            elif grad_VD is not None:
                grad_VD += grad_CV.T @ x_CD
        ctx.save_for_backward(grad_ND, grad_VD, count)
        ctx.weight_dtype = weight_VD.dtype
        return loss_sum / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD, count = ctx.saved_tensors
        scale = grad / count.clamp(min=1)
        # In place: a copy of the weight's gradient would stand at the step's peak of memory. PyTorch refuses to run
        # the backward pass a second time after this.
        grad_x = None if grad_ND is None else grad_ND.mul_(scale)
        grad_weight = None if grad_VD is None else grad_VD.mul_(scale).to(ctx.weight_dtype)
        return grad_x, grad_weight, *[None] * 5
