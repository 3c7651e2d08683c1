"""Training by the processes that ``torchrun`` starts: shared batches, or one graph in parts with quantized halo exchange."""

from .group import WorkerLost, joined, processes, rank, same, speaks
from .training import train

__all__ = ["WorkerLost", "joined", "processes", "rank", "same", "speaks", "train"]
