"""Train the model of a training config, for the launcher: composer train.py yamls/itt_x4_230m.yaml [key=value ...]."""

import sys

from itt_composer.cli import app

if __name__ == '__main__':
    app(['train', *sys.argv[1:]])
