"""Adapters of PEFT hold the thresholds, routers and step encodings of the model that they were trained in."""

import copy

import pytest
import torch
from common.small_models import build
from torch.testing import assert_close

from itt_composer.evaluation.calibrate import calibrate
from itt_composer.model import ITTForCausalLM, thinking_layers

peft = pytest.importorskip('peft', reason='needs peft, for example 0.15.2')

IDS = torch.randint(2, 97, (4, 40), generator=torch.Generator().manual_seed(3))
KINDS = {
    'lora': lambda: peft.LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM'),
    'ia3': lambda: peft.IA3Config(
        target_modules=['v_proj', 'down_proj'], feedforward_modules=['down_proj'], task_type='CAUSAL_LM'
    ),
}


def tuned(base, kind: str, freeze: bool = False):
    model = peft.get_peft_model(copy.deepcopy(base), KINDS[kind]()).train()
    if freeze:
        for layer in thinking_layers(model).values():
            layer.router_TD.requires_grad_(False)
            layer.phi_TD.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(('kind', 'freeze'), [('lora', False), ('lora', True), ('ia3', False)])
def test_an_adapter_holds_its_thresholds_and_trains_the_new_parameters(tmp_path, kind, freeze):
    base = build(thinking='itt', evaluation_selection='threshold')
    before = {i: layer.threshold_T.clone() for i, layer in thinking_layers(base).items()}
    model = tuned(base, kind, freeze)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    for i, layer in thinking_layers(again).items():
        wanted = thinking_layers(model)[i]
        assert layer.threshold_updates == wanted.threshold_updates == 1 + 8
        assert torch.equal(layer.threshold_T, wanted.threshold_T) and not torch.equal(layer.threshold_T, before[i])
        assert torch.equal(layer.router_TD, wanted.router_TD)
        assert torch.equal(layer.phi_TD, wanted.phi_TD)
        assert torch.equal(layer.router_TD, base.model.layers[i].router_TD) is freeze
        assert torch.equal(layer.phi_TD, base.model.layers[i].phi_TD) is freeze
    assert not any(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_adapter_of_a_calibrated_model_routes_by_its_own_thresholds(tmp_path):
    base = build(thinking='itt', evaluation_selection='threshold')
    calibrate(base, IDS, [0.5, 0.5, 0.5])
    base.save_pretrained(tmp_path / 'base')
    with pytest.warns(UserWarning, match='the model is trained further'):
        model = tuned(ITTForCausalLM.from_pretrained(tmp_path / 'base'), 'lora')
    model.save_pretrained(tmp_path / 'adapter')
    again = ITTForCausalLM.from_pretrained(tmp_path / 'base')
    with pytest.warns(UserWarning, match='^calibrated_thresholds: the adapter has thresholds of its own, so those for'):
        again = peft.PeftModel.from_pretrained(again, tmp_path / 'adapter').eval()
    with torch.no_grad():
        assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not again.merge_and_unload().config.calibrated_thresholds


def test_what_learns_beside_an_adapter(tmp_path):
    """The same by both ways to add one, and where a saved one is trained further."""
    base = build(thinking='itt')
    model = peft.get_peft_model(copy.deepcopy(base), KINDS['lora']())
    model.save_pretrained(tmp_path)
    inside = copy.deepcopy(base)
    inside.add_adapter(KINDS['lora']())
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    for one in (model, inside, again):
        learning = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
        kinds = {'lora' if 'lora' in name else name.rsplit('.', 1)[-1] for name in learning}
        assert kinds == {'lora', 'router_TD', 'phi_TD'}


def test_a_layer_without_an_adapter_is_not_trained():
    base = build(thinking='itt', evaluation_selection='threshold', thinking_layers=[0, 2])
    config = peft.LoraConfig(target_modules=r'.*layers\.0\..*q_proj', task_type='CAUSAL_LM')
    model = peft.get_peft_model(base, config)
    trained = {i: layer.router_TD.requires_grad for i, layer in thinking_layers(model).items()}
    assert trained == {0: True, 2: False}


def test_an_adapter_with_norms_of_its_own_holds_the_router(tmp_path):
    base = build(thinking='itt', evaluation_selection='threshold')
    config = peft.LoraConfig(target_modules=['q_proj'], modules_to_save=['norm'], task_type='CAUSAL_LM')
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for layer in thinking_layers(model).values():
        torch.nn.init.ones_(layer.router_TD)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert all((layer.router_TD == 1).all() for layer in thinking_layers(again).values())


def test_a_merged_adapter_is_an_ordinary_model(tmp_path):
    model = tuned(build(thinking='itt', evaluation_selection='threshold'), 'lora')
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        merged = model.merge_and_unload()
        assert not any('lora' in name for name in merged.state_dict())
        merged.save_pretrained(tmp_path)
        assert_close(ITTForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_prompt_tuning(tmp_path):
    """Embeddings before the text; the model itself and its thresholds stay."""
    base = build(thinking='itt', evaluation_selection='threshold')
    thresholds = [layer.threshold_T.clone() for layer in thinking_layers(base).values()]
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type='CAUSAL_LM')
    model = peft.get_peft_model(base, config).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
    model.eval()
    assert_close([layer.threshold_T for layer in thinking_layers(model).values()], thresholds, rtol=0, atol=0)
    ids = IDS[:2, :7]
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        got = model.generate(input_ids=ids, **options)
        for _ in range(5):
            ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(got, ids)
