"""Many runs at once: what a sweep directory says as a whole, and Optuna's search over settings."""
