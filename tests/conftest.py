"""What the tests share: thread count, the shared data, and a clear reason where it is absent."""

import os
import sys
from pathlib import Path

import pytest

# One thread: the tensors here are small, and the suite shares two cores with its own forks.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
REPO = Path(__file__).parents[1]
SHARED = REPO.parent / 'shared'
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder with the paper's tables, the RedPajama sample, LLaMA's tokenizer and the evaluation sets."""
    if not SHARED.is_dir():
        pytest.skip(f'the shared data folder {SHARED.name}/ does not stand beside the repository')
    return SHARED


@pytest.fixture(scope='session')
def llama(shared, tmp_path_factory) -> Path:
    """LLaMA's tokenizer in a folder, as `make data` saves it."""
    from data_prep.tokenizer import save_tokenizer

    folder = tmp_path_factory.mktemp('llama') / 'tokenizer'
    save_tokenizer(str(shared / 'data/llama_tokenizer'), [], folder)
    return folder


@pytest.fixture(autouse=True)
def no_process_group_left():
    """foundry's train and eval leave one, which forks for several ranks would inherit."""
    yield
    torch = sys.modules.get('torch')
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
