"""What a command can do beside an analysis, one job a file: its settings and its `main`."""
