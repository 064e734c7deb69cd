"""Parts of `examples/compare.py`: settings, data, training, evaluation, and the report."""
