"""Which section of a training config foundry or Composer could not build, from the frames of its error."""

from __future__ import annotations

# Function of foundry or Composer to the section that it builds; `{name}` is its argument.
BUILDERS = {
    'build_tokenizer': 'tokenizer',
    'build_scheduler': 'scheduler',
    'build_logger': 'loggers.{name}',
    'build_callback': 'callbacks.{name}',
    'build_algorithm': 'algorithms.{name}',
    'build_eval_loaders': 'eval_loader',
    'build_icl_evaluators': 'icl_tasks',
    'build_dataloader': 'train_loader',
    'build_composer_model': 'model',
    'build_optimizer': 'optimizer',
}


def build_error(error: BaseException) -> str | None:
    """One line that names the section and the problem; None for an error of the training itself.

    Args:
        error: as it was caught, with its frames.
    """
    section, frame = None, error.__traceback__
    while frame is not None:
        code, local = frame.tb_frame.f_code, frame.tb_frame.f_locals
        if code.co_name == 'fit':
            return None
        if section is None and code.co_name in BUILDERS:
            section = BUILDERS[code.co_name].format(name=local.get('name'))
        if section is None and code.co_name == '__init__' and code.co_filename.endswith('composer/trainer/trainer.py'):
            section = 'trainer'
        frame = frame.tb_next
    if section is None:
        return None
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    what = ' '.join(f'{error}{"" if cause is error else f" ({cause})"}'.split()) or 'no message'
    kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
    return f'{section}: cannot be built: {kind}{what}; --verbose shows where'
