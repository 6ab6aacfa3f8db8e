"""Sweeps over many runs: a grid or Optuna's search, and the summary of a sweep directory."""
