"""Triton kernels and their launchers, one file per operation of ``qgnn.kernels``."""
