"""What a training step keeps for its backward pass."""

from collections import Counter

import pytest
import torch

from itt_composer.model import ITTConfig, ITTForCausalLM, block

B, S, D, I, L = 2, 16, 24, 40, 4  # noqa: E741


def model_and_ids(**options):
    shape = dict(vocab_size=61, hidden_size=D, intermediate_size=I, num_hidden_layers=L, num_attention_heads=4)
    torch.manual_seed(0)
    return ITTForCausalLM(ITTConfig(**shape, **options)), torch.randint(61, (B, S))


def kept(**options):
    """How many tensors of each size are kept; weights do not count."""
    model, ids = model_and_ids(**options)
    of_weights = {parameter.data_ptr() for parameter in model.parameters()}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_weights:
            sizes[storage.data_ptr()] = tensor  # And so no other tensor gets its address.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids, with_logits=False)
    return Counter(tensor.numel() for tensor in sizes.values())


@pytest.mark.parametrize(('mlp', 'kept_of_mlp'), [('swiglu', 2), ('gelu', 1)])
def test_of_an_mlp_only_the_inputs_of_the_activation(mlp, kept_of_mlp, monkeypatch):
    monkeypatch.setattr(block, 'RECOMPUTED_ELEMENTS', B * S * I)
    assert kept(mlp=mlp)[B * S * I] == kept_of_mlp * L


def test_of_a_norm_only_its_input(monkeypatch):
    monkeypatch.setattr(block, 'RECOMPUTED_ELEMENTS', B * S * D)
    # PyTorch's LayerNorm is one operation and keeps its input alone. The final norm is not recomputed.
    assert kept(norm='rmsnorm')[B * S * D] == kept(norm='layernorm')[B * S * D] + 1


@pytest.mark.parametrize('thinking_kv', ['shared', 'routed_only'])
def test_of_a_step_only_the_states_of_routed_tokens(thinking_kv):
    one, three = (
        kept(thinking='itt', thinking_kv=thinking_kv, thinking_steps=steps, token_ratios=[0.5] * steps)
        for steps in (1, 3)
    )
    assert three[B * S * D] == one[B * S * D]
    assert three[B * S // 2 * D] > one[B * S // 2 * D]


def test_an_exported_graph_has_no_limit_of_size(monkeypatch):
    monkeypatch.setattr(block, 'RECOMPUTED_ELEMENTS', B * S * I // 2)
    model, ids = model_and_ids()
    length = torch.export.Dim('S', min=2, max=4 * S)
    exported = torch.export.export(
        model.eval(), (ids,), {'use_cache': False}, dynamic_shapes=({1: length}, None), strict=False
    )
    ids = ids.repeat(1, 2)
    torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.parametrize('mlp', ['swiglu', 'gelu'])
def test_what_is_computed_again_changes_no_gradient(mlp, monkeypatch):
    gradients = []
    for threshold in (0, B * S * I + 1):
        monkeypatch.setattr(block, 'RECOMPUTED_ELEMENTS', threshold)
        model, ids = model_and_ids(mlp=mlp, thinking='itt')
        model(ids, labels=ids, with_logits=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))
