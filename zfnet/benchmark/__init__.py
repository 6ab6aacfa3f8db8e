"""Timing: this loop beside others, on the same network and the same images, in turns."""
