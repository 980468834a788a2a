"""Every key of a run file against what it will build, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from itt_composer.checks import check_choice, check_keys, check_value
from itt_composer.config.signatures import Signature, registered, signature
from itt_composer.options import ModelOptions

TRAIN_CONFIG = 'llmfoundry.utils.config_utils:TrainConfig'
MODEL = 'itt_causal_lm'


def foundry_keys() -> list[str]:
    """The top-level keys of a run file: the fields of the installed foundry's ``TrainConfig``."""
    config = signature(TRAIN_CONFIG)
    if config is None:
        raise ValueError('llm-foundry is not installed; run: make setup')
    return list(config.parameters)


def check_model(model: Mapping[str, Any], where: str) -> None:
    """Check the ``model`` section: our options, and the arguments of the class that foundry builds.

    Raises:
        ValueError: one line that names the key.
    """
    name = model.get('name', MODEL)
    check_choice(f'{where}.name', name, sorted(registered('models')))
    ours = ModelOptions.keys() if name == MODEL else []
    known = signature(registered('models')[name])
    if known is not None:
        more = ('name', 'master_weights_dtype', *ours)
        others = {key: value for key, value in model.items() if key not in more}
        # The keys that our class takes beside its arguments are `ours`.
        check_arguments(others, replace(known, open=known.open and not ours), where, given=('tokenizer',), more=more)
    if name != MODEL:
        return
    # A vocabulary that is left open is the tokenizer's.
    values = {key: model[key] for key in ours if key in model and not (key == 'vocab_size' and model[key] is None)}
    try:
        ModelOptions(**values)
    except ValueError as error:
        raise ValueError(f'{where}.{error}') from None


def check_arguments(
    values: Mapping[str, Any], known: Signature, where: str, given: Iterable[str] = (), more: Iterable[str] = ()
) -> None:
    """Check names and types of what a function or class will be called with.

    Args:
        values: the keys of a section.
        known: arguments that there are.
        where: the section, for messages.
        given: arguments that foundry gives itself and nobody may set.
        more: other keys that may be set.

    Raises:
        ValueError: one line that names the key.
    """
    names = [name for name in known.parameters if name not in given]
    if not known.open:
        check_keys((str(key) for key in values), [*names, *more], where)
    for key, value in values.items():
        parameter = known.parameters.get(key)
        if parameter and not (value is None and parameter.none_by_default):
            check_value(f'{where}.{key}', value, parameter.annotation)
