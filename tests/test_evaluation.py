"""Scores through lm-eval: against lm-eval's own model class, on documents of the real evaluation sets."""

import csv
import json
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaTokenizerFast
from typer.testing import CliRunner

from itt_composer.cli import app
from itt_composer.evaluation.convert import SOURCES, convert
from itt_composer.evaluation.harness import ITTLM, rows_per_batch
from itt_composer.evaluation.local_tasks import write_task_files
from itt_composer.evaluation.scoring import log_likelihoods
from itt_composer.export.folder import save_model
from itt_composer.export.model_card import RunFigures
from itt_composer.flops import Decoder, paper_flops
from itt_composer.model import ITTConfig, ITTForCausalLM, thinking_layers
from itt_composer.paper.tasks import DEFINITIONS, GROUP

DOCUMENTS = 24
SHAPE = dict(
    vocab_size=32000,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=768,
    embedding_initializer_range=0.5,
    initializer_range=0.1,
)
THINKING = dict(thinking='itt', thinking_steps=3, router_initializer_range=0.2)


@pytest.fixture(scope='module')
def source(shared, tmp_path_factory):
    """The first documents of each real file."""
    folder = tmp_path_factory.mktemp('source')
    for name in SOURCES:
        lines = (shared / 'data' / 'eval' / name).read_text().splitlines(keepends=True)
        (folder / name).write_text(''.join(lines[: 2 * DOCUMENTS]))
    return folder


@pytest.fixture(scope='module')
def eval_data(source, tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'eval'
    convert(source, out)
    return out


@pytest.fixture(scope='module')
def manager(eval_data):
    return TaskManager(include_path=str(eval_data / 'lm_eval'), include_defaults=False)


@pytest.fixture(scope='module')
def exported(shared, tmp_path_factory):
    """Exported folders of a plain and a thinking model with random weights and LLaMA's tokenizer."""
    folder = tmp_path_factory.mktemp('models')
    tokenizer = LlamaTokenizerFast(str(shared / 'data' / 'llama_tokenizer' / 'tokenizer.model'), legacy=False)
    for name, options in (('llama', {}), ('itt', THINKING)):
        torch.manual_seed(3)
        model = ITTForCausalLM(ITTConfig(**SHAPE, **options))
        for layer in thinking_layers(model).values():
            layer.threshold_updates += 1
        (folder / name).mkdir()
        save_model(model, folder / name, RunFigures())
        tokenizer.save_pretrained(folder / name)
    return folder


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


@pytest.mark.parametrize('selection', ['threshold', 'top_k'])
def test_thinking_scores_do_not_depend_on_the_batch(selection, exported, manager):
    """Few-shot contexts shared through the cache, against lm-eval's class with every answer alone in its batch."""
    ours = run(ITTLM(str(exported / 'itt'), device='cpu', selection=selection), ['arc_easy', 'piqa'], manager, 8)
    model = ITTForCausalLM.from_pretrained(exported / 'itt')
    model.set_thinking(selection=selection)
    tokenizer = AutoTokenizer.from_pretrained(exported / 'itt')
    expected = run(HFLM(model, tokenizer=tokenizer, batch_size=1), ['arc_easy', 'piqa'], manager, 8)
    same(ours, expected)


@pytest.mark.parametrize('selection', ['threshold', 'top_k'])
def test_likelihoods_are_not_rounded_to_bfloat16(selection, exported, manager):
    """Of a model in that dtype, a GPU's default: sums of a few hundred nats would be 1 to 2 apart, and answers tie."""
    lm = ITTLM(str(exported / 'itt'), device='cpu', dtype='bfloat16', selection=selection)
    _, likelihoods = run(lm, ['piqa'], manager, 8)
    values = torch.tensor([value for document in likelihoods['piqa'] for value, _ in document])
    assert (values != values.bfloat16()).all()


def test_the_two_rules_differ(exported, manager):
    lines = [
        run(ITTLM(str(exported / 'itt'), device='cpu', selection=rule), ['piqa'], manager, 8)[1]['piqa']
        for rule in ('threshold', 'top_k')
    ]
    assert lines[0] != lines[1]


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
    assert run(default, ['piqa'], manager, 4)[1] != run(removed, ['piqa'], manager, 4)[1]


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
    for setting, expected in zip(settings, alone, strict=False):
        again = ITTLM(str(exported / 'itt'), device='cpu', **setting)
        assert CachingLM(again, cache).loglikelihood(requests) == expected


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
    (tmp_path / 'arc_easy.jsonl').write_text('{"query": "What?", "choices": ["a"], "gold": 0}\n')
    with pytest.raises(ValueError, match=r'arc_easy.jsonl, line 1: .*does not begin with .Question: '):
        convert(tmp_path, tmp_path / 'out')
    for out in (tmp_path, tmp_path.parent):
        with pytest.raises(ValueError, match='the source is in it'):
            convert(tmp_path, out)
    (tmp_path / 'arc_easy.jsonl').write_text('{"query": "Question: What?\\nAnswer:", "choices": ["a"], "gold": "A"}\n')
    with pytest.raises(ValueError, match=r'arc_easy.jsonl, line 1: TypeError'):
        convert(tmp_path, tmp_path / 'out')
    with pytest.raises(ValueError, match=r'none of arc_easy.jsonl'):
        convert(exported, tmp_path / 'out')
    with pytest.raises(ValueError, match=r'no <task>/test.jsonl for any of sciq'):
        write_task_files(tmp_path)
    assert not (tmp_path / 'out').exists()


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


def test_the_documents_make_the_prompts_they_came_from(source, eval_data, manager):
    """lm-eval's definitions, on the converted documents, give what the files hold."""
    rows = {
        task: [json.loads(line) for line in (source / name).read_text().splitlines()]
        for name, (task, _) in SOURCES.items()
    }
    tasks = manager.load(list(rows))['tasks']
    for name, task in tasks.items():
        assert task.config.test_split == 'test'
        for document, row in zip(task.test_docs(), rows[name], strict=True):
            text, choices = task.doc_to_text(document), task.config.doc_to_choice and task.doc_to_choice(document)
            target = task.doc_to_target(document)
            if name == 'lambada_openai':
                assert (text, target) == (row['context'], ' ' + row['continuation'])
            elif name == 'winogrande':
                assert (choices, text, target) == (row['context_options'], row['gold'], row['continuation'])
            elif name == 'logiqa':
                assert (
                    text
                    == row['query'].replace('Context: ', 'Passage: ', 1).replace('\nChoices: A', '\nChoices:\nA')
                    + 'Answer:'
                )
                assert target == row['gold']
            else:
                question = row['query'].removeprefix('Passage: ').removesuffix('\n')
                assert text == f'{question}\nAnswer:'
                assert (choices, target) == (row['choices'], row['gold'])


def test_definitions_are_lm_evals_own(eval_data):
    folder = Path(lm_eval.tasks.__file__).parent
    for name, file in DEFINITIONS.items():
        assert (folder / file).is_file(), name
        if name != 'mmlu' and (eval_data / name).is_dir():
            ours = yaml.safe_load((eval_data / 'lm_eval' / f'{name}.yaml').read_text())
            assert ours['include'] == str(folder / file)
            assert not {key for key in ours if key.startswith(('doc_to', 'metric', 'output', 'process', 'target'))}


def test_shots_never_hold_the_question_itself(manager):
    task = manager.load(['arc_challenge'])['tasks']['arc_challenge']
    task.set_fewshot_seed(1)
    for document in task.test_docs():
        context = task.fewshot_context(document, num_fewshot=25)
        assert context.count('Question: ') == 26
        assert context.count(document['question']) == 1


def test_every_task_with_data_and_only_those(tmp_path):
    """All ten, with documents in the fields of lm-eval's data sets; MMLU only when all its subjects are there."""
    data = tmp_path / 'data'
    documents = {
        'sciq': {'support': 's', 'question': 'q', 'distractor1': 'a', 'distractor2': 'b', 'distractor3': 'c',
                 'correct_answer': 'd'},
        'hellaswag': {'activity_label': 'x', 'ctx_a': 'A man', 'ctx_b': 'he', 'endings': ['a', 'b'], 'label': '1'},
    }  # fmt: skip
    for task, document in documents.items():
        (data / task).mkdir(parents=True)
        (data / task / 'test.jsonl').write_text(json.dumps(document) + '\n')
    (data / 'hellaswag' / 'train.jsonl').write_text(json.dumps(documents['hellaswag']) + '\n')
    (data / 'mmlu' / 'anatomy').mkdir(parents=True)
    question = {'question': 'q', 'choices': ['a', 'b', 'c', 'd'], 'answer': 2}
    (data / 'mmlu' / 'anatomy' / 'test.jsonl').write_text(json.dumps(question) + '\n')
    assert [task.name for task in write_task_files(data)] == ['sciq', 'hellaswag']
    group = TaskManager(include_path=str(data / 'lm_eval'), include_defaults=False).load([GROUP])['tasks']
    assert group.keys() == {'sciq', 'hellaswag'}
    assert group['hellaswag'].config.num_fewshot == 10 and group['hellaswag'].config.fewshot_split == 'train'


def test_the_command_writes_the_row(exported, eval_data, tmp_path, monkeypatch):
    import multiprocessing

    # lm-eval's bootstrap would fork this process with all its threads; a child that waits for ever was seen.
    monkeypatch.delenv('DISABLE_MULTIPROC')
    monkeypatch.setattr(multiprocessing, 'Pool', None)
    arguments = [
        'eval',
        '--model',
        str(exported / 'itt'),
        '--eval-data',
        str(eval_data),
        '--out',
        str(tmp_path),
        '--limit',
        '4',
    ]
    given = {file: file.stat().st_mtime_ns for file in eval_data.rglob('*')}
    done = CliRunner().invoke(app, [*arguments, '--token-ratios', '0.5/0/0', '--selection', 'top_k'])
    assert given == {file: file.stat().st_mtime_ns for file in eval_data.rglob('*')}
    assert done.exit_code == 0, done.output
    assert 'selection: top_k, token ratios 0.5/0/0' in ' '.join(done.output.split())
    rows = {row['row']: row for row in csv.DictReader((tmp_path / 'table1.csv').read_text().splitlines())}
    assert rows.keys() == {'mean', 'standard_error', 'paper_itt_x4_162m'}
    assert 'only 4 documents of each task' in ' '.join(done.output.split())
    described = {'model': str(exported / 'itt'), 'selection': 'top_k', 'token_ratios': '0.5/0/0', 'limit': '4'}
    assert {key: rows['mean'][key] for key in described} == described and rows['mean']['models'] == '1'
    assert rows['mean']['sciq'] == rows['mean']['mmlu'] == 'absent'
    assert float(rows['mean']['piqa']) in (0, 25, 50, 75, 100)
    decoder = Decoder.from_model_config(ITTConfig(**SHAPE, **THINKING).to_dict())
    assert float(rows['mean']['flops']) == pytest.approx(paper_flops(decoder, ratios=[0.5, 0, 0]) / 1e12, rel=1e-3)
    assert rows['paper_itt_x4_162m']['piqa'] == '63.9'
    scores = list(csv.DictReader((tmp_path / 'scores.csv').read_text().splitlines()))
    assert {row['task'] for row in scores if row['metric'] == 'data'} == {'sciq', 'hellaswag', 'mmlu'}
    own = {row['task'] for row in scores if row['metric'] == 'few_shot_examples'}
    assert own == {'arc_challenge', 'boolq'} and 'arc_challenge, boolq are other scored' in ' '.join(
        done.output.split()
    )
    assert CliRunner().invoke(app, [*arguments, '--row', 'itt_x5']).exit_code != 0
    # Several seeds of a model: mean and standard error over them.
    seeds = iter([0.4, 0.5, 0.6])
    monkeypatch.setattr(
        'lm_eval.simple_evaluate',
        lambda *_, **__: {'results': {'piqa': {'acc,none': next(seeds), 'acc_stderr,none': 0.1}}, 'configs': {}},
    )
    done = CliRunner().invoke(app, [*arguments, *['--model', str(exported / 'itt')] * 2])
    assert 'standard error over 3 models' in ' '.join(done.output.split()), done.output
    rows = {row['row']: row for row in csv.DictReader((tmp_path / 'table1.csv').read_text().splitlines())}
    assert (rows['mean']['models'], float(rows['mean']['average'])) == ('3', pytest.approx(50))
    assert float(rows['standard_error']['average']) == pytest.approx(10 / 3**0.5, abs=1e-3)
    # What cannot be run is said before the first model is scored.
    monkeypatch.setattr('lm_eval.simple_evaluate', None)
    done = CliRunner().invoke(app, [*arguments, '--token-ratios', '0.7/0.7/0.7'])
    assert 'no thresholds for 0.7/0.7/0.7' in str(done.exception or done.output)
    unlike = CliRunner().invoke(app, [*arguments, '--model', str(exported / 'llama')])
    assert unlike.exit_code != 0 and 'pass seeds of one model' in str(unlike.exception or unlike.output)


def test_rows_of_one_length_share_a_batch():
    assert rows_per_batch([9, 9, 9, 5, 5, 5, 1], 10) == [1, 1, 1, 2, 2, 1, 1]
    assert rows_per_batch([9, 9, 9], 27) == [3, 3, 3]


def test_lm_eval_knows_the_name(monkeypatch):
    import lm_eval.__main__
    from lm_eval.api.registry import model_registry

    from itt_composer.evaluation import lm_eval_command

    monkeypatch.setattr(model_registry, '_objs', {k: v for k, v in model_registry._objs.items() if k != 'itt'})
    found = []
    monkeypatch.setattr(lm_eval.__main__, 'cli_evaluate', lambda: found.append(get_model('itt')))
    lm_eval_command.main()
    assert found == [ITTLM]


def test_a_mistake_on_lm_evals_command_line_is_one_line(monkeypatch, exported):
    from lm_eval.api.registry import model_registry

    from itt_composer.evaluation import lm_eval_command

    monkeypatch.setattr(model_registry, '_objs', {k: v for k, v in model_registry._objs.items() if k != 'itt'})
    words = ['itt-lm-eval', '--model', 'itt', '--model_args', f'pretrained={exported / "itt"}', '--tasks', 'piqqa']
    monkeypatch.setattr('sys.argv', words)
    with pytest.raises(SystemExit) as stop:
        lm_eval_command.main()
    assert str(stop.value).startswith('itt-lm-eval: Tasks not found') and 'piqqa' in str(stop.value)
