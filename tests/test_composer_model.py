"""The model under Composer's Trainer: foundry's registry, metrics, compilation, optimizers, activation checkpointing.

Its trainings on two ranks against one (facts 8 and 9) are in test_causal_routing_training.py.
"""

import pytest
import torch
from common.composer_runs import ITT, SHAPE, SHARDED, Rows, S, train
from common.ranks import run_on_ranks
from composer.core import Callback
from composer.optim import DecoupledAdamW
from llmfoundry.registry import models as model_registry
from llmfoundry.utils.builders import build_composer_model

from itt_composer.flops import Decoder, exact_flops
from itt_composer.model import ITTConfig, ITTForCausalLM, routing_state
from itt_composer.training.composer_model import ComposerITTForCausalLM
from itt_composer.training.fused_adamw import DecoupledAdamW as FusedDecoupledAdamW


def test_foundry_builds_the_model_and_its_metrics():
    assert 'itt_causal_lm' in model_registry.get_all()
    model = build_composer_model('itt_causal_lm', dict(ITT, init_device='cpu'), tokenizer=None)
    assert isinstance(model, ComposerITTForCausalLM)
    assert {'LanguageCrossEntropy', 'LanguagePerplexity', 'TokenAccuracy'} <= set(model.get_metrics(is_train=True))
    assert 'InContextLearningMultipleChoiceAccuracy' in model.get_metrics(is_train=False)
    ids = torch.randint(61, (2, S))
    batch = {'input_ids': ids, 'labels': ids.clone()}
    loss = model.eval().loss(model(batch), batch)
    metric = model.get_metrics(is_train=False)['LanguageCrossEntropy']
    model.update_metric(batch, model.eval_forward(batch), metric)
    torch.testing.assert_close(metric.compute(), loss)


def test_a_start_without_all_weights_is_refused(tmp_path):
    model = ITTForCausalLM(ITTConfig(**ITT))
    weights = {name: value for name, value in model.state_dict().items() if name != 'model.norm.weight'}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=f'^model.pretrained: {tmp_path}: weight model.norm.weight is missing'):
        ComposerITTForCausalLM(pretrained=str(tmp_path), **ITT)


def test_bad_input_is_named():
    class Tokenizer:
        def __len__(self):
            return 62

    with pytest.raises(ValueError, match='vocab_size: 61, but the tokenizer has 62'):
        ComposerITTForCausalLM(Tokenizer(), **SHAPE)


def test_flops_follow_the_tokens_that_think_now():
    model = ComposerITTForCausalLM(**ITT)
    batch = {'input_ids': torch.zeros(3, S, dtype=torch.long)}
    decoder = Decoder.from_model_config(ITT)
    assert model.flops_per_batch(batch) == 3 * 3 * exact_flops(decoder, S).total
    model.model.routing.capacity_T = [0.25, 0.25]
    assert model.flops_per_batch(batch) == 9 * exact_flops(decoder, S, [0.25, 0.25]).total


def test_the_loss_is_computed_without_logits_unless_a_metric_needs_them():
    batch = {'input_ids': torch.randint(61, (2, S))}
    batch['labels'] = batch['input_ids']
    outputs = {}
    for metrics in (False, True):
        torch.manual_seed(0)
        model = ComposerITTForCausalLM(**ITT, use_train_metrics=metrics, loss_chunk_tokens=5)
        outputs[metrics] = model(batch)
        assert model.eval()(batch).logits.shape == (2, S, 61)
    assert outputs[False].logits is None and outputs[True].logits.shape == (2, S, 61)
    torch.testing.assert_close(outputs[False].loss, outputs[True].loss)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'options',
    [
        dict(SHAPE, position='learned'),
        dict(SHAPE, thinking='loop'),
        dict(SHAPE, thinking='residual_scale'),
        *(dict(ITT, combine=combine) for combine in ('weighted', 'equation7', 'algorithm1', 'delta')),
        dict(ITT, reweighting='symmetric', thinking_kv='routed_only'),
    ],
)
def test_hidden_states_have_autocasts_dtype_where_it_is_asked_for(options, training):
    """Of every layer; the numbers are those of the same model with float32 hidden states, up to bfloat16's rounding."""
    ids = torch.arange(2 * S).view(2, S) % 61
    found = {}
    for low in (False, True):
        torch.manual_seed(0)
        model = ComposerITTForCausalLM(**options, autocast_residual=low).model.train(training)
        assert model(ids, output_hidden_states=True).hidden_states[0].dtype is torch.float32
        with torch.autocast('cpu', torch.bfloat16):
            output = model(ids, labels=ids, output_hidden_states=True)
        dtypes = {x_BSD.dtype for x_BSD in output.hidden_states}
        assert dtypes == {torch.bfloat16 if low else torch.float32}
        output.loss.backward()
        found[low] = output.loss, model.model.embed_tokens.weight.grad
    (loss, grad), (low_loss, low_grad) = found[False], found[True]
    torch.testing.assert_close(low_loss, loss, rtol=2e-3, atol=0)
    assert low_grad.dtype is torch.float32
    # A token whose score is near the k-th may be routed in one and not in the other.
    assert (low_grad - grad).norm() < (0.2 if options.get('thinking') == 'itt' else 0.03) * grad.norm()


def test_composers_own_compilation_of_the_whole_model_gives_the_eager_losses():
    """Also where the capacity grows: its values are not part of a graph."""
    small = dict(ITT, num_hidden_layers=2, thinking_steps=1)

    class Grow(Callback):
        def batch_start(self, state, logger):
            routing_state(state.model).capacity_T = [0.3 if state.timestamp.batch < 2 else 0.5]

    def run(**options):
        return train(small, evaluate=True, duration='4ba', callbacks=[Grow()], **options)

    ((expected, compiled),) = run_on_ranks(1, lambda: (run(), run(compile_config={'backend': 'eager'})))
    assert compiled.losses == pytest.approx(expected.losses, abs=2e-5)
    assert compiled.logged == pytest.approx(expected.logged, abs=1e-4) and expected.logged


def test_a_two_rank_run_goes_on_with_the_fused_adamw(tmp_path):
    """It starts from a checkpoint with Composer's optimizer, and ends where Composer's alone does."""

    def run(optimizer, duration, folder=None):
        return train(ITT, folder, SHARDED, 2, duration=duration, lr=3e-2, optimizer=optimizer).losses

    def runs():
        run(DecoupledAdamW, '2ba', tmp_path)
        return run(FusedDecoupledAdamW, '4ba', tmp_path), run(DecoupledAdamW, '4ba')

    for resumed, undisturbed in run_on_ranks(2, runs):
        assert resumed == pytest.approx(undisturbed[2:], abs=2e-5)
        assert resumed[-1] < undisturbed[0] - 0.1


def test_activation_checkpointing_keeps_the_chosen_tokens(monkeypatch):
    """Under a rule that chooses anew at every call, gradients are right only if the backward pass asks no more."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    from itt_composer.model import DecoderBlock, routing

    passes, generator = [], torch.Generator()

    def any_k(score_BS, k):
        order = torch.rand(score_BS.shape, generator=generator).argsort(-1)
        return order[:, :k].sort(-1).values

    monkeypatch.setattr(routing, 'top_k', any_k)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        generator.manual_seed(5)
        model = ComposerITTForCausalLM(**ITT).model
        if checkpointed:
            apply_activation_checkpointing(model, check_fn=model.activation_checkpointing_fn)
        for block in model.modules():
            if isinstance(block, DecoderBlock):
                block.register_forward_pre_hook(lambda *_: passes.append(1))
        ids = torch.stack([Rows()[i]['input_ids'] for i in range(3)])
        passes.clear()
        model(ids, labels=ids).loss.backward()
        grads.append({n.replace('_checkpoint_wrapped_module.', ''): p.grad for n, p in model.named_parameters()})
        # Four layers, two of which think twice more; checkpointed blocks run again in the backward pass.
        assert len(passes) == (16 if checkpointed else 8)
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
