"""Quantizers: the modules that hold steps, widths and ranges, and learn them during training."""
