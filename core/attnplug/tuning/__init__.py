"""The fastest implementation that is right, by measurement: from what a program calls to choices in use.

    with attnplug.capture() as cases:
        model(batch)
    choices = attnplug.tune(cases)
    print(choices)
    attnplug.use_choices(choices)

`attnplug tune` does the same from a shell.
"""

from attnplug.tuning._capture import capture
from attnplug.tuning._tune import choices_from, tune

__all__ = ["capture", "choices_from", "tune"]
