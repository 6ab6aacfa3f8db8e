"""Run these tests on one thread, like those of tests/explain."""

from tests.explain.conftest import _one_thread  # noqa: F401
