"""Numba kernels, one file per operation of ``qgnn.kernels``."""
