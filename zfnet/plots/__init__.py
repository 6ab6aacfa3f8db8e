"""One figure style and palette, drawing that several files share, and the figures of a training."""
