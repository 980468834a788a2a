"""Scores through lm-eval: against lm-eval's own model class, on documents of the real evaluation sets."""

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaForCausalLM

from itt_composer.evaluation.harness import ITTLM, rows_per_batch
from itt_composer.evaluation.scoring import log_likelihoods
from itt_composer.model import ITTForCausalLM

DOCUMENTS = 6


def run(lm, tasks, manager, limit=DOCUMENTS):
    results = simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=100)
    likelihoods = {
        task: [[answer for request in document['resps'] for answer in request] for document in documents]
        for task, documents in results['samples'].items()
    }
    return results['results'], likelihoods


def same(results, expected):
    (scores, likelihoods), (expected_scores, expected_likelihoods) = results, expected
    assert likelihoods.keys() == expected_likelihoods.keys()
    compared = 0
    for task, documents in expected_likelihoods.items():
        for document, expected_document in zip(likelihoods[task], documents, strict=True):
            for (value, greedy), (wanted, wanted_greedy) in zip(document, expected_document, strict=True):
                assert value == pytest.approx(wanted, abs=1e-4)
                assert greedy == wanted_greedy
                compared += 1
        for metric, wanted in expected_scores[task].items():
            assert scores[task][metric] == (pytest.approx(wanted, rel=1e-4) if isinstance(wanted, float) else wanted)
    return compared


def test_plain_scores_are_those_of_lm_eval_on_llama(exported, manager):
    """The acceptance test of the issue: every score and every log-likelihood, against lm-eval's class, row by row."""
    tasks = ['arc_easy', 'piqa', 'lambada_openai', 'boolq', 'winogrande']
    llama = LlamaForCausalLM.from_pretrained(exported / 'llama')
    tokenizer = AutoTokenizer.from_pretrained(exported / 'llama')
    expected = run(HFLM(llama, tokenizer=tokenizer, batch_size=1, max_length=768), tasks, manager)
    ours = run(ITTLM(str(exported / 'llama'), device='cpu'), tasks, manager)
    # Four answers or two each, two answers, one word, and two words.
    assert same(ours, expected) >= DOCUMENTS * (4 + 2 + 1 + 2 + 2) - 2
    assert not {'sciq', 'mmlu'} & ours[0].keys()


def test_thinking_scores_do_not_depend_on_the_batch(exported, manager):
    """Few-shot contexts shared through the cache, against lm-eval's class with every answer alone in its batch."""
    model = ITTForCausalLM.from_pretrained(exported / 'itt')
    tokenizer = AutoTokenizer.from_pretrained(exported / 'itt')
    likelihoods = []
    for selection in ('threshold', 'top_k'):
        ours = run(ITTLM(str(exported / 'itt'), device='cpu', selection=selection), ['arc_easy', 'piqa'], manager, 3)
        model.set_thinking(selection=selection)
        same(ours, run(HFLM(model, tokenizer=tokenizer, batch_size=1), ['arc_easy', 'piqa'], manager, 3))
        likelihoods.append(ours[1])
    assert likelihoods[0]['piqa'] != likelihoods[1]['piqa'], 'the two rules differ'


@pytest.mark.parametrize('selection', ['threshold', 'top_k'])
def test_likelihoods_are_not_rounded_to_bfloat16(selection, exported, manager):
    """Of a model in that dtype, a GPU's default: sums of a few hundred nats would be 1 to 2 apart, and answers tie."""
    lm = ITTLM(str(exported / 'itt'), device='cpu', dtype='bfloat16', selection=selection)
    _, likelihoods = run(lm, ['piqa'], manager, 4)
    values = torch.tensor([value for document in likelihoods['piqa'] for value, _ in document])
    assert (values != values.bfloat16()).all()


def test_likelihoods_of_answers_of_any_shape(exported):
    """Against one full pass for each: equal contexts, contexts of one token, answers of one token, small batches."""
    model = ITTForCausalLM.from_pretrained(exported / 'itt').eval()
    generator = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(3, 32000, (n,), generator=generator).tolist()

    shared_context = tokens(40)
    requests = [(shared_context, tokens(n)) for n in (1, 1, 3, 7)] + [([1], tokens(30)), (tokens(9), tokens(2))]
    requests.append((shared_context, [*requests[2][1][:2], 5]))
    done = []
    for budget in (1, 120, 10_000):
        results = log_likelihoods(model, requests, budget, 768, lambda *result: done.append(result[0]))
        for (context, answer), (value, _) in zip(requests, results, strict=True):
            with torch.no_grad():
                log_p = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
            wanted = sum(log_p[len(context) - 1 + i, token].item() for i, token in enumerate(answer))
            assert value == pytest.approx(wanted, abs=1e-3)
    assert sorted(done) == sorted(3 * list(range(len(requests))))


def test_many_answers_to_one_context_are_divided_into_batches(exported):
    """As BLiMP's are, whose contexts are all the BOS token."""
    model, shapes = ITTForCausalLM.from_pretrained(exported / 'itt').eval(), []
    model.register_forward_pre_hook(
        lambda _, arguments, keywords: shapes.append(keywords['input_ids'].shape), with_kwargs=True
    )
    requests = [([1], [3 + n, 4, 5]) for n in range(50)]
    results = log_likelihoods(model, requests, 64, 768)
    assert max(R * C for R, C in shapes) <= 64 and sum(R for R, _ in shapes) == 50
    shapes.clear()
    at_once = log_likelihoods(model, requests, 1000, 768)
    assert len(shapes) == 1
    assert [value for value, _ in results] == pytest.approx([value for value, _ in at_once], abs=1e-4)


def test_thinking_steps_are_arguments(exported, manager):
    default = ITTLM(str(exported / 'itt'), device='cpu')
    assert (default.selection, default.token_ratios) == ('threshold', [0.5, 0.5, 0.5])
    assert default.get_model_info()['selection'] == 'threshold'
    removed = ITTLM(str(exported / 'itt'), device='cpu', token_ratios='0.5/0/0', selection='top_k')
    assert (removed.selection, removed.token_ratios) == ('top_k', [0.5, 0, 0])
    assert run(default, ['piqa'], manager, 2)[1] != run(removed, ['piqa'], manager, 2)[1]


def test_lm_evals_cache_keeps_settings_and_models_apart(exported, tmp_path, monkeypatch):
    """lm-eval finds a cached result by its request alone; here another setting of the model must not get it."""
    requests = [Instance('loglikelihood', {}, ('two plus two is', ' four'), 0)]
    settings = [{}, {'token_ratios': '0.5/0/0'}, {'selection': 'top_k'}, {'dtype': 'bfloat16'}]
    models = [ITTLM(str(exported / 'itt'), device='cpu', **setting) for setting in settings]
    models.append(ITTLM(str(exported / 'llama'), device='cpu'))
    alone = [lm.loglikelihood(requests) for lm in models]
    assert len({value for [(value, _)] in alone}) == len(models)
    cache = str(tmp_path / 'cache.db')
    for lm, expected in zip(models, alone, strict=True):
        assert CachingLM(lm, cache).loglikelihood(requests) == expected
    # Each comes back, and nothing is computed.
    monkeypatch.setattr(ITTLM, 'loglikelihood', None)
    models[2] = ITTLM(str(exported / 'itt'), device='cpu', **settings[2])
    for lm, expected in zip(models, alone, strict=True):
        assert CachingLM(lm, cache).loglikelihood(requests) == expected


def test_bad_input_is_named(exported, tmp_path):
    with pytest.raises(ValueError, match=r'nothing: no exported model in it, .* itt export'):
        ITTLM(str(tmp_path / 'nothing'))
    with pytest.raises(ValueError, match=r"'treshold' is not one of .*did you mean 'threshold'"):
        ITTLM(str(exported / 'itt'), selection='treshold')
    with pytest.raises(ValueError, match=r'token_ratios: .*not numbers'):
        ITTLM(str(exported / 'itt'), token_ratios='0.5,0.5')
    with pytest.raises(ValueError, match='batch_size: expected auto, got 8'):
        ITTLM(str(exported / 'itt'), batch_size=8)
    with pytest.raises(ValueError, match='token_ratios'):
        ITTLM(str(exported / 'itt'), device='cpu', token_ratios='0.5/0.5')
    with pytest.raises(ValueError, match=r'token_ratios, selection: .* is a dense baseline'):
        ITTLM(str(exported / 'llama'), device='cpu', selection='top_k')
    with pytest.raises(ValueError, match=r'max_length: expected at most 768, .* got 1000'):
        ITTLM(str(exported / 'llama'), device='cpu', max_length=1000)


def test_too_long_a_context_loses_its_beginning_and_is_said_once(exported, caplog):
    lm = ITTLM(str(exported / 'llama'), device='cpu', max_length=16)
    long, answer = list(range(3, 60)), [7, 8]
    results = lm._loglikelihood_tokens([(None, long, answer), (None, long[-15:], answer)], disable_tqdm=True)
    assert results[0] == pytest.approx(results[1])
    assert [record.message for record in caplog.records if 'longer than' in record.message] == [
        '1 of 2 requests are longer than the context of 16 and lose their beginning'
    ]
    with pytest.raises(ValueError, match='an answer of 17 tokens does not fit the context of 16'):
        lm._loglikelihood_tokens([(None, [1], list(range(17)))], disable_tqdm=True)


def test_rows_of_one_length_share_a_batch():
    assert rows_per_batch([9, 9, 9, 5, 5, 5, 1], 10) == [1, 1, 1, 2, 2, 1, 1]
    assert rows_per_batch([9, 9, 9], 27) == [3, 3, 3]
