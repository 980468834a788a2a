"""Thresholds: frozen within a batch, one commit per optimizer step, in a loop without any callback."""

import copy

import pytest
import torch
from common import small_models
from torch.testing import assert_close

from itt_composer.model import ITTForCausalLM, thinking_layers

RULES = ['top_k', 'threshold']


def sequences(count: int, S: int = 30, seed: int = 8) -> torch.Tensor:
    return torch.randint(97, (count, S), generator=torch.Generator().manual_seed(seed))


def model_in_training(**options) -> ITTForCausalLM:
    return small_models.build(thinking='itt', **options).train()


def thresholds(model) -> torch.Tensor:
    """As they are, whatever is pending."""
    return torch.stack([layer.threshold_T for layer in thinking_layers(model).values()])


def committed(model) -> torch.Tensor:
    model.commit_thresholds()
    return thresholds(model)


def updates(model) -> list[int]:
    return [int(layer.threshold_updates) for layer in thinking_layers(model).values()]


def reset(model) -> None:
    for layer in thinking_layers(model).values():
        layer.threshold_updates.zero_()


def train(model, batches, microbatch: int, lr: float = 0.01) -> list[float]:
    """A plain PyTorch loop with gradient accumulation; the losses, batch by batch."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    for batch in batches:
        optimizer.zero_grad()
        parts = batch.split(microbatch)
        loss = sum(model(part, labels=part, with_logits=False).loss / len(parts) for part in parts)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('selection', RULES)
def test_the_microbatch_changes_nothing(selection):
    """Facts 5 and 9: loss, weights and thresholds of microbatches of 1, 4 and 8 sequences."""
    batches = sequences(8 * 3).split(8)
    runs = []
    for microbatch in (8, 4, 1):
        model = model_in_training(selection=selection)
        losses = train(model, batches, microbatch)
        end = committed(model)
        assert updates(model) == [1 + 3] * 2
        runs.append((torch.tensor(losses), end, torch.cat([p.flatten() for p in model.parameters()])))
    for run in runs[1:]:
        for got, expected in zip(run, runs[0], strict=True):
            assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('selection', RULES)
def test_the_threshold_is_the_mean_over_batches_of_the_kth_score(selection, monkeypatch):
    """A plain mean at first, an exponential one with a window of batches later. The scores are written out here."""
    monkeypatch.setattr('itt_composer.model.thresholds.THRESHOLD_WINDOW', 3)
    model = model_in_training(selection=selection, thinking_layers=[0])
    reset(model)
    layer, expected = model.model.layers[0], None
    for n, ids in enumerate(sequences(20).split(4), start=1):
        with torch.no_grad():
            rotation = small_models.rotation(model, ids.shape[1])
            y_BSD = layer.block(model.model.embed_tokens(ids), rotation)[0] * layer.phi_TD[0]
            kth = (y_BSD @ layer.router_TD[0]).sort(dim=-1, descending=True).values[:, 14].mean()
        expected = kth if n == 1 else expected + (kth - expected) / min(n, 3)
        train(model, [ids], microbatch=2)
    assert_close(committed(model)[0, 0], expected)
    assert updates(model) == [5]


def test_thresholds_are_frozen_within_a_batch_and_in_evaluation():
    model = model_in_training()
    before = thresholds(model).clone()
    for ids in sequences(12).split(4):
        model(ids)
        assert torch.equal(thresholds(model), before)
    model.eval().train()  # As Composer does between microbatches for its metrics.
    assert torch.equal(thresholds(model), before)
    model.eval()(sequences(4, seed=9))
    after = thresholds(model).clone()
    assert updates(model) == [2] * 2 and not torch.equal(after, before)
    model(sequences(4, seed=10))
    assert torch.equal(committed(model), after)


def test_generation_in_training_mode_moves_no_threshold():
    model = model_in_training(selection='threshold')
    model(sequences(4))
    before, count = committed(model).clone(), updates(model)
    model.generate(sequences(4, S=8), max_new_tokens=5, do_sample=True, pad_token_id=0)
    assert torch.equal(committed(model), before) and updates(model) == count


def test_data_parallel_whose_replicas_lose_the_thresholds_is_refused():
    decoder = model_in_training().model
    with pytest.raises(ValueError, match='DataParallel: the routing thresholds of its replicas are lost; start one'):
        decoder._replicate_for_data_parallel()(sequences(1))


def test_what_is_saved_or_copied_has_been_committed(tmp_path):
    """Also in a loop of forward passes without an optimizer, which is one batch."""
    model, reference = model_in_training(), model_in_training()
    for ids in sequences(12).split(4):
        model(ids), reference(ids)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    loaded = ITTForCausalLM.from_pretrained(tmp_path)
    for other in (model, twin, loaded):
        assert torch.equal(committed(other), committed(reference))
        assert updates(other) == [2] * 2


def test_a_frozen_router_sees_other_hidden_states_and_a_frozen_layer_does_not_learn():
    model, reference = model_in_training(), model_in_training()
    for layer in [*thinking_layers(model).values(), *thinking_layers(reference).values()]:
        layer.router_TD.requires_grad_(False)
    before = thresholds(model).clone()
    train(model, sequences(12).split(4), microbatch=2)
    for batch in sequences(12).split(4):
        train(reference, [batch], microbatch=4)
        reference.commit_thresholds()
    assert_close(committed(model), committed(reference))
    assert updates(model) == updates(reference) == [1 + 3] * 2 and not torch.equal(committed(model), before)
    before = committed(model).clone()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    train(model, sequences(12).split(4), microbatch=4)
    assert torch.equal(committed(model), before)


@pytest.mark.parametrize('selection', ['top_k', 'top_p', 'threshold'])
@pytest.mark.parametrize('training', [True, False])
def test_a_ratio_of_one_routes_every_token(selection, training):
    """Whatever the threshold, and although a softmax in float32 may not sum to one."""
    options = dict(selection=selection, evaluation_selection=selection, token_ratios=[1.0, 1.0, 1.0])
    model = model_in_training(**options, max_position_embeddings=600).train(training)
    for layer in thinking_layers(model).values():
        layer.threshold_T.fill_(1e9)
    assert small_models.share_routed(model, sequences(2, 500)) == [1.0] * 6


@torch.no_grad()
def test_padding_and_scores_that_overflow_are_left_out():
    ids = sequences(2, 60)
    model, alone = model_in_training(), model_in_training()
    mask = torch.ones_like(ids)
    mask[1] = 0
    model(ids, mask), alone(ids[:1])
    assert_close(committed(model), committed(alone))
    before = thresholds(model).clone()
    model(ids, torch.zeros_like(ids))
    assert torch.equal(committed(model), before) and updates(model) == [2] * 2
    model.model.layers[0].router_TD.fill_(torch.inf)
    model(ids)
    assert committed(model).isfinite().all()


def test_thresholds_that_a_wrapper_made_coarse_are_refused():
    """FSDP 1 casts buffers to the type of ``mixed_precision``, past ``Module.to``."""
    model = model_in_training()
    layer = model.model.layers[0]
    layer.threshold_T.data = layer.threshold_T.bfloat16()
    model(sequences(2))
    with pytest.raises(ValueError, match=r'must be float32, got torch.bfloat16; .*buffer_dtype: fp32'):
        model.commit_thresholds()
