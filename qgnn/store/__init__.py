"""Node features in few bits, in memory or in a file, for PyG's loaders."""

from .features import QuantizedFeatureStore

__all__ = ["QuantizedFeatureStore"]
