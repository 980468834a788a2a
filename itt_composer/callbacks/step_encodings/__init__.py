"""Log the learned thinking step encodings phi.

See README.md in this folder.
"""

from itt_composer.callbacks.step_encodings.step_encodings import StepEncodings

__all__ = ['StepEncodings']
