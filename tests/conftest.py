"""What the tests share: thread count, the shared data, and a clear reason where it is absent."""

import atexit
import contextlib
import gc
import os
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
REPO = Path(__file__).parents[1]
SHARED = REPO.parent / 'shared'
sys.path.insert(0, str(Path(__file__).parent))

WITHOUT_DATASETS = {
    'test_algorithms_callbacks',
    'test_atomic',
    'test_blocks',
    'test_build_error',
    'test_cache',
    'test_causal_routing_training',
    'test_cli',
    'test_compiled',
    'test_composer_model',
    'test_data_ray',
    'test_data_segments',
    'test_data_split',
    'test_data_tokenizer',
    'test_data_words',
    'test_deprecated',
    'test_elastic_thinking',
    'test_evaluation',
    'test_export',
    'test_flops',
    'test_generation',
    'test_install',
    'test_kernels',
    'test_llama_equality',
    'test_loss',
    'test_makefile',
    'test_ops',
    'test_option_table',
    'test_pretrained_families',
    'test_pretrained_start',
    'test_research',
    'test_routing',
    'test_scale',
    'test_table1',
    'test_thinking',
    'test_thresholds',
    'test_transformers_adapters',
    'test_transformers_loading',
    'test_transformers_outputs',
    'test_transformers_training',
    'test_trl',
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """`make test` has two processes, and whatever makes datasets stays in one of them.

    streaming numbers its shared memory for the whole machine, and two that look for a number at a time may find the
    same one.
    """
    from xdist.scheduler import LoadScopeScheduling

    class TwoProcesses(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return 'without datasets' if Path(nodeid.split('::')[0]).stem in WITHOUT_DATASETS else 'datasets'

    return TwoProcesses(config, log)


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
