"""What the tests share: thread count, the shared data, and a clear reason where it is absent."""

import atexit
import contextlib
import gc
import os
import signal
import sys
from pathlib import Path

import pytest

# One thread: the tensors here are small, and the suite shares two cores with its own forks.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
# lm-eval's bootstrap forks otherwise, and a fork of a process with this many threads may wait for ever.
os.environ.setdefault('DISABLE_MULTIPROC', '1')
# Otherwise the first compilation starts one process per core, each of which imports PyTorch.
os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '1')
# A process group in the background, as `timeout` makes one, is otherwise stopped by whatever asks the terminal.
signal.signal(signal.SIGTTIN, signal.SIG_IGN)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
REPO = Path(__file__).parents[1]
SHARED = REPO.parent / 'shared'
sys.path.insert(0, str(Path(__file__).parent))

# These run first, in this order: a slow file at the end would leave the other process of `make test` without work.
# Ray starts processes and waits for them; beside it runs a file that starts none.
SLOWEST_FILES = ('test_data_ray', 'test_compiled', 'test_causal_routing_training', 'test_kernels', 'test_wheel')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """What the imports made stays: the garbage collector looks at the tests' own objects alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope='session')
def own_shared_memory(tmp_path_factory) -> None:
    """The processes of `make test` have datasets at the same time."""
    if 'streaming' in sys.modules:
        from itt_composer.training.shared_memory import use_own_names

        use_own_names(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True, scope='session')
def machine_asked_once() -> None:
    """Composer starts a process with every trainer and every checkpoint, lm-eval some with every evaluation."""
    if (evaluator := sys.modules.get('lm_eval.evaluator')) is not None:
        evaluator.add_env_info = lambda results: None
    if (cpuinfo := sys.modules.get('cpuinfo')) is not None:
        answer = cpuinfo.get_cpu_info()
        cpuinfo.get_cpu_info = lambda: answer


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run files look for ``data/`` in the working directory, and the repository's may hold a user's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder with the paper's tables, the RedPajama sample, LLaMA's tokenizer and the evaluation sets."""
    if not SHARED.is_dir():
        pytest.skip(f'the shared data folder {SHARED.name}/ does not stand beside the repository')
    return SHARED


@pytest.fixture(scope='session')
def llama(shared, tmp_path_factory) -> Path:
    """LLaMA's tokenizer in a folder, as `make data` saves it."""
    from data_prep.tokens.tokenizer import save_tokenizer

    folder = tmp_path_factory.mktemp('llama') / 'tokenizer'
    save_tokenizer(str(shared / 'data/llama_tokenizer'), [], folder)
    return folder


@pytest.fixture
def few_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals from as few as two, as in what is small enough to be checked by hand."""
    from research.figures import bootstrap

    monkeypatch.setattr(bootstrap, 'MIN_DOCUMENTS', 2)


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory) -> Path:
    """A Composer checkpoint of a small ITT model, in its run's folder beside other files."""
    from common.exported_runs import CHECKPOINT, train

    runs = tmp_path_factory.mktemp('runs')
    train('itt', runs)
    return runs / 'itt' / CHECKPOINT


@pytest.fixture(scope='module')
def source(shared, tmp_path_factory) -> Path:
    """The first documents of each evaluation set."""
    from common.evaluation_models import write_source

    return write_source(shared, tmp_path_factory.mktemp('source'))


@pytest.fixture(scope='module')
def eval_data(source, tmp_path_factory) -> Path:
    """The same as lm-eval's and foundry's tasks."""
    from itt_composer.evaluation.convert import convert

    out = tmp_path_factory.mktemp('data') / 'eval'
    convert(source, out)
    return out


@pytest.fixture(scope='module')
def manager(eval_data):
    """lm-eval's tasks on these documents alone."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(eval_data / 'lm_eval'), include_defaults=False)


@pytest.fixture(scope='module')
def exported(llama, tmp_path_factory) -> Path:
    """The folders of a dense and an ITT model with LLaMA's tokenizer."""
    from common.evaluation_models import write_models

    return write_models(llama, tmp_path_factory.mktemp('models'))


@pytest.fixture(autouse=True)
def no_process_group_left():
    """Composer leaves one, which forks for several ranks would inherit, and its variables, which transformers reads."""
    yield
    torch = sys.modules.get('torch')
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ('RANK', 'LOCAL_RANK', 'NODE_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True, scope='module')
def no_shared_memory_left():
    """streaming gives its shared memory back at exit, and each new dataset opens again that of every one before it.

    Over the whole suite that is more descriptors than a process may have.
    """
    yield
    memory = sys.modules.get('streaming.base.shared.memory')
    if memory is None:
        return
    gc.collect()
    for one in [o for o in gc.get_objects() if type(o) is memory.SharedMemory]:
        with contextlib.suppress(BufferError):  # of a dataset that is still in use
            one.cleanup()
            atexit.unregister(one.cleanup)
