"""The commands other than analyses, one file per job with its settings and its `main`."""
