"""The run directory: its files, its provenance and its comparison with another."""
