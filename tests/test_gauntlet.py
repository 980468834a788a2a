"""Foundry's in-context-learning tasks on our models: in training, and after it through eval.py."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import time
from pathlib import Path

import pytest
from common.ranks import run_on_ranks
from common.shards import write_data
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from itt_composer.config.run_file import resolve
from itt_composer.evaluation.convert import SOURCES, convert
from itt_composer.evaluation.eval_file import resolve_evaluation
from itt_composer.training.command import train
from itt_composer.training.preflight import Machine, problems

REPOSITORY = Path(__file__).resolve().parents[1]
YAMLS = REPOSITORY / 'yamls'
GAUNTLET = YAMLS / 'eval' / 'gauntlet.yaml'
FAMILIES = ('loop_x4', 'itt_x4')


def load_script(name):
    sys.path.insert(0, str(REPOSITORY))
    spec = importlib.util.spec_from_file_location(f'{name}_script', REPOSITORY / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


@pytest.fixture(scope='module')
def eval_data(shared, tmp_path_factory):
    """Eight to 24 real documents of each task whose files are there; the long BoolQ and LogiQA only where asked."""
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('data') / 'eval'
    for name in SOURCES:
        lines = (shared / 'data' / 'eval' / name).read_text().splitlines(keepends=True)
        (source / name).write_text(''.join(lines[: 40 if name == 'boolq.jsonl' else 28]))
    convert(source, out)
    return out


@pytest.fixture(scope='module')
def overrides(eval_data, tmp_path_factory):
    """What fits a tiny training config to small data, with a tokenizer of the tasks' own text."""
    data = write_data(tmp_path_factory.mktemp('train'), {'wiki': 96}, {'wiki': 4}, row_length=128)
    bpe = ByteLevelBPETokenizer()
    texts = [path.read_text() for path in sorted((eval_data / 'foundry').glob('*.jsonl'))]
    bpe.train_from_iterator([*texts, ' yes no' * 100], 2000, special_tokens=['<unk>', '<s>', '</s>'])
    bpe.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token='<s>', eos_token='</s>')
    tokenizer.save_pretrained(data / 'tokenizer')
    runs = tmp_path_factory.mktemp('runs')
    small = ['max_seq_len=128', 'model.hidden_size=32', 'model.num_hidden_layers=2', 'global_train_batch_size=4']
    small += ['log_to_console=false', 'max_duration=2ba', 'eval_interval=2ba', 'save_interval=2ba']
    small += ['model.max_position_embeddings=512', 'callbacks.router_weights=null', 'callbacks.step_encodings=null']
    return [*small, f'variables.data={data}', f'variables.runs={runs}', f'variables.eval_data={eval_data}'], runs


@pytest.fixture(scope='module')
def trained(overrides, tmp_path_factory):
    """Each family after two batches, ITT with the gauntlet at its evaluation."""
    given, runs = overrides
    scratch = tmp_path_factory.mktemp('scratch')
    with pytest.MonkeyPatch.context() as patch:
        # Foundry writes copies of the tasks' files into the current folder.
        patch.chdir(scratch)
        for family in FAMILIES:
            tasks = ['parts.evaluation=gauntlet', 'icl_subset_num_batches=1'] if family == 'itt_x4' else []
            train(str(YAMLS / f'{family}_tiny.yaml'), [*given, *tasks])
    return runs


def test_in_training(trained):
    """At an evaluation interval, the tasks' accuracies and the gauntlet's averages are logged."""
    events = EventAccumulator(str(trained / 'tensorboard' / 'itt_x4_tiny'))
    events.Reload()
    tags = events.Tags()['scalars']
    for task, metric in (
        ('piqa/0-shot', 'InContextLearningMultipleChoiceAccuracy'),
        ('winogrande/0-shot', 'InContextLearningMultipleChoiceAccuracy'),
        ('arc_challenge/25-shot', 'InContextLearningMultipleChoiceAccuracy'),
        ('lambada/0-shot', 'InContextLearningLMAccuracy'),
    ):
        (accuracy,) = [event.value for event in events.Scalars(f'metrics/{task}/{metric}')]
        assert 0 <= accuracy <= 1
    averages = {tag.split('/')[-1] for tag in tags if 'eval_gauntlet' in tag}
    # Every category has a task with data but knowledge, which is MMLU alone.
    assert averages == {'science', 'commonsense', 'reading', 'default_average'}
    assert not any('mmlu' in tag or 'sciq' in tag or 'hellaswag' in tag for tag in tags)


@pytest.mark.parametrize('family', FAMILIES)
def test_after_training_and_as_lm_eval_scores_it(family, overrides, trained, eval_data, tmp_path, monkeypatch):
    """BoolQ's answers are single tokens, for which foundry's accuracy and lm-eval's are the same."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from itt_composer.evaluation.harness import ITTLM
    from itt_composer.export.folder import export

    own = tmp_path / 'eval.yaml'
    tasks = [
        {
            'label': 'boolq',
            'dataset_uri': f'{eval_data}/foundry/boolq.jsonl',
            'num_fewshot': [0],
            'max_seq_len': 512,
            'icl_task_type': 'multiple_choice',
        },
        {
            'label': 'lambada',
            'dataset_uri': f'{eval_data}/foundry/lambada_openai.jsonl',
            'num_fewshot': [0],
            'max_seq_len': 256,
            'icl_task_type': 'language_modeling',
        },
    ]
    run = str(YAMLS / f'{family}_tiny.yaml')
    OmegaConf.save(OmegaConf.create({'run': run, 'icl_tasks': tasks, 'icl_seq_len': 512}), own)
    script = load_script('eval')
    scores = {}
    import llmfoundry.command_utils as commands

    foundry = commands.evaluate

    def remember(config):
        (trainer,), _ = foundry(config)
        for label, metrics in trainer.state.eval_metrics.items():
            scores[label] = {name: metric.compute().item() for name, metric in metrics.items()}

    monkeypatch.setattr(commands, 'evaluate', remember)
    before = set(Path.cwd().iterdir())
    script.main([str(own), *overrides[0]])
    assert set(Path.cwd().iterdir()) == before

    lm = ITTLM(str(export(trained / f'{family}_tiny' / 'checkpoints', tmp_path / 'model')), device='cpu')
    manager = TaskManager(include_path=str(eval_data / 'lm_eval'), include_defaults=False)
    wanted = simple_evaluate(lm, tasks=['boolq', 'lambada_openai'], task_manager=manager, bootstrap_iters=0)['results']
    assert scores['boolq/0-shot']['InContextLearningMultipleChoiceAccuracy'] == pytest.approx(
        wanted['boolq']['acc,none']
    )
    assert scores['lambada/0-shot']['InContextLearningLMAccuracy'] == pytest.approx(
        wanted['lambada_openai']['acc,none']
    )
    assert 0 < wanted['boolq']['acc,none'] < 1


def meet_in_the_folder():
    """Foundry's way: a node's first process copies a file into the current folder, the others wait for it there."""
    with load_script('eval').node_folder() as folder:
        mine, other = (folder / f'{rank}' for rank in (('0', '1') if os.environ['LOCAL_RANK'] == '0' else ('1', '0')))
        mine.write_text('')
        until = time.monotonic() + 20
        while not other.exists():
            assert time.monotonic() < until, f'{other} is not there'
            time.sleep(0.05)
        time.sleep(0.2)  # The first one takes the folder away.
    return str(folder)


def test_the_processes_of_a_node_share_a_folder():
    (folder,) = set(run_on_ranks(2, meet_in_the_folder))
    assert not Path(folder).exists()
    with load_script('eval').node_folder() as alone:
        assert str(alone) != folder and not list(alone.iterdir())


def test_thinking_is_set(overrides, trained, monkeypatch, tmp_path):
    """Before the tasks run, and refused in training."""
    import llmfoundry.command_utils as commands

    from itt_composer.evaluation.set_thinking import SetThinking
    from itt_composer.model import routing_state

    seen = []
    foundry = commands.evaluate

    def look(config):
        (trainer,), _ = foundry(config)
        state = routing_state(trainer.state.model)
        seen.append((state.asked_T, state.evaluation_selection))

    monkeypatch.setattr(commands, 'evaluate', look)
    arguments = [*overrides[0], f'run={YAMLS}/itt_x4_tiny.yaml', 'icl_subset_num_batches=1']
    load_script('eval').main([str(GAUNTLET), *arguments, 'thinking={token_ratios: [0.25, 0, 0], selection: top_k}'])
    assert seen == [([0.25, 0, 0], 'top_k')]
    with pytest.raises(ValueError, match='set_thinking: for evaluation only'):
        SetThinking().fit_start(None, None)


def test_the_same_tasks_in_training_and_after(overrides, trained, caplog):
    """One part serves both; absent tasks leave the gauntlet and are named."""
    given = overrides[0]
    with caplog.at_level(logging.WARNING):
        run, evaluation = resolve_evaluation(GAUNTLET, [*given, f'run={YAMLS}/loop_x4_tiny.yaml'])
    assert caplog.messages == ['evaluation tasks whose data is missing: sciq, hellaswag, mmlu']
    training = resolve(YAMLS / 'loop_x4_tiny.yaml', [*given, 'parts.evaluation=gauntlet'])
    assert training.icl_tasks == evaluation.icl_tasks and training.eval_gauntlet == evaluation.eval_gauntlet
    named = [task.name for category in evaluation.eval_gauntlet.categories for task in category.benchmarks]
    assert sorted(named) == sorted(task.label for task in evaluation.icl_tasks)
    assert max(task.max_seq_len for task in evaluation.icl_tasks) == 128
    (model,) = evaluation.models
    assert model.load_path == str((trained / 'loop_x4_tiny' / 'checkpoints' / 'ep0-ba2-rank0.pt').resolve())
    assert model.model == run.model


def test_the_model_is_what_the_checkpoint_says(overrides, trained):
    """And not its training config, which may have been trained with overrides; this call's own override it."""
    given = [key for key in overrides[0] if not key.startswith('model.hidden_size')]
    tiny = YAMLS / 'itt_x4_tiny.yaml'
    assert resolve(tiny, given).model.hidden_size != 32
    _, config = resolve_evaluation(GAUNTLET, [*given, f'run={tiny}'])
    model = config.models[0].model
    assert (model.hidden_size, model.combine, list(model.token_ratios)) == (32, 'weighted', [0.5, 0.5, 0.5])
    _, config = resolve_evaluation(GAUNTLET, [*given, f'run={tiny}', 'model.combine=delta'])
    assert config.models[0].model == {**model, 'combine': 'delta'}


def test_benchmarks_shots_and_files_agree():
    """The part's tasks are the paper's, with the paper's shots, each in one category."""
    from itt_composer.paper.tasks import paper_tasks

    part = OmegaConf.load(YAMLS / 'parts' / 'evaluation' / 'gauntlet.yaml')
    shots = {task.column: task.shots for task in paper_tasks()}
    assert {task.label: task.num_fewshot[0] for task in part.icl_tasks} == shots
    benchmarks = [task for category in part.eval_gauntlet.categories for task in category.benchmarks]
    assert {task.name: task.num_fewshot for task in benchmarks} == shots and len(benchmarks) == len(shots)
    files = {Path(str(OmegaConf.to_container(task)['dataset_uri'])).stem for task in part.icl_tasks}
    assert files == {task.name for task in paper_tasks()}


def test_a_task_with_an_answer_that_fills_the_context_is_left_out(overrides, trained, tmp_path, caplog):
    """Foundry would end at that answer, in training at the first evaluation."""
    (tmp_path / 'foundry').mkdir()
    for task, words in (('piqa', 300), ('arc_easy', 3)):
        row = {'query': 'Question: why?\nAnswer:', 'choices': ['so', 'b ' * words], 'gold': 0}
        (tmp_path / 'foundry' / f'{task}.jsonl').write_text(json.dumps(row) + '\n')
    given = [*overrides[0], f'run={YAMLS}/itt_x4_tiny.yaml', f'variables.eval_data={tmp_path}']
    _, config = resolve_evaluation(GAUNTLET, [*given, 'icl_seq_len=64'])
    assert [task.label for task in config.icl_tasks] == ['arc_easy']
    assert [task.name for category in config.eval_gauntlet.categories for task in category.benchmarks] == ['arc_easy']
    assert 'an answer as long as their context: piqa' in caplog.text
    (tmp_path / 'foundry' / 'arc_easy.jsonl').unlink()
    with pytest.raises(ValueError, match='icl_seq_len: 64 tokens hold no answer of piqa; make it longer'):
        resolve_evaluation(GAUNTLET, [*given, 'icl_seq_len=64'])
    # Foundry's tasks that generate have other rows, and nothing of theirs is fed to the model.
    row = {'context': 'Question: why?', 'answer': 'so ' * 300, 'aliases': []}
    (tmp_path / 'foundry' / 'arc_easy.jsonl').write_text(json.dumps(row) + '\n')
    run, config = resolve_evaluation(GAUNTLET, [*given, 'icl_seq_len=64'])
    assert [task.label for task in config.icl_tasks] == ['arc_easy']
    # Any number of processes may evaluate.
    assert problems(run, Machine(world_size=3, local_world_size=3, local_rank=0, gpus=3)) == []


def test_bad_input_is_named(overrides, trained, tmp_path):
    given = [*overrides[0], f'run={YAMLS}/itt_x4_tiny.yaml']

    def message(*more, file=GAUNTLET):
        with pytest.raises(ValueError) as error:
            resolve_evaluation(file, [*given, *more])
        assert '\n' not in str(error.value)
        return str(error.value)

    assert "icl_tasks: expected a list or null, got 'tasks.yaml'" in message('icl_tasks=tasks.yaml')
    assert "eval_gauntlet: expected a mapping or null, got 'gauntlet.yaml'" in message('eval_gauntlet=gauntlet.yaml')
    assert 'no data for sciq, piqa' in message(f'variables.eval_data={tmp_path}')
    assert 'load_path: ' in message(f'load_path={tmp_path / "none.pt"}') and 'no such checkpoint' in message(
        'run_name=x'
    )
    assert 'load_path: s3://b/a.pt: remote checkpoints are not read here' in message('load_path=s3://b/a.pt')
    assert "unknown key 'ratios'; did you mean 'token_ratios'" in message('thinking={ratios: [1]}')
    assert "'treshold' is not one of" in message('thinking.selection=treshold')
    assert 'thinking: token_ratios: 2 ratios for 3 extra steps' in message('thinking.token_ratios=[0.7,0.7]')
    assert 'no thresholds for 0.7/0.7/0.7' in message('thinking.token_ratios=[0.7,0.7,0.7]')
    assert 'thinking: loop has no extra steps' in message(f'run={YAMLS}/loop_x4_tiny.yaml', 'thinking.selection=top_k')
    assert 'no such file' in message(file=tmp_path / 'none.yaml')
    assert "unknown key 'thinkin'" in message('thinkin={}')
    (tmp_path / 'empty.yaml').write_text(f'parts: {{}}\nrun: {YAMLS}/itt_x4_tiny.yaml\n')
    assert 'no icl_tasks; name a config group that has them: parts.evaluation=gauntlet' in message(
        file=tmp_path / 'empty.yaml'
    )
    script = load_script('eval')
    with pytest.raises(SystemExit) as stopped:
        script.main([str(GAUNTLET), *given, 'precision=amp_bf16'])
    assert str(stopped.value.code).startswith('eval.py: ') and 'no GPU' in stopped.value.code
