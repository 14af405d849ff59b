"""The course's own options of pytest."""


def pytest_addoption(parser):
    parser.addoption("--router", help="FILE.py:Class to be judged, instead of all that are known")
    parser.addoption("--assignment", type=int, help="test_assignments.py: judge this one alone")
