"""Canaries: tests that tell when upstream has mended a fault that we correct. They report it and fail for nobody.

The functions whose names start with `pytest_` are hooks: `conftest.py` takes them over.
"""

import functools
import warnings


REPORTS = []


class CanaryWarning(UserWarning):
    """Upstream has changed where we correct it."""


def canary(fault, correction):
    """
    Make a test of a function that returns whether upstream is right by now: if so, that is reported.

    A function that fails reports that it can no longer tell. Its own code has no other use than the report.

    Args:
        fault (`str`): the issue upstream, or what is wrong.
        correction (`str`): what of ours can go once upstream is right.
    """

    def decorate(is_right):
        @functools.wraps(is_right)
        def test(*arguments, **fixtures):
            try:
                if is_right(*arguments, **fixtures):
                    report(f"upstream has fixed: {fault}; hf_selfkd can lose {correction}")
            except Exception as error:
                told = " ".join(str(error).split())[:200]
                report(f"cannot tell whether upstream has fixed: {fault} ({type(error).__name__}: {told})")

        return test

    return decorate


def report(message):
    """Warn in a way that no filter turns into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CanaryWarning)
        warnings.warn(message, CanaryWarning, stacklevel=2)


def pytest_warning_recorded(warning_message):
    """Keep the reports, also those of the other processes of pytest-xdist."""
    if issubclass(warning_message.category, CanaryWarning):
        REPORTS.append(str(warning_message.message))


def pytest_terminal_summary(terminalreporter):
    """A section for the reports, if there are any."""
    if REPORTS:
        terminalreporter.section("canaries")
        for message in dict.fromkeys(REPORTS):
            terminalreporter.line(message)
