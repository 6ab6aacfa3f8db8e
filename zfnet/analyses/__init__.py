"""One file per analysis: its settings, measurement, figure and command."""
