"""Many runs at once: a grid or Optuna's search, and the summary of a sweep directory."""
