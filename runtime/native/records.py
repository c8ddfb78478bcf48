"""The records of ``transom.h`` as ctypes structures, in its order; ``transom_layout`` is compared with RECORDS.

Fields mean what transom.h says of them. Pointers are addresses: what they point to must be kept by its owner for as
long as the record is used. The dry call (``dry_call.py``) loads this file by its path: it imports ctypes alone.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

ABI = 1  # TRANSOM_ABI
NONE = -1  # no slot
TABLES = 4  # of one embedding, at most
PLAIN, AVX2, AVX512_VNNI, AVX512_BF16 = range(4)
ISA_NAMES = ("plain", "avx2", "avx512_vnni", "avx512_bf16")  # by their numbers
TOKENS, SEQUENCES, POSITIONS, PATCHES = range(4)  # rows
IDENTITY, RELU, GELU, GELU_TANH, QUICK_GELU, SILU, TANH = range(7)  # activations
NO_NORM, LAYER_NORM, RMS_NORM, L2_NORM = range(4)
F32, F16, U8, S8 = range(4)  # dtypes
IN_F32, IN_BF16 = range(2)  # arithmetic of attention
LINEAR, ATTENTION, EMBED, PATCHES_OF, PREPEND, SELECT, POOL, UNPACK = range(8)  # kinds of operators


class Matrix(Structure):
    """A packed weight (k, n): ``transom_matrix``."""

    _fields_ = (
        ("k", c_int32),
        ("n", c_int32),
        ("dtype", c_int32),
        ("reserved", c_int32),
        ("panels", c_void_p),
        ("scale", c_void_p),
        ("column_sum", c_void_p),
    )


class Epilogue(Structure):
    """``transom_epilogue``: see no_epilogue."""

    _fields_ = (
        ("bias", c_void_p),
        ("activation", c_int32),
        ("residual", c_int32),
        ("norm", c_int32),
        ("epsilon", c_float),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("sum", c_int32),
        ("out", c_int32),
        ("quantized", c_int32),
        ("row_scale", c_int32),
        ("inverse_scale", c_void_p),
        ("multiplier", c_void_p),
        ("zero_point", c_int32),
        ("reserved", c_int32),
    )


class Linear(Structure):
    """``transom_linear``."""

    _fields_ = (
        ("rows", c_int32),
        ("input", c_int32),
        ("row_scale", c_int32),
        ("zero_point", c_int32),
        ("matrix", Matrix),
        ("then", Epilogue),
    )


class Attention(Structure):
    """``transom_attention``."""

    _fields_ = (
        ("query", c_int32),
        ("key", c_int32),
        ("value", c_int32),
        ("query_stride", c_int32),
        ("key_stride", c_int32),
        ("value_stride", c_int32),
        ("query_column", c_int32),
        ("key_column", c_int32),
        ("value_column", c_int32),
        ("heads", c_int32),
        ("key_heads", c_int32),
        ("head_dim", c_int32),
        ("scale", c_float),
        ("causal", c_int32),
        ("key_cache", c_int32),
        ("value_cache", c_int32),
        ("cross_key", c_int32),
        ("cross_value", c_int32),
        ("arithmetic", c_int32),
        ("scores", c_int32),
        ("then", Epilogue),
    )


class Embed(Structure):
    """``transom_embed``."""

    _fields_ = (
        ("count", c_int32),
        ("columns", c_int32),
        ("table", c_void_p * TABLES),
        ("dtype", c_int32 * TABLES),
        ("ids", c_int32 * TABLES),
        ("scale", c_float * TABLES),
        ("then", Epilogue),
    )


class Patches(Structure):
    """``transom_patches``."""

    _fields_ = (
        ("input", c_int32),
        ("channels", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("patch_height", c_int32),
        ("patch_width", c_int32),
        ("then", Epilogue),
    )


class Prepend(Structure):
    """``transom_prepend``."""

    _fields_ = (
        ("input", c_int32),
        ("columns", c_int32),
        ("patches", c_int32),
        ("reserved", c_int32),
        ("first", c_void_p),
        ("position", c_void_p),
        ("then", Epilogue),
    )


class Select(Structure):
    """``transom_select``."""

    _fields_ = (
        ("rows", c_int32),
        ("input", c_int32),
        ("index", c_int32),
        ("columns", c_int32),
        ("then", Epilogue),
    )


class Pool(Structure):
    """``transom_pool``."""

    _fields_ = (("input", c_int32), ("columns", c_int32), ("then", Epilogue))


class Unpack(Structure):
    """``transom_unpack``."""

    _fields_ = (
        ("input", c_int32),
        ("stride", c_int32),
        ("column", c_int32),
        ("columns", c_int32),
        ("heads", c_int32),
        ("out", c_int32),
    )


class Operator(Structure):
    """``transom_operator``: the kind and the address of its record."""

    _fields_ = (("kind", c_int32), ("reserved", c_int32), ("record", c_void_p))


class Run(Structure):
    """``transom_run``. ``rows`` is by TOKENS, SEQUENCES, POSITIONS, PATCHES."""

    _fields_ = (
        ("slots", c_void_p),
        ("rows", c_int64 * 4),
        ("first_row", c_void_p),
        ("column", c_void_p),
        ("key_valid", c_void_p),
        ("past", c_void_p),
        ("cross_valid", c_void_p),
        ("capacity", c_int32),
        ("cross_length", c_int32),
        ("padded_length", c_int32),
        ("threads", c_int32),
    )


RECORDS = (Linear, Attention, Embed, Patches, Prepend, Select, Pool, Unpack, Operator, Run)
KIND_OF = {record: kind for kind, record in enumerate(RECORDS[:8])}


def no_epilogue() -> Epilogue:
    """Return an epilogue that does nothing: every slot is NONE."""
    return Epilogue(residual=NONE, sum=NONE, out=NONE, quantized=NONE, row_scale=NONE)


def operators_of(records: list[Structure]) -> ctypes.Array[Operator]:
    """Return the operators of records in order; the records must be kept as long as they are used."""
    return (Operator * len(records))(
        *(Operator(kind=KIND_OF[type(each)], record=ctypes.addressof(each)) for each in records)
    )


def declare(library: ctypes.CDLL) -> None:
    """Say what the functions of the library take and return.

    Raises AttributeError where one is missing.
    """
    address = c_void_p
    library.transom_abi.argtypes, library.transom_abi.restype = (), c_int32
    library.transom_layout.argtypes, library.transom_layout.restype = (address,), None
    library.transom_compiler.argtypes, library.transom_compiler.restype = (), ctypes.c_char_p
    library.transom_sources.argtypes, library.transom_sources.restype = (), ctypes.c_char_p
    library.transom_supports.argtypes, library.transom_supports.restype = (c_int32,), c_int32
    library.transom_execute.argtypes, library.transom_execute.restype = (c_int32, address, c_int32, address), c_int32
    library.transom_packed_bytes.argtypes, library.transom_packed_bytes.restype = (c_int32,) * 4, c_int64
    library.transom_pack.argtypes = (
        *(c_int32,) * 6,  # isa, dtype, k, n, column, n_part
        *(address, c_int32, c_int64, c_int32),  # source, its dtype, its stride, whether it is transposed
        *(address, address),  # panels, column_sum
    )
    library.transom_pack.restype = None
    library.transom_attention_scratch.argtypes = (c_int32, address, c_int32)
    library.transom_attention_scratch.restype = c_int64


def mismatch(library: ctypes.CDLL) -> str | None:
    """Return why a declared library is not the one that these records are of; None where it is."""
    abi = library.transom_abi()
    if abi != ABI:
        return f"its interface is version {abi}, this package needs version {ABI}"
    sizes = (c_int32 * len(RECORDS))()
    library.transom_layout(sizes)
    ours = [ctypes.sizeof(record) for record in RECORDS]
    if list(sizes) != ours:
        return f"its records take {list(sizes)} bytes, those of this package {ours}"
    return None
