"""Kernels that break the rules of machine code on purpose, and their better twins; prints what each rule says of them, as JSON.

A script of its own, because where TRITON_INTERPRET is set the kernels are the interpreter's.
"""

import json
import sys

import triton
import triton.language as tl

from qgnn.kernels.gpu.common import EXACT, CompileCase
from qgnn.perf.static.compiler import compiled_case
from qgnn.perf.static.rules import RULES


@triton.jit
def _sum_kernel(p_out, p_x, n, stride, FLOAT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr):
    """Column sums of int8, added as float32 or as int32."""
    o_f = tl.arange(0, BLOCK_F)
    b_sum = tl.zeros((BLOCK_E, BLOCK_F), tl.float32 if FLOAT else tl.int32)
    for i in range(0, n, BLOCK_E):
        p_row = p_x + (i + tl.arange(0, BLOCK_E))[:, None] * stride
        b_sum += tl.load(p_row + o_f[None, :]).to(b_sum.dtype)
    tl.store(p_out + o_f, tl.sum(b_sum, axis=0).to(tl.float32))


@triton.jit
def _product_kernel(p_out, p_x, p_w, K, stride, FLOAT: tl.constexpr, IN_OUT: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of x w^T, w stored [out, in], or [in, out]."""
    o_n, o_k = tl.arange(0, BLOCK), tl.arange(0, 64)
    b_acc = tl.zeros((BLOCK, BLOCK), tl.float32 if FLOAT else tl.int32)
    for i_k in range(0, K, 64):
        b_x = tl.load(p_x + o_n[:, None] * stride + i_k + o_k[None, :])
        if IN_OUT:
            b_w = tl.load(p_w + (i_k + o_k)[:, None] * stride + o_n[None, :])
        else:
            b_w = tl.trans(tl.load(p_w + o_n[:, None] * stride + i_k + o_k[None, :]))
        b_acc = tl.dot(b_x, b_w, b_acc, out_dtype=b_acc.dtype)
    tl.store(p_out + o_n[:, None] * BLOCK + o_n[None, :], b_acc)


def summed(name: str, stride: str, float_sums: bool, **options: int) -> CompileCase:
    types = {"p_out": "*fp32", "p_x": "*i8", "n": "i32", "stride": stride}
    fixed = {"FLOAT": float_sums, "BLOCK_E": 16, "BLOCK_F": 128}
    return CompileCase(name, _sum_kernel, types, fixed, {**EXACT, "num_warps": 1, **options})


def multiplied(name: str, float_operands: bool, in_out: bool) -> CompileCase:
    kind = "fp16" if float_operands else "i8"
    types = {"p_out": "*fp32" if float_operands else "*i32", "p_x": f"*{kind}", "p_w": f"*{kind}", "K": "i32:16"}
    fixed = {"FLOAT": float_operands, "IN_OUT": in_out, "BLOCK": 64}
    return CompileCase(name, _product_kernel, {**types, "stride": "i32:16"}, fixed, EXACT)


CASES = [
    summed("sum", "i32:16", False),
    summed("sum, unknown stride", "i32", False),
    summed("sum, as floats", "i32:16", True),
    summed("sum, few registers", "i32:16", False, maxnreg=32),
    multiplied("product", False, False),
    multiplied("product, fp16", True, False),
    multiplied("product, [in, out]", False, True),
]

if __name__ == "__main__":
    rows = [compiled_case("breaking_kernels", case, target) for case in CASES for target in sys.argv[1:]]
    said = {rule.name: {f"{row.case} on {row.target}": rule.broken(row) for row in rows} for rule in RULES}
    json.dump({"errors": [row.error for row in rows if row.error], "said": said}, sys.stdout)
