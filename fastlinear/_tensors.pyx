# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""What a tensor is to the kernels: looked at once, without a header of torch's.

It is read through the C table that torch.Tensor publishes (``__dlpack_c_exchange_api__``, DLPack 1.3), or through its
Python attributes where torch is too old to have one.
"""

import torch

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int64_t


cdef object Tensor = torch.Tensor
cdef dict dtype_of_format = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "w8f": torch.int8, "int8": torch.int8,
    "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int4": torch.uint8,
    "int8g": torch.int8, "e8m0": torch.float8_e8m0fnu, "uint6": torch.uint8, "fp8": torch.float8_e4m3fn,
}


cdef str format_name(size_t format):
    return format_at(format).name.decode()


cdef list all_formats():
    cdef list names = []
    while format_at(len(names)) != NULL:
        names.append(format_name(len(names)))
    return names


cdef tuple dtypes = tuple(dtype_of_format[name] for name in all_formats())  # by Format


cdef object dtype_of(size_t format):
    return dtypes[format]


FORMATS = {dtypes[i]: format_name(i) for i in range(len(dtypes)) if format_at(i).floating}
PACKED = {format_name(i): dtypes[i] for i in range(len(dtypes))
          if format_at(i).pack != NULL and not format_at(i).grouped}
# What weights in groups may be scaled by: floats, and what of each 256 k an fp16 multiplies (formats/scales.hpp).
SCALES = {**FORMATS, torch.float8_e8m0fnu: "e8m0", torch.int8: "int8", torch.uint8: "uint6"}
SUPER = 256  # k that share the fp16 by which small integers scale their groups
GROUPED = {format_name(i): dtypes[i] for i in range(len(dtypes)) if format_at(i).grouped}
cdef dict formats_of_x = {dtypes[i]: i for i in range(len(dtypes)) if format_at(i).floating} | {
    torch.int8: INT8, torch.uint8: UINT8
}


# Of x, whose int8 is not that of a weight; ValueError for a dtype that no kernel reads.
cdef int format_of_x(object dtype) except -1:
    if dtype not in formats_of_x:
        raise ValueError(f"no kernel reads x of {dtype}")
    return formats_of_x[dtype]


# DLPack's codes: 0 and 1 are integers with and without a sign, 2 is IEEE floating point, 4 is bfloat. Negative for what
# no kernel reads.
cdef inline int format_of(DlDataType t) noexcept:
    if t.bits == 8:
        return INT8 if t.code == 0 else UINT8 if t.code == 1 else -1
    if t.code == 2:
        return FP32 if t.bits == 32 else FP16 if t.bits == 16 else -1
    return BF16 if t.code == 4 and t.bits == 16 else -1


cdef DlExchangeApi* find_exchange_api():
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return NULL
    api = <DlExchangeApi*> PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
    return api if api.major == 1 else NULL


cdef DlExchangeApi* exchange_api = find_exchange_api()


# False where `tensor` is not a dense CPU tensor of one of our formats with memory behind it. Callers have seen that it
# is exactly a torch.Tensor or an nn.Parameter, since subclasses may not mean what their storage says, and that it is no
# negative view, which does not either and says so only by is_neg().
cdef bint look_at(object tensor, View* v):
    cdef DlTensor t
    cdef int i
    cdef int64_t elements = 1
    if exchange_api == NULL:
        return look_at_slowly(tensor, v)
    try:
        if exchange_api.peek(<void*> tensor, &t) != 0:
            raise
    except Exception:  # sparse, quantized, functorch-wrapped, meta ...: whatever DLPack refuses
        return False
    cdef int format = format_of(t.dtype)
    if t.device.device_type != 1 or format < 0 or t.ndim > MAX_DIMS:
        return False
    v.data = <char*> t.data + t.byte_offset
    v.format = <Format> format
    v.ndim = t.ndim
    for i in range(t.ndim - 1, -1, -1):
        v.shape[i] = t.shape[i]
        v.stride[i] = elements if t.strides == NULL else t.strides[i]  # until DLPack 1.2 NULL said "contiguous"
        elements *= t.shape[i]
    return t.data != NULL or elements == 0


cdef bint look_at_slowly(object tensor, View* v):
    cdef int i
    if (tensor.dtype not in formats_of_x or tensor.device.type != "cpu" or tensor.layout is not torch.strided
            or tensor.is_nested or tensor.dim() > MAX_DIMS):
        return False
    v.data = <char*> <size_t> tensor.data_ptr()
    i = format_of_x(tensor.dtype)
    v.format = <Format> i
    v.ndim = tensor.dim()
    for i in range(v.ndim):
        v.shape[i] = tensor.size(i)
        v.stride[i] = tensor.stride(i)
    return v.data != NULL or tensor.numel() == 0


# Folds all dimensions but the last into rows a constant stride apart; False where the memory has no such form.
cdef bint as_rows(View* v, Matrix* rows) noexcept:
    cdef int i
    cdef int last = v.ndim - 1
    rows.data, rows.format, rows.m, rows.stride = v.data, v.format, 1, v.shape[last]
    for i in range(last):
        rows.m *= v.shape[i]
    if rows.m == 0 or v.shape[last] == 0:
        return True
    if v.stride[last] != 1:
        return False
    cdef int64_t expected = -1
    for i in range(last - 1, -1, -1):
        if v.shape[i] == 1:
            continue
        if expected == -1:
            rows.stride = v.stride[i]
        elif v.stride[i] != expected:
            return False
        expected = v.stride[i] * v.shape[i]
    return True


cdef View need(object tensor, str what, bint integers=False) except *:
    cdef View v
    fit = type(tensor) in (Tensor, torch.nn.Parameter) and look_at(tensor, &v) and not tensor.is_neg()
    if not fit or not (integers or is_float(v.format)):
        allowed = " or ".join([*FORMATS.values(), *(["int8", "uint8"] if integers else [])])
        raise TypeError(f"{what} must be a dense {allowed} CPU tensor, not {describe(tensor)}")
    return v


# Numbers beside a weight, one for each of `n` channels or columns.
cdef object need_vector(object values, object dtype, ptrdiff_t n, str what):
    fit = isinstance(values, Tensor) and values.dtype is dtype and values.shape == (n,) and values.device.type == "cpu"
    if not fit:
        raise ValueError(f"{what} must be a {dtype} CPU tensor of shape ({n},), not {describe(values)}")
    return values.detach().contiguous()


# Scales and the like of a weight in groups.
cdef object need_groups(object values, object dtype, tuple shape, str what):
    fit = isinstance(values, Tensor) and values.dtype is dtype and values.shape == shape and values.device.type == "cpu"
    if not fit:
        raise ValueError(f"{what} must be a {dtype} CPU tensor of shape {shape}, not {describe(values)}")
    return values.detach().contiguous()


cdef str describe(object value):
    if not isinstance(value, Tensor) or value.is_nested:
        return f"a {'nested tensor' if isinstance(value, Tensor) else type(value).__name__}"
    return f"a {value.dtype} {value.layout} {type(value).__name__} of shape {tuple(value.shape)} on {value.device}"
