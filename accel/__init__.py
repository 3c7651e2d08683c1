"""Simulator of the A²Q bit-serial accelerator, imported as ``qgnn.accel``: numpy only, no torch, nothing of qgnn."""
