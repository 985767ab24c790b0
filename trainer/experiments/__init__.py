"""Cross-validation and hyper-parameter search."""
