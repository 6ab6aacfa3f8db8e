"""The commands that are no analysis, one file per job: its settings and its `main`."""
