"""The evaluation sets as lm-eval's tasks: prompts, definitions, shots, and which tasks have data."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from common.pretrained import write_tokenizer
from lm_eval.tasks import TaskManager
from omegaconf import OmegaConf

from itt_composer.config.tasks import fill_in_tasks
from itt_composer.evaluation.convert import SOURCES, convert
from itt_composer.evaluation.local_tasks import write_task_files
from itt_composer.paper.tasks import DEFINITIONS, GROUP


def test_documents_that_cannot_be_converted_are_named(tmp_path):
    (tmp_path / 'foundry').mkdir()
    (tmp_path / 'arc_easy.jsonl').write_text('{"query": "What?", "choices": ["a"], "gold": 0}\n')
    for out in (tmp_path, tmp_path.parent):
        with pytest.raises(ValueError, match='the source is in it'):
            convert(tmp_path, out)
    with pytest.raises(ValueError, match=r'foundry: expected one of arc_easy.jsonl, .*, got none; pass the folder'):
        convert(tmp_path / 'foundry', tmp_path / 'out')
    with pytest.raises(ValueError, match=r'no <task>/test.jsonl for any of sciq'):
        write_task_files(tmp_path)
    assert not (tmp_path / 'out').exists()


ARC = {'query': 'Question: What?', 'choices': ['a', 'b'], 'gold': 0}
BOOLQ = {'query': 'Passage: So.\nQuestion: why?', 'choices': ['yes', 'no'], 'gold': 0}


@pytest.mark.parametrize(
    ('name', 'row', 'form'),
    [
        ('arc_easy.jsonl', ARC | {'query': 'What?'}, '"Question: ..." with choices and gold (a number)'),
        ('arc_easy.jsonl', ARC | {'gold': 'A'}, '"Question: ..." with choices and gold (a number)'),
        ('piqa.jsonl', ARC | {'choices': ['a']}, '"Question: ..." with two choices and gold (a number)'),
        ('boolq.jsonl', BOOLQ, '"Passage: ... Question: ...?" with the choices no and yes, and gold (a number)'),
        ('logi_qa.jsonl', ARC, '"Context: ... Question: ... Choices: A. ... D." with gold (a number)'),
        ('winogrande.jsonl', ARC, 'two context_options with continuation and gold (a number)'),
        ('lambada_openai.jsonl', {'context': 'a', 'continuation': 'b c'}, 'context with a continuation of one word'),
        ('lambada_openai.jsonl', {'continuation': 5}, 'context with a continuation of one word'),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, name, row, form):
    (tmp_path / name).write_text(f'\n{json.dumps(row)}\n')
    with pytest.raises(ValueError) as error:
        convert(tmp_path, tmp_path / 'out')
    assert str(error.value) == f"{tmp_path}/{name}:2: expected {form}, got {row}; use LLM-Foundry's file"
    assert not (tmp_path / 'out').exists()


def test_a_blank_line_of_a_source_is_skipped(tmp_path):
    (tmp_path / 'arc_easy.jsonl').write_text(f'{json.dumps(ARC)}\n\n')
    assert convert(tmp_path, tmp_path / 'out') == {'arc_easy': 1}


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('{', 'not JSON'),
        ('[1]', 'expected a JSON object, got list'),
        ('{"choices": 5}', 'expected texts in choices or continuation, got 5'),
        ('{"choices": [5]}', 'expected texts in choices or continuation, got [5]'),
        ('{"continuation": 5}', 'expected texts in choices or continuation, got [5]'),
    ],
)
def test_a_bad_line_of_a_task_is_named_and_a_blank_one_is_skipped(tmp_path, line, words):
    (tmp_path / 'tokenizer').mkdir()
    (tmp_path / 'tokenizer' / 'tokenizer.json').touch()
    (file := tmp_path / 'piqa.jsonl').write_text('{"query": "why?", "choices": ["so"]}\n\n')
    tasks = [{'label': 'piqa', 'dataset_uri': str(file)}]
    config = OmegaConf.create({'icl_tasks': tasks, 'max_seq_len': 32, 'variables': {'data': str(tmp_path)}})
    fill_in_tasks(config)
    assert [task.label for task in config.icl_tasks] == ['piqa']
    with open(file, 'a') as lines:
        lines.write(line)
    with pytest.raises(ValueError) as error:
        fill_in_tasks(config)
    assert str(error.value).startswith(f'{file}:3: {words}') and '\n' not in str(error.value)


def test_an_answer_has_its_length_whatever_the_tokenizer_was_saved_with(tmp_path):
    tokenizer = write_tokenizer(tmp_path / 'tokenizer')
    tokenizer('a', truncation=True, max_length=16)  # From now on a part of it.
    tokenizer.save_pretrained(tmp_path / 'tokenizer')
    (file := tmp_path / 'piqa.jsonl').write_text(json.dumps({'choices': ['a' * 40]}) + '\n')
    tasks = [{'label': 'piqa', 'dataset_uri': str(file)}]
    config = OmegaConf.create({'icl_tasks': tasks, 'max_seq_len': 32, 'variables': {'data': str(tmp_path)}})
    with pytest.raises(ValueError, match='icl_seq_len: 32 tokens hold no answer of piqa'):
        fill_in_tasks(config)


def test_the_documents_make_the_prompts_they_came_from(source, eval_data, manager):
    """lm-eval's definitions, on the converted documents, give what the files hold."""
    rows = {
        task: [json.loads(line) for line in (source / name).read_text().splitlines()]
        for name, (task, *_) in SOURCES.items()
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
