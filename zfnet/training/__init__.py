"""The training loop, with its schedules, metrics, checkpoints, callbacks and loggers."""
