"""Package metadata. Exact versions of everything live in requirements.lock, which `make setup` installs from."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r"^__version__ = '(.+)'$", (HERE / 'itt_composer' / '__init__.py').read_text(), re.M)
assert VERSION is not None

setup(
    name='itt_composer',
    version=VERSION[1],
    description='Inner Thinking Transformer (arXiv 2502.13842) for MosaicML Composer and LLM-Foundry',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='the itt_composer project',
    license='Apache-2.0',
    license_files=['LICENSE'],
    project_urls={'Paper': 'https://arxiv.org/abs/2502.13842'},
    # The training configs lie at the top of the repository, and in the package once it is installed.
    package_dir={'itt_composer.yamls': 'yamls'},
    packages=[
        *find_packages(include=['itt_composer', 'itt_composer.*', 'data_prep', 'data_prep.*']),
        'itt_composer.yamls',
    ],
    package_data={
        'itt_composer': ['py.typed', 'paper/*.yaml'],
        'data_prep': ['py.typed'],
        'itt_composer.yamls': ['**/*.yaml'],
    },
    python_requires='>=3.10,<3.13',
    # llm-foundry narrows some of these: its 0.22.0 takes torch 2.7.0 alone.
    install_requires=[
        'mosaicml[tensorboard]>=0.32.1',
        'llm-foundry>=0.22.0',
        'mosaicml-streaming>=0.12.0',
        'torch>=2.7',
        'triton>=3.3; platform_system == "Linux"',
        'transformers>=4.51.3,<5',
        'tokenizers>=0.21',
        'sentencepiece>=0.2',
        'protobuf>=5,<6',
        # mlflow (a requirement of llm-foundry) fails on its own sqlite store with sqlalchemy 2.1.
        'sqlalchemy<2.1',
        'omegaconf>=2.3,<3',
        'numpy>=2,<3',
        'xxhash>=3',
        'matplotlib>=3.8',
        'pandas>=2.2,<3',
        'psutil>=5',
        'pyyaml>=6',
        # tensorboard 2.21 needs protobuf 6.
        'tensorboard>=2.19,<2.21',
        'rich>=13',
        'typer>=0.12',
        # datasets reads .zst files with it.
        'zstandard>=0.22',
        # llm-foundry imports pkg_resources, which setuptools 82 removes.
        'setuptools<82',
    ],
    entry_points={
        'console_scripts': [
            'itt = itt_composer.cli:app',
            # Not `lm_eval`: that name is lm-eval's own script.
            'itt-lm-eval = itt_composer.evaluation.lm_eval_command:main',
        ],
        'llmfoundry_models': ['itt_causal_lm = itt_composer.training.composer_model:ComposerITTForCausalLM'],
        'llmfoundry_optimizers': ['fused_decoupled_adamw = itt_composer.training.fused_adamw:DecoupledAdamW'],
        'llmfoundry_loggers': ['wandb = itt_composer.training.wandb_logger:OfflineWandBLogger'],
        'llmfoundry_algorithms': ['capacity_warmup = itt_composer.algorithms.capacity_warmup:CapacityWarmup'],
        'llmfoundry_callbacks': [
            'router_weights = itt_composer.callbacks.router_weights:RouterWeights',
            'step_encodings = itt_composer.callbacks.step_encodings:StepEncodings',
            'progress = itt_composer.callbacks.progress:Progress',
            'causal_gap = itt_composer.callbacks.causal_gap:CausalGap',
            'domain_mean = itt_composer.callbacks.domain_mean:DomainMean',
            'dynamic_batch_loading = itt_composer.callbacks.dynamic_batch_loading:DynamicBatchLoading',
            'gradient_nuclear_norm = itt_composer.callbacks.gradient_nuclear_norm:GradientNuclearNorm',
            'hf_checkpointer = itt_composer.export.hf_checkpointer:ITTHuggingFaceCheckpointer',
            'threshold_commit = itt_composer.training.threshold_commit:ThresholdCommit',
            'set_thinking = itt_composer.evaluation.set_thinking:SetThinking',
        ],
    },
    extras_require={
        # 0.4.13 is the version whose tasks and model registry are tested.
        'eval': ['lm-eval>=0.4.13,<0.5'],
        # `itt data --engine ray`.
        'ray': ['ray>=2.40,<3'],
        # Tests, linters and the studies.
        'dev': [
            *('pytest>=8', 'pytest-timeout>=2', 'pytest-xdist>=3', 'ruff>=0.9', 'mypy>=1.13', 'codespell>=2.3'),
            'scipy>=1.15',
        ],
    },
)
