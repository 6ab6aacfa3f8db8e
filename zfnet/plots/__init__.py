"""The figure style and palette, shared drawing functions, and the figures of a training run."""
