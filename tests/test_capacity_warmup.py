"""Training time, and the capacity that follows it, against marks worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from common.tiny_runs import BATCH, batches, fake_state, fit, tiny_model, trainer
from composer import Callback, Evaluator
from torch.utils.data import DataLoader

from itt_composer.algorithms.capacity_warmup import CapacityWarmup, get_capacity
from itt_composer.model import routing_state
from itt_composer.training.trainer_time import Interval, is_last_batch, parse_time, progress, training_length


@pytest.mark.parametrize('value', ['5', 'soon', '1.5ba', '0ba', '3600sec', None])
def test_bad_times_name_the_setting(value):
    with pytest.raises(ValueError, match=r'capacity_warmup\.duration: '):
        CapacityWarmup(duration=value)


def test_progress_and_length_in_every_unit():
    state = fake_state(30, max_duration='100ba', epoch_batches=20)
    expected = {'ba': (30, 100), 'sp': (120, None), 'tok': (1920, None), 'ep': (1.5, 5), 'dur': (0.3, 1)}
    for unit, (done, length) in expected.items():
        time = parse_time('t', f'1{unit}')
        assert progress(state, time.unit) == pytest.approx(done)
        assert training_length(state, time.unit) == length
    epochs = fake_state(30, max_duration='3ep', epoch_batches=20)
    assert progress(epochs, parse_time('t', '1dur').unit) == pytest.approx(0.5)
    assert training_length(epochs, parse_time('t', '1ba').unit) == 60


@pytest.mark.parametrize(
    ('interval', 'due_at'),
    [
        ('10ba', [0, 10, 20, 30]),
        ('0.1dur', [0, 10, 20, 30]),
        ('1ep', [0, 20]),
        ('640tok', [0, 10, 20, 30]),
        ('100sp', [0, 25]),
    ],
)
def test_interval_also_across_a_resume(interval, due_at):
    straight = Interval('i', interval)
    assert [b for b in range(35) if straight.due(fake_state(b))] == due_at
    for stop in (7, 10, 11, 20):
        before, after = Interval('i', interval), Interval('i', interval)
        first = [b for b in range(stop) if before.due(fake_state(b))]
        after.load_state_dict(before.state_dict())
        assert first + [b for b in range(stop, 35) if after.due(fake_state(b))] == due_at


@pytest.mark.parametrize('max_duration', ['40ba', '2ep', '160sp', '2560tok', '2500tok'])
def test_last_batch(max_duration):
    assert [b for b in range(40) if is_last_batch(fake_state(b, max_duration=max_duration))] == [39]


def test_get_capacity_at_its_marks():
    assert get_capacity(0, 0.5, 0.1) == 0.1
    assert get_capacity(0.25, 0.5, 0.1) == pytest.approx(0.2)
    assert get_capacity(1, 0.5, 0.1) == get_capacity(7, 0.5, 0.1) == 0.5
    assert get_capacity(0.25, 0.5, 0.1, shape='cosine') == pytest.approx(0.1 + 0.4 * (1 - math.cos(math.pi / 4)) / 2)
    assert get_capacity(0.5, 0.3, 0.4) == 0.3  # the ratio is below initial
    grows_on = {'final': 1.0, 'total': 5}
    assert get_capacity(1, 0.5, 0.1, **grows_on) == 0.5
    assert get_capacity(2, 0.5, 0.1, **grows_on) == pytest.approx(0.625)
    assert get_capacity(5, 0.5, 0.1, **grows_on) == get_capacity(6, 0.5, 0.1, **grows_on) == 1.0


@pytest.mark.parametrize('shape', ['linear', 'cosine'])
@pytest.mark.parametrize('final', [None, 0.9])
def test_get_capacity_never_falls_or_leaves_its_range(shape, final):
    values = [get_capacity(e, 0.7, 0.2, shape=shape, final=final, total=4) for e in np.linspace(0, 4, 401)]
    assert values[0] == 0.2 and values[-1] == (final or 0.7)
    assert all(a <= b for a, b in itertools.pairwise(values))


class CapacityAtForward(Callback):
    """Capacity of step 1 that each forward pass runs with, by what it is for and the batch count."""

    def __init__(self):
        self.seen = []

    def before_forward(self, state, logger):
        self.seen.append(('train', state.timestamp.batch.value, *self.now(state)))

    def eval_before_forward(self, state, logger):
        self.seen.append(('eval', state.timestamp.batch.value, *self.now(state)))

    def now(self, state):
        routing = routing_state(state.model)
        return routing.capacity_T[0], routing.temperature


@pytest.mark.parametrize('max_duration', ['8ba', '1ep'])
def test_capacity_in_training_and_evaluation_follows_the_timestamp(max_duration):
    seen = CapacityAtForward()
    warmup = CapacityWarmup('0.5dur', initial=0.1, initial_temperature=3.0)
    run = trainer(
        tiny_model(), [warmup, seen], max_duration=max_duration, microbatch=BATCH,
        eval_dataloader=Evaluator(
            label='eval', dataloader=DataLoader(batches(1), batch_size=2), metric_names=['LanguagePerplexity']
        ),
        eval_interval='3ba',
    )  # fmt: skip
    run.eval()  # before any training: the capacity of its first batch
    run.fit()
    run.close()
    for _, batch, capacity, temperature in seen.seen:
        assert capacity == pytest.approx(min(0.1 + 0.4 * batch / 4, 0.5))
        assert temperature == pytest.approx(max(3 - 2 * batch / 4, 1))
    assert [batch for what, batch, *_ in seen.seen if what == 'eval'] == [0, 0, 3, 3, 6, 6, 8, 8]


def test_capacity_warmup_that_resumes_with_other_settings_says_so(caplog):
    changed = CapacityWarmup('4ba', initial=0.2)
    changed.load_state_dict(CapacityWarmup('4ba', initial=0.1).state_dict())
    assert 'capacity_warmup.initial: the checkpoint was trained with 0.1; the resumed run uses 0.2' in caplog.text


def test_state_has_what_composer_reads_of_every_algorithm():
    warmup = CapacityWarmup('4ba')
    assert warmup.state_dict()['repr'] == repr(warmup)


def test_a_warm_up_that_will_not_end_is_said(caplog):
    fit(tiny_model(), [CapacityWarmup('9ba')])
    assert 'duration: 9ba is longer than the training, 8ba' in caplog.text


def test_final_says_whose_the_thresholds_are(caplog):
    fit(tiny_model(), [CapacityWarmup('4ba', final=1.0)])
    assert 'they belong to 1.0 and not to the model’s token_ratios' in caplog.text


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'initial': 0.0}, r'initial: expected .*above 0 and at most 1\), got 0.0'),
        ({'initial': [0.1, 1.2]}, r'initial: expected .*got \[0.1, 1.2\]'),
        ({'final': 1.5}, r'final: expected .*got 1.5'),
        ({'shape': 'cosin'}, r"shape: 'cosin' .*did you mean 'cosine'"),
        ({'initial': None}, r'initial: expected .*got null'),
        ({'initial': 'half'}, r"initial: expected .*got 'half'"),
        ({'initial_temperature': 0}, r'initial_temperature: expected a finite number or null \(above 0\), got 0'),
        ({'initial_temperature': 'hot'}, r"initial_temperature: expected a finite number .*got 'hot'"),
        ({'initial': [0.1]}, r'initial: 1 values for 2 extra steps'),
        ({'final': 0.4}, r'final: 0.4 is below the ratio 0.5 of step 1'),
        ({'duration': '64tok', 'final': 1.0}, r'duration: with final, expected the unit of max_duration \(8ba\)'),
        ({'duration': '8ba', 'final': 1.0}, r'duration: with final, expected less than the training, got 8ba'),
    ],
)
def test_capacity_warmup_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        fit(tiny_model(), [CapacityWarmup(**settings)])
