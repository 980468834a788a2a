"""How the result of thinking step t joins the state (Eq. 4, 6 and 7, Algorithm 1, the proof in A.3).

B batch, S sequence, K chosen tokens, D hidden. ``y`` is the state before the step, ``z = f(y[chosen])``.

With residual thinking and its defaults, per chosen token::

    weighted     y += (alpha * weight * z) * phi              Eq. 4 and 6
    equation7    the same; tokens not chosen: y += y * phi    Eq. 6's second case in Eq. 7
    algorithm1   y += (y + alpha * z) * phi                   Algorithm 1, line 5
    delta        y += (alpha * weight * (z - y)) * phi        a correction, as in A.3

``residual_thinking: false`` puts the step's result in place of the state instead of adding it (Table 3).
"""

from __future__ import annotations

from torch import Tensor

from itt_composer.model.selection import PackedSelection, Selection


def step_result(combine: str, y_BKD: Tensor, z_BKD: Tensor, weight_BK1: Tensor, alpha: float) -> Tensor:
    """What a chosen token adds to its state, before the step encoding. [B, K, D]."""
    if combine == 'algorithm1':
        # Algorithm 1 has no weight in it, so as printed its routers would never learn. This factor is exactly one in
        # the forward pass and passes the weight's gradient on in the backward pass.
        pass_through_BK1 = 1 + (weight_BK1 - weight_BK1.detach())
        return y_BKD + alpha * pass_through_BK1 * z_BKD
    if combine == 'delta':
        return alpha * weight_BK1 * (z_BKD - y_BKD)
    return alpha * weight_BK1 * z_BKD


def combine_step(
    combine: str,
    y_BSD: Tensor,
    y_BKD: Tensor,
    z_BKD: Tensor,
    chosen: Selection | PackedSelection | None,
    weight_BK1: Tensor,
    alpha: float,
    phi_D: Tensor | None,
    residual: bool = True,
    unchosen_scale_BS1: Tensor | None = None,
) -> Tensor:
    """The state after a step, [B, S, D].

    Args:
        combine: one of the four readings above.
        y_BSD: the state before the step.
        y_BKD: the same, of the chosen tokens.
        z_BKD: f of the chosen tokens.
        chosen: which tokens they are; None: all.
        weight_BK1: the routers' weights of the chosen tokens.
        alpha: alpha_t, the step's fixed scale.
        phi_D: phi[t], the step's encoding; None: one.
        residual: add to the state (Section 3.2), or take its place.
        unchosen_scale_BS1: 1 - weight, by which tokens that were not chosen are scaled (``reweighting: symmetric``).
    """
    if chosen is not None and residual and unchosen_scale_BS1 is None and combine in ('weighted', 'delta'):
        # One kernel where there is one: nothing of size K * D is stored on the way.
        return chosen.add_weighted(y_BSD, z_BKD - y_BKD if combine == 'delta' else z_BKD, weight_BK1, alpha, phi_D)
    result_BKD = step_result(combine, y_BKD, z_BKD, weight_BK1, alpha)

    if chosen is None:
        encoded_BKD = _encode(result_BKD, phi_D).to(y_BSD.dtype)
        return y_BSD + encoded_BKD if residual else encoded_BKD

    kept_BSD = y_BSD if unchosen_scale_BS1 is None else (y_BSD * unchosen_scale_BS1).to(y_BSD.dtype)
    if combine == 'equation7':
        encoded_BSD = _encode(chosen.replace(kept_BSD, result_BKD.to(y_BSD.dtype)), phi_D).to(y_BSD.dtype)
        return y_BSD + encoded_BSD if residual else encoded_BSD

    encoded_BKD = _encode(result_BKD, phi_D).to(y_BSD.dtype)
    if residual and unchosen_scale_BS1 is None:
        return chosen.add(y_BSD, encoded_BKD)
    return chosen.replace(kept_BSD, y_BKD + encoded_BKD if residual else encoded_BKD)


def _encode(result: Tensor, phi_D: Tensor | None) -> Tensor:
    return result if phi_D is None else result * phi_D
