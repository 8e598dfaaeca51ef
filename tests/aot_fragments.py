"""Kernels on which the checks of ``aot`` are proved: some that pass them all, and one for each check that must fail."""

import triton
import triton.language as tl

from clora_kernels.kernels.declared import Compilation, Expects


@triton.jit
def tile_of(ptr, stride, rows, columns, mask_rows, mask_columns):
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    return tl.load(ptrs, mask_rows[:, None] & mask_columns[None, :], other=0.0)


@triton.jit
def gemm(
    x_ptr, w_ptr, q_ptr, c_ptr, y_ptr, M, N, K, R,
    stride_xm, stride_wk, stride_qm, stride_cr, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x·w + q·c, the rank tile after the K loop."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tile_of(x_ptr, stride_xm, offs_m, offs_k, mask_m, offs_k < K)
        w = tile_of(w_ptr, stride_wk, offs_k, offs_n, offs_k < K, mask_n)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    q = tile_of(q_ptr, stride_qm, offs_m, offs_r, mask_m, mask_r)
    c = tile_of(c_ptr, stride_cr, offs_r, offs_n, mask_r, mask_n)
    acc = tl.dot(q, c, acc, input_precision=PRECISION)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y, mask_m[:, None] & mask_n[None, :])


@triton.jit
def gemm_with_branch(
    x_ptr, w_ptr, q_ptr, c_ptr, y_ptr, M, N, K, R,
    stride_xm, stride_wk, stride_qm, stride_cr, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum with the rank tile as one more turn of the K loop: the loads stand in a branch and lose their buffers."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K + BLOCK_K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        if k < K:
            left = tile_of(x_ptr, stride_xm, offs_m, offs_k, mask_m, offs_k < K)
            right = tile_of(w_ptr, stride_wk, offs_k, offs_n, offs_k < K, mask_n)
        else:
            offs_r = tl.arange(0, BLOCK_K)
            left = tile_of(q_ptr, stride_qm, offs_m, offs_r, mask_m, offs_r < R)
            right = tile_of(c_ptr, stride_cr, offs_r, offs_n, offs_r < R, mask_n)
        acc = tl.dot(left, right, acc)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y, mask_m[:, None] & mask_n[None, :])


@triton.jit
def persistent_gemm(
    x_desc, w_desc, q_desc, c_desc, y_desc, M, N, K,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x·wᵀ + q·c by TMA, the loops over tiles and over K made one."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, PROGRAMS, flatten=True):
        m, n = (tile // tiles_n) * BLOCK_M, (tile % tiles_n) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc)
        acc = tl.dot(q_desc.load([m, 0]), c_desc.load([0, n]), acc)
        y_desc.store([m, n], acc.to(y_desc.dtype))


@triton.jit
def two_sums(x_ptr, y_ptr, M, N, stride_xm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Both moments of every element of a row block kept in registers: more than there are."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m in range(0, M, BLOCK_M):
        x = tile_of(x_ptr, stride_xm, m + offs_m, offs_n, m + offs_m < M, offs_n < N).to(tl.float32)
        first += x
        second += x * x
    tl.store(y_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], first * second)


@triton.jit
def broken(x_ptr, y_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds vectors of different lengths."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK_M))
    tl.store(y_ptr + tl.arange(0, BLOCK_M), x + tl.arange(0, BLOCK_N))


def _gemm(kernel, dtype="*bf16", expects=None, stages=3, **constants):
    constants = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_R": 16, "PRECISION": "ieee"} | constants
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: dtype if name.endswith("_ptr") else "i32" for name in kernel.arg_names if name not in constants}
    return Compilation(kernel, signature, constants, num_warps=8, num_stages=stages, expects=expects or Expects())


_DESCRIPTORS = {
    "x_desc": (128, 64),
    "w_desc": (128, 64),
    "q_desc": (128, 16),
    "c_desc": (16, 128),
    "y_desc": (128, 128),
}
_PERSISTENT = Compilation(
    persistent_gemm,
    {name: f"tensordesc<bf16[{rows}, {columns}]>" for name, (rows, columns) in _DESCRIPTORS.items()}
    | {name: "i32" for name in "MNK"},
    {"PROGRAMS": 132, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64},
    num_warps=8,
    expects=Expects(single_buffered=("q_desc", "c_desc")),
    architectures=(90,),
)
_FP32 = {"dtype": "*fp32", "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}

FRAGMENTS = {
    "good": _gemm(gemm),
    "good by TMA": _PERSISTENT,
    "good in fp32": _gemm(gemm, expects=Expects(wgmma=False), **_FP32),
    "tf32 wanted": _gemm(gemm, expects=Expects(tf32=True), PRECISION="tf32", **_FP32),
    "tf32 unwanted": _gemm(gemm, PRECISION="tf32", **_FP32),
    "single buffer": _gemm(gemm_with_branch),
    "too much shared memory": _gemm(gemm, stages=8),
    "without wgmma": _gemm(gemm, BLOCK_M=32),
    "spilled": Compilation(
        two_sums,
        {"x_ptr": "*bf16", "y_ptr": "*fp32", "M": "i32", "N": "i32", "stride_xm": "i32"},
        {"BLOCK_M": 128, "BLOCK_N": 256},
        architectures=(90,),
    ),
    "does not compile": Compilation(
        broken, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK_M": 64, "BLOCK_N": 128}, architectures=(90,)
    ),
}
FAILS = {
    "tf32 unwanted": {(80, "tf32"), (90, "tf32")},
    "single buffer": {(80, "buffers"), (90, "buffers")},
    "too much shared memory": {(80, "shared"), (90, "shared")},
    "without wgmma": {(90, "wgmma")},
    "spilled": {(90, "spill")},
    "does not compile": {(90, "compile")},
}
COMPILATIONS = list(FRAGMENTS.values())
