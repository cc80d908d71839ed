"""Choosing the fastest correct implementation by measurement.

    with attnplug.capture() as cases:
        model(batch)
    choices = attnplug.tune(cases)
    print(choices)
    attnplug.use_choices(choices)

`attnplug tune` does the same from a shell. This module has the types that choices consist of.
"""

from attnplug._selection.choice_tables import Choice, Kind, Table
from attnplug.tuning._tune import choices_from

__all__ = ["Choice", "Kind", "Table", "choices_from"]
