"""Everything that is drawn: figures and TensorBoard."""
