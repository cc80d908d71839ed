"""The conformance kit: finds out whether a kernel is right before its users do.

Three ways to run the same checks:

* `check_impl("my_kernel")` from Python returns a report;
* `@parametrize_with_checks("my_kernel")` makes each check a case of a test of your own;
* `attnplug check my_kernel` needs no code at all.

What is checked follows from what the implementation declares, and the tolerance is the same for
every implementation. attnplug itself never imports this package.
"""

from attnplug._accuracy import Outcome
from attnplug.testing._call import Call
from attnplug.testing._checks import Check
from attnplug.testing._compare import assert_right
from attnplug.testing._failure import CheckFailure
from attnplug.testing._inputs import Inputs
from attnplug.testing._pytest import parametrize_with_checks
from attnplug.testing._report import Report, Result
from attnplug.testing._runner import check_impl, check_impls
from attnplug.testing.checks import all_checks

__all__ = [
    "Call",
    "Check",
    "CheckFailure",
    "Inputs",
    "Outcome",
    "Report",
    "Result",
    "all_checks",
    "assert_right",
    "check_impl",
    "check_impls",
    "parametrize_with_checks",
]
