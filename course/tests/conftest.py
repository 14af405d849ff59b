"""The course's own options of pytest; and the guard, where course.judge runs the tests."""

import os

import pytest

from course import contain
from routers import get_router


def pytest_addoption(parser):
    parser.addoption("--router", help="FILE.py:Class to be judged, instead of all that are known")
    parser.addoption("--assignment", type=int, help="test_assignments.py: judge this one alone")


def pytest_configure(config):
    config.refused = contain.guard_tests()  # before the submission is imported
    config.before = contain.snapshot() if contain.FOLDER in os.environ else {}
    if spec := config.getoption("--router"):
        try:
            get_router(spec)
        except ValueError as error:  # no such file or class
            raise pytest.UsageError(f"--router: {error}") from error
        except (Exception, SystemExit):  # what the file itself raises, its tests show
            pass
    if spec or config.getoption("--assignment"):
        config.option.reportchars += "s"  # print why a check was skipped


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    finally:
        found = item.config.refused  # the submission may have caught the error
        if not found and (names := contain.changed(item.config.before)):
            found.append(f": changed {names[0]}, which is not part of the router")
        if found:
            pytest.fail(f"{item.config.getoption('--router')}{found[0]}", pytrace=False)
