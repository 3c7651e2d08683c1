"""Compiles every Triton kernel ahead of time, without a GPU, and checks what the compiler made of it.

Each file of ``qgnn.kernels.gpu`` lists its kernels, with the types and block sizes they are launched with, in ``COMPILE_CASES``: one for every
configuration that a launch can take. Each is compiled for each target; its machine code is read for registers, stack (spills), shared memory, the
widest global load, and for the instructions of the inner loops: integer matrix instructions, conversions to float, and instructions per element.
:mod:`.rules` says what has to hold and why; :mod:`qgnn.perf.bounds` predicts times from it.

``python -m qgnn.perf.static`` prints the tables, and see ``--help``; :func:`report` adds the predicted bounds. TRITON_INTERPRET must not be set: the
interpreter replaces the compiler.
"""

from .compiler import TARGETS, Compiled, compile_kernel
from .table import report

__all__ = ["TARGETS", "Compiled", "compile_kernel", "report"]
