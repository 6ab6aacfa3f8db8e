"""Analyses of tiny networks run on one thread, as the explanations do."""

from tests.explain.conftest import _one_thread  # noqa: F401
