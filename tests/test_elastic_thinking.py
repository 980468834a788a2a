"""``set_thinking``: more or less thinking after training, in one place."""

import json

import pytest
import torch
from common import small_models

from itt_composer.model import ITTForCausalLM, thinking_layers

IDS = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def test_ratios_are_the_shares_that_top_k_takes():
    model = small_models.build(thinking='itt')
    model.set_thinking(token_ratios=[0.7, 0.2, 0.9], selection='top_k')
    assert small_models.share_routed(model, IDS) == pytest.approx([0.7, 0.2, 0.9] * 2)
    assert model.selection == 'top_k'


@torch.no_grad()
@pytest.mark.parametrize('selection', ['top_k', 'threshold'])
def test_a_ratio_of_zero_removes_a_step(selection):
    """The model with step 2 removed is the model that was built with steps 1 and 3 alone."""
    model = small_models.build(thinking='itt')
    model.set_thinking(token_ratios=[0.5, 0, 0.5], selection=selection)
    options = dict(thinking='itt', token_ratios=[0.5, 0.5], evaluation_selection=selection)
    two = ITTForCausalLM(model.config.__class__(**{**small_models.SHAPE, **options})).eval()
    weights = model.state_dict()
    kept = {'phi_TD': [0, 1, 3], 'router_TD': [0, 2], 'threshold_T': [0, 2]}
    two.load_state_dict({k: v[kept[k.split('.')[-1]]] if k.split('.')[-1] in kept else v for k, v in weights.items()})
    assert torch.equal(model(IDS).logits, two(IDS).logits)


@torch.no_grad()
def test_all_steps_removed_are_the_plain_path():
    model = small_models.build(thinking='itt')
    model.set_thinking(token_ratios=[0, 0, 0])
    plain = ITTForCausalLM(model.config.__class__(**small_models.SHAPE)).eval()
    plain.load_state_dict(
        {
            k.replace('.block.', '.'): v
            for k, v in model.state_dict().items()
            if k.replace('.block.', '.') in plain.state_dict()
        }
    )
    for i, layer in thinking_layers(model).items():
        plain.model.layers[i].register_forward_hook(lambda _, __, out, phi=layer.phi_TD[0]: (out[0] * phi, out[1]))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    text = model.generate(IDS[:, :9], max_new_tokens=5, pad_token_id=0, do_sample=False)
    assert text.shape == (2, 14)


def test_training_is_not_touched():
    model = small_models.build(thinking='itt', selection='top_p')
    model.set_thinking(selection='top_k')
    assert model.selection == 'top_k'
    assert model.train().selection == 'top_p'
    assert model.config.evaluation_selection == 'threshold'
    assert model.config.token_ratios == [0.5, 0.5, 0.5]


@torch.no_grad()
def test_training_takes_its_own_ratios_whatever_was_asked_for():
    model = small_models.build(thinking='itt')
    model.set_thinking([0.5, 0.5, 0], selection='top_k')
    assert small_models.share_routed(model, IDS) == [0.5, 0.5] * 2
    assert small_models.share_routed(model.train(), IDS) == [0.5, 0.5, 0.5] * 2
    model.routing.capacity_T = [0.2, 0.3, 0.4]  # Within a warm-up.
    assert small_models.share_routed(model, IDS) == pytest.approx([0.2, 0.3, 0.4] * 2)
    assert small_models.share_routed(model.eval(), IDS) == [0.5, 0.5] * 2


@torch.no_grad()
def test_a_loaded_model_starts_with_what_it_was_calibrated_for(tmp_path):
    """A calibration for the ratios of the training, as a model needs that was trained without thresholds."""
    model = small_models.build(thinking='itt')
    values = [[-0.1, -0.2, -0.3], [-0.4, -0.5, -0.6]]
    model.config.calibrated_thresholds = {'0.5/0.5/0.5': values}
    model.save_pretrained(tmp_path)
    again = ITTForCausalLM.from_pretrained(tmp_path)
    assert list(again.routing.calibrated_LT.values()) == values
    again.set_thinking(selection='top_k')
    again.set_thinking(selection='threshold')
    assert list(again.routing.calibrated_LT.values()) == values
    model.set_thinking([0.5, 0.5, 0.5])
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_thresholds_belong_to_their_ratios(tmp_path):
    model = small_models.build(thinking='itt')
    model.config.calibrated_thresholds = {'0.7/0.7/0.9': [[-0.1, -0.2, -0.3], [-0.4, -0.5, -0.6]]}
    with pytest.raises(
        ValueError, match=r'no thresholds for 0.9/0.7/0.7 \(there are some for 0.5/0.5/0.5, 0.7/0.7/0.9'
    ):
        model.set_thinking([0.9, 0.7, 0.7])
    model.set_thinking([0.9, 0.7, 0.7], selection='top_k')
    with pytest.raises(ValueError, match=r'no thresholds for 0.9/0.7/0.7'):
        model.set_thinking(selection='threshold')
    trained = small_models.build(thinking='itt')(IDS).logits
    model.set_thinking([0.7, 0.7, 0.9], selection='threshold')
    calibrated = model(IDS).logits
    assert not torch.equal(calibrated, trained)
    assert model.routing.calibrated_LT == {0: [-0.1, -0.2, -0.3], 2: [-0.4, -0.5, -0.6]}
    model.save_pretrained(tmp_path)
    again = ITTForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, trained)
    again.set_thinking([0.7, 0.7, 0.9])
    torch.testing.assert_close(again(IDS).logits, calibrated)
    again.set_thinking([0.5, 0.5, 0.5])
    torch.testing.assert_close(again(IDS).logits, trained)


@torch.no_grad()
def test_a_removed_step_leaves_the_others_their_calibrated_thresholds():
    model = small_models.build(thinking='itt')
    model.config.calibrated_thresholds = {'0.5/0.5/0.5': [[0.1, 0.2, 0.3]] * len(thinking_layers(model))}
    model.set_thinking([0.5, 0.5, 0])
    assert model.routing.calibrated_LT == {0: [0.1, 0.2, 0.3], 2: [0.1, 0.2, 0.3]}


@pytest.mark.parametrize(
    ('options', 'call', 'message'),
    [
        (dict(thinking='itt'), dict(token_ratios=[0.5]), '1 ratios for 3 extra steps'),
        (
            dict(thinking='itt'),
            dict(token_ratios=[0.5, 1.5, 0.5]),
            r'token_ratios: step 2: expected .* at most 1.*, got 1.5',
        ),
        (dict(thinking='itt'), dict(token_ratios='0.5/x'), "'0.5/x' is not numbers between slashes"),
        (dict(thinking='itt'), dict(token_ratios=0.5), 'token_ratios: 0.5 is not a list of numbers'),
        (dict(thinking='itt'), dict(token_ratios=['a', 'b', 'c']), 'is not a list of numbers'),
        (dict(thinking='itt'), dict(selection='treshold'), "did you mean 'threshold'"),
        (dict(thinking='itt', token_routing=False), dict(token_ratios=[1, 0.5, 1]), '0.5 for step 2; without'),
        (dict(thinking='itt', token_routing=False), dict(selection='top_k'), 'routes no tokens'),
        (dict(thinking='loop'), dict(token_ratios=[1, 1, 1]), 'thinking: loop has no extra steps'),
        ({}, dict(selection='top_k'), 'thinking: none has no extra steps'),
    ],
)
def test_bad_input_is_named(options, call, message):
    with pytest.raises(ValueError, match=message):
        small_models.build(**options).set_thinking(**call)


def test_a_model_that_is_trained_further_forgets_its_calibration():
    """It is of weights that are no more; the thresholds that training sets are of those that are."""
    model = small_models.build(thinking='itt')
    model.config.calibrated_thresholds = {'0.5/0.5/0.5': [[0.1, 0.2, 0.3]] * 2, '0.7/0.7/0.7': [[0, 0, 0]] * 2}
    model.set_thinking([0.5, 0.5, 0.5])
    with pytest.warns(UserWarning, match='those for 0.5/0.5/0.5, 0.7/0.7/0.7 are dropped'):
        model.train()(IDS)
    assert model.config.calibrated_thresholds is None
    model.eval()
    assert all(torch.equal(layer.threshold(1), layer.threshold_T[0]) for layer in thinking_layers(model).values())


@pytest.mark.parametrize(
    ('ratios', 'selection', 'after'),
    [
        ([0.7, 0.7, 0.7], 'threshold', [0.5, 0.5, 0.5]),
        ([0.5, 0.5, 0], 'threshold', [0.5, 0.5, 0]),
        ([0.7, 0.7, 0.7], 'top_k', [0.7, 0.7, 0.7]),
    ],
)
def test_ratios_whose_thresholds_are_dropped_are_not_kept(ratios, selection, after):
    """A step would route by the thresholds of other ratios."""
    model = small_models.build(thinking='itt')
    model.config.calibrated_thresholds = {'0.7/0.7/0.7': [[0, 0, 0]] * 2}
    model.set_thinking(ratios, selection=selection)
    words = 'are dropped, and the token ratios are 0.5/0.5/0.5 again;' if ratios != after else 'are dropped;'
    with pytest.warns(UserWarning, match=words):
        model.train()(IDS)
    assert model.routing.ratios_T(training=False) == after


@pytest.mark.parametrize(
    ('thresholds', 'message'),
    [
        ({'0.7/0.7/0.7': [[0.1, 0.2, 0.3]]}, '0.7/0.7/0.7: expected 3 numbers for each of 2 thinking layers'),
        ({'0.7/0.7/0.7': [[0.1], [0.1]]}, '0.7/0.7/0.7: expected 3 numbers for each of 2 thinking layers'),
        ({'0.7/0.7/0.7': [[0.1, 0.2, float('nan')]] * 2}, '0.7/0.7/0.7: expected .*finite'),
        ({'0.7/0.7/0.7': 'low'}, "0.7/0.7/0.7: expected .*, got 'low'"),
        ([0.1], 'not a mapping'),
    ],
)
def test_thresholds_that_an_exported_folder_cannot_have(thresholds, message, tmp_path):
    small_models.build(thinking='itt').save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'calibrated_thresholds': thresholds}))
    with pytest.raises(ValueError, match=message):
        ITTForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_thresholds_that_nothing_has_set_are_warned_of_once():
    model = small_models.build(thinking='itt')
    for layer in thinking_layers(model).values():
        layer.threshold_updates.zero_()
        layer.threshold_T.zero_()
    with pytest.warns(UserWarning, match='neither training nor calibration has set the thresholds') as caught:
        model(IDS)
        model(IDS)
    assert len(caught) == 1
    with model.routing.recording() as records:
        model(IDS)
    for record in records:
        assert torch.equal(record.routed_BS, record.gate_BS > 0.5)
