"""The course's own options of pytest."""

import pytest

from routers import get_router


def pytest_addoption(parser):
    parser.addoption("--router", help="FILE.py:Class to be judged, instead of all that are known")
    parser.addoption("--assignment", type=int, help="test_assignments.py: judge this one alone")


def pytest_configure(config):
    if spec := config.getoption("--router"):
        try:
            get_router(spec)
        except ValueError as error:  # no such file or class
            raise pytest.UsageError(f"--router: {error}") from error
        except (Exception, SystemExit):  # what the file itself raises, its tests show
            pass
