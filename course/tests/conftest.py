"""The course's own options of pytest; and the guard, where course.judge runs the tests."""

import pytest

from course import contain
from routers import get_router


def pytest_addoption(parser):
    parser.addoption("--router", help="FILE.py:Class to be judged, instead of all that are known")
    parser.addoption("--assignment", type=int, help="test_assignments.py: judge this one alone")


def pytest_configure(config):
    config.refused = contain.guard_tests()  # before the submission is imported
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
        if item.config.refused:  # the submission may have caught the error
            spec = item.config.getoption("--router")
            pytest.fail(f"{spec}{item.config.refused[0]}", pytrace=False)
