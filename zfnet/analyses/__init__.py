"""The analyses. Each file contains one analysis: its settings, measurement, figure and command."""
