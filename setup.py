"""Package metadata. Exact versions of everything live in requirements.lock, which `make setup` installs from."""

from setuptools import find_packages, setup

setup(
    name='itt_composer',
    version='0.1.0',
    description='Inner Thinking Transformer (arXiv 2502.13842) for MosaicML Composer and LLM-Foundry',
    packages=find_packages(include=['itt_composer', 'itt_composer.*', 'data_prep', 'data_prep.*']),
    python_requires='>=3.10,<3.13',
    install_requires=[
        'mosaicml[tensorboard]==0.32.1',
        'llm-foundry==0.22.0',
        'mosaicml-streaming==0.12.0',
        'torch==2.7.0',
        'triton==3.3.0; platform_system == "Linux"',
        'transformers==4.51.3',
        'tokenizers>=0.21',
        'sentencepiece>=0.2',
        'protobuf>=5,<6',
        # mlflow (a requirement of llm-foundry) fails on its own sqlite store with sqlalchemy 2.1.
        'sqlalchemy<2.1',
        'omegaconf>=2.3,<3',
        'numpy>=2,<3',
        'filelock>=3',
        'xxhash>=3',
        'matplotlib>=3.8',
        'pandas>=2.2,<3',
        'scipy>=1.15',
        'tensorboard>=2.19,<2.21',
        'rich>=13',
        'typer>=0.12',
        'zstandard>=0.22',
        # llm-foundry imports pkg_resources, which setuptools 81 deprecates and 82 removes.
        'setuptools<81',
    ],
    entry_points={
        # lm-eval looks for models in its own list only: this is its command with ours added, in place of its own.
        'console_scripts': ['lm_eval = itt_composer.evaluation.lm_eval_command:main'],
        'llmfoundry_models': ['itt_causal_lm = itt_composer.training.composer_model:ComposerITTForCausalLM'],
        'llmfoundry_algorithms': ['capacity_warmup = itt_composer.algorithms.capacity_warmup:CapacityWarmup'],
        'llmfoundry_callbacks': [
            'router_weights = itt_composer.callbacks.router_weights:RouterWeights',
            'step_encodings = itt_composer.callbacks.step_encodings:StepEncodings',
            'causal_gap = itt_composer.callbacks.causal_gap:CausalGap',
            'dynamic_batch_loading = itt_composer.callbacks.dynamic_batch_loading:DynamicBatchLoading',
            'gradient_nuclear_norm = itt_composer.callbacks.gradient_nuclear_norm:GradientNuclearNorm',
            'hf_checkpointer = itt_composer.export.hf_checkpointer:ITTHuggingFaceCheckpointer',
            'set_thinking = itt_composer.evaluation.set_thinking:SetThinking',
        ],
    },
    extras_require={
        'eval': ['lm-eval==0.4.13'],
        # The engines of `make data ENGINE=ray` and `ENGINE=spark`; Spark needs Java 8, 11 or 17 too.
        'ray': ['ray>=2.40,<3'],
        'spark': ['pyspark>=3.5,<4'],
        'dev': ['pytest>=8', 'pytest-timeout>=2', 'pytest-xdist>=3', 'ruff>=0.9', 'mypy>=1.13'],
    },
)
