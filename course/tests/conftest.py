"""The course's own options of pytest, and the tiny models of the other tests."""

from tests.conftest import _build, _collate, _shake  # noqa: F401


def pytest_addoption(parser):
    parser.addoption("--router", help="FILE.py:Class to be judged, instead of all that are known")
    parser.addoption("--assignment", type=int, help="test_assignments.py: judge this one alone")
