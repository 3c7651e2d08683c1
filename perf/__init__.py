"""Benchmarks, roofline and static checks of compiled kernels, imported as ``qgnn.perf``; results lie in ``results/*.csv``."""
