"""Compiled blocks: eager losses and gradients, one recompilation in a warm-up. And no waiting for the device."""

import copy

import pytest
import torch
from common import small_models
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from itt_composer.model import ITTConfig, ITTForCausalLM
from itt_composer.model.compiled import compile_blocks
from itt_composer.model.loss import IGNORED, loss_and_derivative

KV = ('refresh', 'shared', 'routed_only')
FAMILIES = {'plain': {}, 'loop': {'thinking': 'loop'}} | {
    kv: {'thinking': 'itt', 'thinking_kv': kv, 'thinking_steps': 2} for kv in KV
}
# A thinking layer of its own and a block, both with thinking_kv: refresh.
FAMILIES['blocks'] = {'thinking': 'itt', 'thinking_layers': [0, [2, 3]], 'thinking_steps': 2}


class Counting:
    """A backend that runs the forward and backward graphs as they are, and counts the blocks compiled for it."""

    def __init__(self):
        self.count = 0
        self.aot = aot_autograd(fw_compiler=lambda graph, _: graph)

    def __call__(self, graph, inputs):
        self.count += 1
        return self.aot(graph, inputs)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny(**options):
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    return ITTForCausalLM(ITTConfig(**{**shape, **options}, num_key_value_heads=2))


def loss_and_gradients(model, S=32, capacity=None):
    if model.routing is not None and capacity is not None:
        model.routing.capacity_T = [capacity] * model.config.thinking_steps
    ids = torch.randint(61, (2, S), generator=torch.Generator().manual_seed(3))
    loss = model(ids, labels=ids, with_logits=False).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), gradients


@pytest.mark.parametrize('family', ['loop', 'shared', 'routed_only', 'blocks'])
def test_a_capacity_warmup_costs_one_recompilation(family):
    model, backend = tiny(**FAMILIES[family]), Counting()
    reference = copy.deepcopy(model)
    compile_blocks(model, backend)
    counts = []
    for capacity in (1.0, 0.9, 0.8, 0.75, *((0.6, 0.5, 0.5) if family == 'shared' else ()), 0.5):
        got, expected = loss_and_gradients(model, capacity=capacity), loss_and_gradients(reference, capacity=capacity)
        counts.append(backend.count)
        assert_close(got[0], expected[0], rtol=1e-6, atol=1e-6)
        for mine, plain in zip(got[1], expected[1], strict=True):
            assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    # Graphs of the loss, of the base pass, of a step of all tokens, of one of routed tokens, and of one of any number.
    assert counts[0] >= 2
    # In a block of several layers, once more for a later layer, whose routed tokens are no view of all of them.
    assert counts[-1] <= (6 if family == 'blocks' else 5)
    assert set(counts[3:]) == {counts[3]}, 'compiled again after the second number of tokens'
    assert list(model.state_dict()) == list(reference.state_dict())
    # Evaluation and copies are not affected.
    model.eval()(torch.randint(61, (1, 19)))
    assert backend.count == counts[-1]
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert loss_and_gradients(twin)[0] == pytest.approx(torch.tensor(61.0).log().item())


@torch.no_grad()
@pytest.mark.parametrize(('kv', 'rules'), [('shared', ['top_p', 'threshold']), ('routed_only', ['threshold'])])
def test_evaluation_and_generation_compile_as_a_whole(kv, rules):
    """``torch.compile(model)``, as users and Composer's ``compile_config`` have it; a batch and one sequence."""
    model = small_models.build(thinking='itt', thinking_kv=kv, thinking_steps=1, num_hidden_layers=1)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend='eager')
    ids = torch.randint(2, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    for selection in rules:
        for each in (model, compiled):
            each.set_thinking(selection=selection)
        assert_close(compiled(ids).logits, model(ids).logits)
    if kv == 'routed_only':  # Its cache has another length in each layer.
        how = dict(max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert torch.equal(compiled.generate(ids[:1], **how), model.generate(ids[:1], **how))


@torch._inductor.config.patch({'cpp.simdlen': 1, 'cpp.vec_isa_ok': False})
def test_inductor_gives_the_loss_and_its_derivative():
    """Computed in float32 and rounded once, in the memory of the logits."""
    logits = torch.randn(5, 19, generator=torch.Generator().manual_seed(0)).bfloat16()
    label = torch.tensor([3, IGNORED, 18, 0, 3])
    expected = loss_and_derivative(logits.double(), label)
    loss, derivative = torch.compile(loss_and_derivative)(logits, label)
    assert_close(loss, expected[0].float(), rtol=1e-5, atol=1e-5)
    assert_close(derivative.float(), expected[1].float(), rtol=2**-8, atol=1e-7)
    assert derivative.data_ptr() == logits.data_ptr()


@torch.no_grad()
@torch._inductor.config.patch({'cpp.simdlen': 1, 'cpp.vec_isa_ok': False})
def test_inductor_gives_the_eager_loss():
    """The forward pass alone, without vector instructions: most of the time goes into compiling C++."""
    model = tiny(thinking='itt', thinking_steps=1, num_hidden_layers=1, token_ratios=[0.5])
    ids = torch.randint(61, (2, 32), generator=torch.Generator().manual_seed(3))
    expected = model(ids, labels=ids, with_logits=False).loss
    compile_blocks(model)
    assert_close(model(ids, labels=ids, with_logits=False).loss, expected, rtol=1e-6, atol=1e-6)


def test_a_misspelt_backend_is_named():
    with pytest.raises(ValueError, match=r"compile_blocks: 'inductr' .*did you mean 'inductor'"):
        compile_blocks(tiny(), 'inductr')


@pytest.mark.parametrize(
    'options', [*FAMILIES.values(), *(dict(FAMILIES[kv], combine=c) for kv in KV for c in small_models.COMBINE[1:])]
)
def test_a_training_step_never_waits_for_the_device(options):
    """On the meta device tensors have shapes and no values: whatever asks for one raises."""
    with torch.device('meta'):
        model = tiny(**options)
        ids = torch.zeros(2, 32, dtype=torch.long)
        model(ids, labels=ids, with_logits=False).loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_a_wait_would_be_seen():
    with torch.device('meta'), pytest.raises(RuntimeError, match='meta tensor'):
        ids = torch.zeros(2, 32, dtype=torch.long)
        tiny(thinking='itt', selection='threshold')(ids)  # As many tokens as exceed it: the host must ask.
