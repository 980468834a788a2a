"""How the result of extra step t joins the residual stream (Eq. 4, 6 and 7, Algorithm 1, the proof in A.3).

B batch, S sequence, R sequences that have routed tokens, K routed tokens of each of them, D hidden. ``y`` is the hidden
state before the step, ``z = block(y[routed])``.

With residual thinking and its defaults, per routed token::

    weighted     y += (alpha * gate * z) * phi                Eq. 4 and 6
    equation7    the same; tokens not routed: y += y * phi    Eq. 6's second case in Eq. 7
    algorithm1   y += (y + alpha * z) * phi                   Algorithm 1, line 5
    delta        y += (alpha * gate * (z - y)) * phi          a correction, as in A.3

``residual_thinking: false`` puts the step's result in place of the state instead of adding it (Table 3).
"""

from __future__ import annotations

from torch import Tensor

from itt_composer.model.selection import Selection


def step_result(combine: str, y_RKD: Tensor, z_RKD: Tensor, gate_RK1: Tensor, alpha: float) -> Tensor:
    """What a routed token adds to its hidden state, before the step encoding. [R, K, D]."""
    if combine == 'algorithm1':
        # Algorithm 1 has no gate in it, so as printed its routers would never learn. This factor is exactly one in
        # the forward pass and passes the gate's gradient on in the backward pass.
        pass_through_RK1 = 1 + (gate_RK1 - gate_RK1.detach())
        return y_RKD + alpha * pass_through_RK1 * z_RKD
    if combine == 'delta':
        return alpha * gate_RK1 * (z_RKD - y_RKD)
    return alpha * gate_RK1 * z_RKD


def combine_step(
    combine: str,
    y_BSD: Tensor,
    y_RKD: Tensor,
    z_RKD: Tensor,
    routed: Selection | None,
    gate_RK1: Tensor,
    alpha: float,
    phi_D: Tensor | None,
    residual: bool = True,
    unrouted_scale_BS1: Tensor | None = None,
) -> Tensor:
    """The hidden states after a step, [B, S, D].

    Args:
        combine: one of the four interpretations above.
        y_BSD: the hidden states before the step.
        y_RKD: the same, of the routed tokens.
        z_RKD: the block's result for them.
        routed: which tokens they are; None: all.
        gate_RK1: their gate values.
        alpha: alpha_t, the step's fixed scale.
        phi_D: phi[t], the step's encoding; None: one.
        residual: add to the state (Section 3.2), or take its place.
        unrouted_scale_BS1: 1 - gate, which scales tokens that were not routed (``reweighting: symmetric``).
    """
    if routed is not None and residual and unrouted_scale_BS1 is None and combine in ('weighted', 'delta'):
        # One kernel where there is one: nothing of size K * D is stored on the way.
        return routed.add_weighted(y_BSD, z_RKD - y_RKD if combine == 'delta' else z_RKD, gate_RK1, alpha, phi_D)
    result_RKD = step_result(combine, y_RKD, z_RKD, gate_RK1, alpha)

    if routed is None:
        encoded_RKD = _encode(result_RKD, phi_D).to(y_BSD.dtype)
        return y_BSD + encoded_RKD if residual else encoded_RKD

    unrouted_BSD = y_BSD if unrouted_scale_BS1 is None else (y_BSD * unrouted_scale_BS1).to(y_BSD.dtype)
    if combine == 'equation7':
        encoded_BSD = _encode(routed.replace(unrouted_BSD, result_RKD.to(y_BSD.dtype)), phi_D).to(y_BSD.dtype)
        return y_BSD + encoded_BSD if residual else encoded_BSD

    encoded_RKD = _encode(result_RKD, phi_D).to(y_BSD.dtype)
    if residual and unrouted_scale_BS1 is None:
        return routed.add(y_BSD, encoded_RKD)
    return routed.replace(unrouted_BSD, y_RKD + encoded_RKD if residual else encoded_RKD)


def _encode(result: Tensor, phi_D: Tensor | None) -> Tensor:
    return result if phi_D is None else result * phi_D
