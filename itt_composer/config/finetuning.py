"""Foundry's ``finetuning`` loader in a training config: what it would do wrong without a word is refused.

The examples themselves are checked before a training starts (:mod:`.examples`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from itt_composer.checks import check_value
from itt_composer.config.arguments import Settings, check_arguments
from itt_composer.config.signatures import Signature

LOADER = 'finetuning'
# Of the examples, as foundry's function for files takes them, and of their batches.
KEYS = {
    'hf_name': 'str',
    'split': 'str',
    'hf_kwargs': 'dict',
    'preprocessing_fn': 'str | dict | None',
    'max_seq_len': 'int',
    'decoder_only_format': 'bool',
    'target_prompts': 'str',
    'target_responses': 'str',
    'shuffle': 'bool',
    'shuffle_seed': 'int',
    'pad_to_longest': 'bool',
    'allow_pad_trimming': 'bool',
    'packing_ratio': 'float | str | None',
}


def is_finetuning(config: Mapping[str, Any] | DictConfig) -> bool:
    """Whether a training config trains on examples of prompts and responses."""
    return config['train_loader'].get('name') == LOADER


def check_finetuning_dataset(dataset: Settings, where: str) -> None:
    """Check the ``dataset`` section of a finetuning loader; foundry itself only warns of keys it does not know.

    Raises:
        ValueError: one line that names the key.
    """
    given = {key: value for key, value in dataset.items() if value is not None}
    check_arguments(given, Signature.of(KEYS), where)
    if dataset.get('packing_ratio') not in (None, 1):
        raise ValueError(
            f'{where}.packing_ratio: packing is not supported, because tokens would attend to other examples, '
            f'got {dataset["packing_ratio"]!r}; leave it out, and set pad_to_longest: true to save padding'
        )
    if dataset.get('decoder_only_format') is not True:
        raise ValueError(f'{where}.decoder_only_format: expected true, got {dataset.get("decoder_only_format")!r}')
    files = (dataset.get('hf_kwargs') or {}).get('data_files')
    if dataset.get('hf_name') != 'json' or not isinstance(files, Mapping):
        raise ValueError(
            f'{where}: expected hf_name: json and hf_kwargs: {{data_files: {{<split>: <file.jsonl>}}}}, whose examples '
            f'can be checked before the start, got hf_name: {dataset.get("hf_name")!r}'
        )
    if dataset.get('split') not in files:
        raise ValueError(f'{where}.split: expected one of {", ".join(files)}, got {dataset.get("split")!r}')
    check_value(f'{where}.hf_kwargs.data_files.{dataset["split"]}', files[dataset['split']], 'str')


def fill_in_finetuning(config: DictConfig, where: str) -> None:
    """Make the evaluation loader the list that foundry takes, and see that the loaders fit the rest of the config.

    Raises:
        ValueError: one line that names the key.
    """
    if config.get('accumulate_train_batch_on_tokens', True) is not True:
        raise ValueError(
            f'{where}: accumulate_train_batch_on_tokens: expected true, because the loss is the mean over answer '
            'tokens; leave it out'
        )
    if config.variables.get('remote'):
        raise ValueError(f'{where}: variables.remote: the finetuning loader reads local files; leave it out')
    loader = config.get('eval_loader')
    if isinstance(loader, DictConfig):
        loader.setdefault('label', loader.dataset.split)
        config.eval_loader = [loader]
    for section, dataset in example_sets(config):
        if dataset.get('max_seq_len') != config.max_seq_len:
            raise ValueError(
                f'{where}: {section}.dataset.max_seq_len: expected max_seq_len ({config.max_seq_len}), got '
                f'{dataset.get("max_seq_len")}; set it to ${{max_seq_len}}'
            )


def example_sets(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The ``dataset`` section of each loader, and where it is."""
    yield 'train_loader', config.train_loader.dataset
    loaders = config.get('eval_loader')
    for loader in loaders if isinstance(loaders, ListConfig) else []:
        if loader.get('name') == LOADER:
            yield 'eval_loader', loader.dataset


def examples_file(dataset: Mapping[str, Any] | DictConfig) -> Path:
    """The file of a loader's examples."""
    return Path(dataset['hf_kwargs']['data_files'][dataset['split']])
