"""The chunked loss against PyTorch's cross-entropy over whole logits, alone and in the model."""

import pytest
import torch
import torch.nn.functional as F
from common.operations import Operations
from torch.testing import assert_close

from itt_composer.model import ITTConfig, ITTForCausalLM
from itt_composer.model.loss import chunked_cross_entropy, cross_entropy

N, D, V = 23, 12, 37


def inputs(dtype, labels='some'):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    label = torch.randint(V, (N,), generator=generator)
    if labels != 'all':
        label[-1] = label[3:9] = -100
    if labels == 'none':
        label[:] = -100
    return x, weight, label


def small_config(vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, **options):
    shape = dict(vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size)
    depth = dict(num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads)
    return ITTConfig(**shape, **depth, **{'thinking': 'itt', **options})


def loss_and_gradients(loss, *parameters):
    return loss.detach(), *torch.autograd.grad(3.0 * loss, parameters)


@pytest.mark.parametrize(
    ('dtype', 'chunk', 'labels'),
    [
        *((torch.float64, chunk, 'some') for chunk in (1, 5, 23, 1000)),
        *((dtype, chunk, 'all') for dtype in (torch.float32, torch.bfloat16) for chunk in (5, 1000)),
        *((dtype, 5, 'none') for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    ],
)
def test_equals_cross_entropy(dtype, chunk, labels):
    x, weight, label = inputs(dtype, labels)
    got = loss_and_gradients(chunked_cross_entropy(x, weight, label, chunk), x, weight)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = loss_and_gradients(F.cross_entropy(x64 @ weight64.T, label), x64, weight64)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for mine, reference in zip(got, expected, strict=True):
        assert_close(mine.double(), reference, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert got[1].dtype == got[2].dtype == dtype
    assert got[0].isnan() == (labels == 'none')
    whole = cross_entropy(x @ weight.T, label)
    assert_close(whole.double(), expected[0], rtol=tolerance, atol=tolerance, equal_nan=True)


def test_under_autocast_the_gradients_keep_the_parameters_dtype():
    x, weight, label = inputs(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        got = loss_and_gradients(chunked_cross_entropy(x, weight, label, 4), x, weight)
        reference = loss_and_gradients(F.cross_entropy(F.linear(x, weight).float(), label), x, weight)
    for mine, plain in zip(got, reference, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, plain, rtol=2e-2, atol=2e-2)
    # Of whole logits, autocast rounds the weight's gradient to bfloat16; this one is closer to the float32 one.
    exact = loss_and_gradients(F.cross_entropy(x @ weight.T, label), x, weight)[2]
    assert (got[2] - exact).norm() <= (reference[2] - exact).norm()


def test_only_the_gradients_that_are_asked_for():
    x, weight, label = inputs(torch.float32)
    with torch.no_grad():
        assert_close(chunked_cross_entropy(x, weight, label, 4), F.cross_entropy(x @ weight.T, label))
    (grad,) = torch.autograd.grad(chunked_cross_entropy(x, weight.detach(), label, 4), x)
    assert_close(grad, torch.autograd.grad(F.cross_entropy(x @ weight.T, label), x)[0])


@pytest.mark.parametrize('label', [-1, V])
@pytest.mark.parametrize('training', [True, False])
def test_a_label_outside_the_vocabulary_is_refused(label, training):
    x, weight, labels = inputs(torch.float32)
    labels[0] = label
    with torch.set_grad_enabled(training), pytest.raises((IndexError, RuntimeError), match='out of bounds'):
        chunked_cross_entropy(x, weight, labels, 4)


def test_a_second_backward_pass_is_refused():
    x, weight, label = inputs(torch.float32)
    loss = chunked_cross_entropy(x, weight, label, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_logits_never_exist_whole(monkeypatch):
    """No tensor of the step has as many numbers as the logits of two chunks."""
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    model = ITTForCausalLM(small_config(509, 16, 24, 2, 2, loss_chunk_tokens=8))
    ids = torch.randint(509, (2, 32))
    with Sizes():
        model(ids, labels=ids, with_logits=False).loss.backward()
    assert max(largest) < 2 * 8 * 509 + 509 * 16


@pytest.mark.parametrize('tied', [False, True])
def test_model_gives_the_same_loss_and_gradients_without_logits(tied):
    grads, losses = [], []
    for with_logits, chunk in ((True, 8), (False, 8), (False, 0)):
        torch.manual_seed(0)
        config = small_config(61, 32, 48, 4, 4, loss_chunk_tokens=chunk, tie_word_embeddings=tied)
        model = ITTForCausalLM(config)
        ids = torch.randint(61, (2, 21))
        labels = ids.clone()
        labels[1, 10:] = -100
        out = model(ids, labels=labels, with_logits=with_logits)
        assert (out.logits is not None) == with_logits
        out.loss.backward()
        losses.append(out.loss.detach())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for i in (1, 2):
        assert_close(losses[i], losses[0], rtol=1e-6, atol=1e-6)
        for name, grad in grads[0].items():
            assert_close(grads[i][name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize('chunk', [0, 4])
def test_the_head_may_be_on_another_device_than_the_labels(chunk):
    """As with ``device_map='auto'``; the other device is ``meta`` here."""
    model = ITTForCausalLM(small_config(37, 16, 24, 2, 2, loss_chunk_tokens=chunk))
    ids = torch.ones(2, 9, dtype=torch.long)
    last = model.model.norm if chunk else model.lm_head
    last.register_forward_hook(lambda module, inputs, output: output.to('meta'))
    if chunk:
        model.lm_head.to('meta')
    for count in (None, torch.tensor(16)):
        loss = model(ids, labels=ids, with_logits=not chunk, num_items_in_batch=count).loss
        assert loss.device.type == 'meta'


def test_keeping_all_tokens_takes_no_slice():
    """The backward pass of a slice copies the gradient, also where the slice is of all tokens."""
    model = ITTForCausalLM(small_config(61, 16, 24, 2, 2, thinking='none'))
    ids = torch.randint(61, (2, 9))
    with Operations() as seen:
        model(ids, labels=ids, with_logits=False).loss.backward()
    assert 'aten::slice_backward' not in seen.counts
    with Operations() as seen:
        model(ids, logits_to_keep=2).logits.sum().backward()
    assert 'aten::slice_backward' in seen.counts, 'the count sees slices'


def test_bad_chunk_is_named():
    with pytest.raises(ValueError, match=r'loss_chunk_tokens: .*got -1'):
        ITTConfig(loss_chunk_tokens=-1)
