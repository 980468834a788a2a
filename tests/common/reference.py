"""The ITT layer written out in float64, one token at a time: the oracle for every option of the model.

It shares no code with the package. Routing is a sort of a Python list, and the keys and values are a dictionary from
position to vectors, of which a token sees those up to its own, so that each mode of ``thinking_kv`` is what its name
says. It reads a layer's parameters and runs under autograd, so gradients can be compared too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def f64(parameter: Tensor) -> Tensor:
    """A parameter in float64, still attached to it."""
    return parameter.double()


def rms_norm(x_D: Tensor, norm: nn.Module, eps: float) -> Tensor:
    return x_D / torch.sqrt((x_D * x_D).mean() + eps) * f64(norm.weight)


def rotate(x_HE: Tensor, position: int, theta: float) -> Tensor:
    """Turn the pair (x[i], x[i + E/2]) of each head by the angle position * theta^(-2i/E)."""
    E = x_HE.shape[1]
    angle = torch.tensor([position * theta ** (-2 * i / E) for i in range(E // 2)], dtype=torch.float64)
    a, b = x_HE.split(E // 2, dim=1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)


def project(x_D: Tensor, linear: nn.Module, size: int) -> Tensor:
    """A projection, split into heads: [heads, size]."""
    return (f64(linear.weight) @ x_D).view(-1, size)


def f(block: nn.Module, config, state: dict[int, Tensor], keys: dict[int, tuple], own_keys: bool) -> dict[int, Tensor]:
    """One pass of a decoder block over the tokens in ``state`` (position to vector).

    ``keys`` maps a position to its keys and values, and is updated with the tokens' own where ``own_keys``.
    """
    E = config.hidden_size // config.num_attention_heads
    attention, eps = block.self_attn, config.rms_norm_eps
    normed = {p: rms_norm(x, block.input_layernorm, eps) for p, x in state.items()}
    if own_keys:
        for p, x in normed.items():
            keys[p] = (rotate(project(x, attention.k_proj, E), p, config.rope_theta), project(x, attention.v_proj, E))
    group = config.num_attention_heads // config.num_key_value_heads
    out = {}
    for p, x in normed.items():
        q_HE = rotate(project(x, attention.q_proj, E), p, config.rope_theta)
        seen = [keys[s] for s in sorted(keys) if s <= p]
        k_SHE, v_SHE = (torch.stack(each).repeat_interleave(group, dim=1) for each in zip(*seen, strict=True))
        share_SH = ((k_SHE * q_HE).sum(-1) / math.sqrt(E)).softmax(0)
        heads_HE = (share_SH[..., None] * v_SHE).sum(0)
        h_D = state[p] + f64(attention.o_proj.weight) @ heads_HE.flatten()
        m = rms_norm(h_D, block.post_attention_layernorm, eps)
        gate, up = f64(block.mlp.gate_proj.weight) @ m, f64(block.mlp.up_proj.weight) @ m
        out[p] = h_D + f64(block.mlp.down_proj.weight) @ (gate / (1 + torch.exp(-gate)) * up)
    return out


def repeated(layer: nn.Module, config, state: dict, keys: list[dict], own_keys: bool) -> dict[int, Tensor]:
    """One pass of what a thinking layer repeats: the layers of its block in turn, each with keys of its own."""
    for block, its_keys in zip(blocks(layer), keys, strict=True):
        state = f(block, config, state, its_keys, own_keys)
    return state


def blocks(layer: nn.Module) -> list[nn.Module]:
    return list(layer.block.values()) if isinstance(layer.block, nn.ModuleDict) else [layer.block]


def choose(options, scores: list[float], ratio: float, threshold: float, temperature: float) -> list[int]:
    S = len(scores)
    order = sorted(range(S), key=lambda i: -scores[i])
    if options.selection == 'top_k':
        return sorted(order[: max(1, math.floor(ratio * S))])
    if options.selection == 'threshold':
        return [i for i in range(S) if scores[i] > threshold]
    shares = [math.exp(s / temperature) for s in scores]
    chosen, mass = [], 0.0
    for i in order:
        if mass >= ratio:
            break
        chosen.append(i)
        mass += shares[i] / sum(shares)
    return sorted(chosen)


def itt_layer(layer: nn.Module, config, x_SD: Tensor) -> Tensor:
    """An ITT layer on one sequence, [S, D], from Section 3 of the paper and the options' definitions."""
    options, S = config.thinking_options, len(x_SD)
    ones = torch.ones(config.hidden_size, dtype=torch.float64)
    keys: list[dict[int, tuple]] = [{} for _ in blocks(layer)]
    y = repeated(layer, config, {p: x_SD[p].double() for p in range(S)}, keys, own_keys=True)
    if options.step_encoding:
        y = {p: v * f64(layer.phi_TD[0]) for p, v in y.items()}
    for t in range(1, options.steps + 1):
        phi = f64(layer.phi_TD[t]) if options.step_encoding else ones
        if options.token_routing:
            score = [f64(layer.router_TD[t - 1]) @ y[p] for p in range(S)]
            norm = {'sigmoid': torch.sigmoid, 'tanh': torch.tanh}[options.weight_norm]
            weight = [norm(s / config.router_temperature) for s in score]
            numbers = [s.item() for s in score]
            threshold, temperature = layer.threshold_T[t - 1].item(), config.router_temperature
            chosen = choose(options, numbers, options.token_ratios[t - 1], threshold, temperature)
        else:
            weight, chosen = [torch.ones((), dtype=torch.float64)] * S, list(range(S))
        if options.thinking_kv == 'routed_only':
            keys = [{} for _ in keys]
        z = repeated(layer, config, {p: y[p] for p in chosen}, keys, own_keys=options.thinking_kv != 'shared')
        y_next = {}
        for p in range(S):
            w = weight[p]
            if p in z:
                y_prime = {
                    'weighted': lambda y, z, w, a: a * w * z,
                    'equation7': lambda y, z, w, a: a * w * z,
                    # One in the forward pass; the routers' only gradient (combine.py says why).
                    'algorithm1': lambda y, z, w, a: y + a * z * (1 + w - w.detach()),
                    'delta': lambda y, z, w, a: a * w * (z - y),
                }[options.combine](y[p], z[p], w, options.alpha_T[t - 1])
                y_next[p] = y_prime * phi + (y[p] if options.residual_thinking else 0)
                continue
            kept = y[p] * (1 - w) if options.reweighting == 'symmetric' else y[p]
            if options.combine == 'equation7':
                y_next[p] = kept * phi + (y[p] if options.residual_thinking else 0)
            else:
                y_next[p] = kept
        y = y_next
    return torch.stack([y[p] for p in range(S)])
