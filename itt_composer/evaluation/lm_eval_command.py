"""``itt-lm-eval``: lm-eval's own command line, with the model ``itt`` registered.

lm-eval 0.4.13 looks for models in its own list only, so that its script ``lm_eval`` does not know ours.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Take lm-eval's arguments. With the model ``itt``, an error is one line."""
    import lm_eval.models  # noqa: F401 (fills the registry, which lm-eval does itself only while it is empty)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    model_registry.register('itt', target='itt_composer.evaluation.harness:ITTLM')
    try:
        cli_evaluate()
    except ValueError as error:
        if 'itt' not in sys.argv:
            raise
        sys.exit(f'itt-lm-eval: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
