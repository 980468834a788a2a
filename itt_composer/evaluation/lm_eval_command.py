"""lm-eval's own command line, with the model ``itt`` registered.

lm-eval 0.4.13 looks for models in its own list only. This package's script ``lm_eval`` adds ours and hands over.
"""

from __future__ import annotations

import sys


def main() -> None:
    """``lm_eval``: the arguments are lm-eval's. With our model a user's mistake is one line, not a stack trace."""
    import lm_eval.models  # noqa: F401 (fills the registry, which lm-eval does itself only while it is empty)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    model_registry.register('itt', target='itt_composer.evaluation.harness:ITTLM')
    try:
        cli_evaluate()
    except ValueError as error:
        if 'itt' not in sys.argv:
            raise
        sys.exit(f'lm_eval: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
