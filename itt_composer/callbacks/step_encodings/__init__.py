"""Logs what the thinking step encodings phi have learned.

See README.md in this folder.
"""

from itt_composer.callbacks.step_encodings.step_encodings import StepEncodings

__all__ = ['StepEncodings']
