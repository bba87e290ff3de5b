"""Inner loops for numba kernels that LLVM does not vectorise well by itself, written as LLVM's vector code.

The vectors have a fixed width; LLVM splits them for machines with narrower registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

INDEX = ir.IntType(64)
FLOAT = ir.FloatType()


def make_tile(rows: int, columns: int) -> Callable[..., None]:
    """A function for numba kernels that adds ``A @ B`` to a block of ``C``, which stays in registers meanwhile.

    It takes three contiguous float32 arrays of any shape, each followed by the flat index where its matrix begins and
    the distance of the matrix's rows: ``(a, a_at, a_stride, b, b_at, b_stride, c, c_at, c_stride, depth)``, integers
    int64. A is [rows, depth], B [depth, columns], C [rows, columns]. Nothing is checked.

    Args:
        rows: of C.
        columns: of C.
    """
    vector = ir.VectorType(FLOAT, columns)
    undefined = ir.Constant(vector, ir.Undefined)
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), columns), [0] * columns)
    fma_type = ir.FunctionType(vector, [vector] * 3)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        arrays = [context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 3, 6)]
        (a, b, c), (a_at, b_at, c_at), (a_stride, b_stride, c_stride) = arrays, arguments[1:9:3], arguments[2:9:3]
        fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{columns}f32")

        def vector_at(array: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(array, [index]), vector.as_pointer())

        def row_at(start: Any, stride: Any, row: int) -> Any:
            return builder.add(start, builder.mul(stride, ir.Constant(INDEX, row)))

        a_rows = [row_at(a_at, a_stride, row) for row in range(rows)]
        c_rows = [vector_at(c, row_at(c_at, c_stride, row)) for row in range(rows)]
        sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]  # LLVM makes registers of them
        for sum_, source in zip(sums, c_rows, strict=True):
            builder.store(builder.load(source, align=4), sum_)
        with cgutils.for_range(builder, arguments[9]) as loop:
            start = builder.add(b_at, builder.mul(b_stride, loop.index))
            b_row = builder.load(vector_at(b, start), align=4)
            for sum_, a_row in zip(sums, a_rows, strict=True):
                factor = builder.load(builder.gep(a, [builder.add(a_row, loop.index)]))
                factors = builder.insert_element(undefined, factor, ir.Constant(ir.IntType(32), 0))
                factors = builder.shuffle_vector(factors, undefined, everywhere)
                builder.store(builder.call(fma, [factors, b_row, builder.load(sum_)]), sum_)
        for sum_, target in zip(sums, c_rows, strict=True):
            builder.store(builder.load(sum_), target, align=4)

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing, a, a_at, a_stride, b, b_at, b_stride, c, c_at, c_stride, depth):  # type: ignore[no-untyped-def]
        indices = [types.int64] * 2
        signature = types.void(a, *indices, b, *indices, c, *indices, types.int64)
        return signature, generate

    return tile  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(typing, bits):  # type: ignore[no-untyped-def]
    """The float32 with these bits (an int32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def maximum(typing, values, start, count, least):  # type: ignore[no-untyped-def]
    """The largest of ``least`` (float32) and ``count`` elements (a multiple of 8) of a contiguous float32 array."""
    width = 8
    vector = ir.VectorType(FLOAT, width)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        start, count, least = arguments[1:]
        best = cgutils.alloca_once(builder, vector)
        lanes = ir.Constant(vector, ir.Undefined)
        for lane in range(width):
            lanes = builder.insert_element(lanes, least, ir.Constant(ir.IntType(32), lane))
        builder.store(lanes, best)
        with cgutils.for_range(builder, builder.udiv(count, ir.Constant(INDEX, width))) as loop:
            at = builder.add(start, builder.mul(loop.index, ir.Constant(INDEX, width)))
            found = builder.load(builder.bitcast(builder.gep(array, [at]), vector.as_pointer()), align=4)
            known = builder.load(best)
            builder.store(builder.select(builder.fcmp_ordered(">", found, known), found, known), best)
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(FLOAT, [vector]), f"llvm.vector.reduce.fmax.v{width}f32"
        )
        return builder.call(reduce, [builder.load(best)])

    return types.float32(values, types.int64, types.int64, types.float32), generate
