"""The loop, and what makes it exact: schedules, metrics, checkpoints, signals."""
