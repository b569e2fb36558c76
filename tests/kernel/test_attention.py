"""The native attention, and the rotation and write to its cache, against fp64 on every ISA that runs here; and what
they do not take."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from guard import guarded
from torch import Tensor

import fastlinear._attention as _attention
import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
from fastlinear.plan.attention import rounding_kernels
from fastlinear.spec import attention as spec

DTYPES = list(_tensors.FORMATS)
# B, H, G, L, S, D: around vectors and tiles of every ISA, the head sizes of models, and groups of heads
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 5, 7, 8),
    (1, 3, 1, 33, 29, 20),
    (2, 2, 2, 16, 17, 32),
    (1, 2, 1, 17, 31, 48),
    (1, 1, 1, 40, 70, 64),
    (1, 2, 2, 9, 33, 80),
    (1, 1, 1, 32, 15, 96),
    (1, 1, 1, 3, 16, 128),
    (2, 10, 1, 2, 40, 72),
]
LONG = (1, 1, 1, 65, 200, 64)  # several tiles of queries, many of keys
MASKS = ("none", "causal", "padding", "filled", "bool", "additive", "by head", "by query of a batch")


def isas() -> list[str]:
    """Those with vectors of their own that may run here."""
    found, one = [], torch.ones(1, 1, 1, 1)
    for isa in _kernels.isas():
        try:
            _attention.attention(one, one, one, isa=isa)
        except ValueError:
            continue
        found.append(isa)
    assert "scalar" in found
    return found


def heads(b: int, h: int, rows: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As a linear layer makes them."""
    return torch.randn(b, rows, h * size).to(dtype).view(b, rows, h, size).transpose(1, 2)


def mask_of(kind: str, b: int, h: int, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    return {
        "none": None,
        "causal": None,
        "padding": torch.rand(b, 1, 1, keys) < 0.7,
        "filled": (torch.arange(keys) < 2 * keys // 3) & (torch.arange(keys) >= torch.arange(b).view(b, 1, 1, 1)),
        "bool": torch.rand(queries, keys) < 0.7,
        "additive": torch.randn(b, 1, 1, keys).expand(b, 1, queries, keys),
        "by head": torch.randn(1, h, queries, keys).to(dtype),
        "by query of a batch": torch.where(torch.rand(b, 1, queries, keys) < 0.7, 0.0, torch.finfo(dtype).min).to(
            dtype
        ),
    }[kind]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", MASKS)
def test_attention_is_within_the_bound(isa: str, kind: str) -> None:
    """Each shape, dtype and mask; where a query sees nothing its output is 0."""
    for (b, h, g, queries, keys, size), dtype in itertools.product(SHAPES, DTYPES):
        q, k, v = heads(b, h, queries, size, dtype), heads(b, g, keys, size, dtype), heads(b, g, keys, size, dtype)
        mask, causal = mask_of(kind, b, h, queries, keys, dtype), kind == "causal"
        y = _attention.attention(q, k, v, mask, causal, None, True, isa)
        assert y is not None and y.dtype is dtype and y.shape == q.shape and y.transpose(1, 2).is_contiguous()
        want, bound = spec.exact(q, k, v, mask, causal)
        assert ((y.double() - want).abs() <= bound).all(), (dtype, b, h, g, queries, keys, size)


def softened(h: int) -> list[dict[str, Any]]:
    """Sinks of heads, below and above all scores too, a cap, and both."""
    sinks = torch.randn(h) * 2
    sinks[-1] = 30.0
    return [{"sinks": sinks - 100.0}, {"sinks": sinks}, {"cap": 0.7}, {"sinks": sinks, "cap": 3.0}]


@pytest.mark.parametrize("isa", isas())
def test_sinks_and_caps_are_within_the_bound(isa: str) -> None:
    """Each shape with some mask and dtype, the others in turn; a query that sees nothing but its sink gives 0."""
    cases = zip(itertools.product([*SHAPES, LONG], range(4)), itertools.cycle(MASKS), strict=False)
    for i, (((b, h, g, queries, keys, size), which), kind) in enumerate(cases):
        dtype = DTYPES[i % len(DTYPES)]
        q, k, v = heads(b, h, queries, size, dtype), heads(b, g, keys, size, dtype), heads(b, g, keys, size, dtype)
        mask, causal, more = mask_of(kind, b, h, queries, keys, dtype), kind == "causal", softened(h)[which]
        y = _attention.attention(q, k, v, mask, causal, None, True, isa, **more)
        want, bound = spec.exact(q, k, v, mask, causal, **more)
        for found in (y, spec.attention(q, k, v, mask, causal, **more)):
            assert found is not None and ((found.double() - want).abs() <= bound).all(), (i, more)
    q, hidden = heads(1, 2, 40, 8), torch.zeros(40, 40, dtype=torch.bool)
    y = _attention.attention(q, q, q, hidden, isa=isa, sinks=torch.tensor([-3.0, 3.0]))
    assert y is not None and not y.any()


def test_sinks_that_are_left_to_the_caller() -> None:
    """Not one for each head, of another dtype, or far apart."""
    q = heads(1, 2, 5, 8)
    for sinks in (torch.zeros(3), torch.zeros(2, 1), torch.zeros(2).bfloat16(), torch.zeros(4)[::2]):
        assert _attention.attention(q, q, q, sinks=sinks) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_thousands_of_keys(threads: int) -> None:
    """More than a second-level cache holds: the bound is that of as many keys."""
    torch.set_num_threads(threads)
    q, k, v = (heads(1, 2, rows, 64) for rows in (40, 4100, 4100))
    y = _attention.attention(q, k, v)
    want, bound = spec.exact(q, k, v)
    assert y is not None and bool(((y.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("kernel", rounding_kernels())
@pytest.mark.parametrize("kind", MASKS)
def test_products_of_bf16_are_within_their_bound(kernel: str, kind: str) -> None:
    """Each kernel that multiplies bf16, for bf16 and for fp32 that is rounded, and the specification; heads of an odd
    size are computed in fp32, which is within the bound, too, where they hold bf16."""
    cases = itertools.product([*SHAPES, LONG], (torch.bfloat16, torch.float32))
    for i, ((b, h, g, queries, keys, size), dtype) in enumerate(cases):
        q, k, v = heads(b, h, queries, size, dtype), heads(b, g, keys, size, dtype), heads(b, g, keys, size, dtype)
        if size % 2:
            q, k, v = (t.bfloat16().to(dtype) for t in (q, k, v))
        mask, causal = mask_of(kind, b, h, queries, keys, dtype), kind == "causal"
        more = ([{}] * 4 + softened(h))[i % 8]
        y = _attention.attention(q, k, v, mask, causal, None, True, products=kernel, **more)
        assert y is not None and y.dtype is dtype and y.transpose(1, 2).is_contiguous()
        want, bound = spec.exact(q, k, v, mask, causal, products=torch.bfloat16, **more)
        for found in (y, spec.attention(q, k, v, mask, causal, products=torch.bfloat16, **more)):
            assert ((found.double() - want).abs() <= bound).all(), (dtype, b, h, g, queries, keys, size)
        if dtype is torch.float32 and size % 2 == 0 and keys > 1:  # it is rounded indeed
            assert not torch.equal(y, _attention.attention(q, k, v, mask, causal, None, True, **more))


@pytest.mark.parametrize("kernel", rounding_kernels())
def test_products_of_bf16_of_odd_numbers(kernel: str) -> None:
    """A query that sees nothing gives 0, NaN and infinities go where they go in fp32, and nothing is read outside;
    rows of linear layers and two threads give the same bits."""
    q, k, v = heads(1, 2, 37, 32), heads(1, 2, 45, 32), heads(1, 2, 45, 32)
    mask = torch.zeros(37, 45)
    mask[2], mask[3, 4:], mask[4] = -math.inf, -math.inf, torch.finfo(torch.float32).min
    y = _attention.attention(q, k, v, mask, products=kernel)
    assert y is not None and not y[:, :, 2].any()
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, mask), rtol=0.05, atol=0.05)
    odd = v.clone()
    odd[0, 1, 4, 7] = math.nan
    y = _attention.attention(q, k, odd, products=kernel)
    assert y is not None and torch.equal(y.isnan(), F.scaled_dot_product_attention(q, k, odd).isnan())
    odd = k.clone()
    odd[0, 0, 3, 3] = math.nan
    y = _attention.attention(q, odd, v, products=kernel)
    assert y is not None and y[:, 0].isnan().all() and y[:, 1].isfinite().all()
    for dtype, at in itertools.product((torch.float32, torch.bfloat16), ("start", "end")):
        q, k, v = (guarded(torch.randn(1, 1, rows, 22).to(dtype), at) for rows in (19, 35, 35))  # type: ignore[arg-type]
        for mask in (guarded(torch.randn(19, 35), at), guarded(torch.rand(1, 35) < 0.5, at)):  # type: ignore[arg-type]
            y = _attention.attention(q, k, v, mask, products=kernel)
            want = _attention.attention(q.clone(), k.clone(), v.clone(), mask, products=kernel)
            assert y is not None and want is not None and torch.equal(y, want)
    x = torch.randn(2, 150, 3 * 4 * 24).bfloat16()
    parts = x.chunk(3, -1)
    cut = [t.unflatten(-1, (-1, 24)).transpose(1, 2) for t in parts]
    y = _attention.attention(*parts, None, True, rows=(4, 4), products=kernel)
    torch.set_num_threads(2)
    want = _attention.attention(*cut, None, True, products=kernel)
    torch.set_num_threads(1)
    assert y is not None and want is not None and torch.equal(y, want.transpose(1, 2).flatten(2))


def test_products_are_of_kernels_of_bf16() -> None:
    """Another kernel is named, and fp16 is left to the caller."""
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="rows and panels of bf16, not by 'fp32/scalar/4x16'"):
        _attention.attention(q, q, q, products="fp32/scalar/4x16")
    for kernel in rounding_kernels():
        assert _attention.attention(*[q.half()] * 3, products=kernel) is None


def test_the_specification_and_torch_are_within_the_bound() -> None:
    """Plain torch in fp32, and torch's own attention, are held to the same bound."""
    for kind in MASKS:
        q, k, v = heads(2, 4, 19, 32), heads(2, 2, 37, 32), heads(2, 2, 37, 32)
        mask, causal = mask_of(kind, 2, 4, 19, 37, torch.float32), kind == "causal"
        want, bound = spec.exact(q, k, v, mask, causal)
        for y in (
            spec.attention(q, k, v, mask, causal),
            F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True),
        ):
            assert ((y.double() - want).abs() <= bound).all(), kind


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("at", ["start", "end"])
def test_nothing_else_is_read(isa: str, at: str) -> None:
    """Operands that lie against forbidden pages, of sizes that fill no vector."""
    for dtype in DTYPES:
        q, k, v = (guarded(torch.randn(1, 1, rows, 21).to(dtype), at) for rows in (19, 35, 35))  # type: ignore[arg-type]
        for mask in (guarded(torch.randn(19, 35), at), guarded(torch.rand(1, 35) < 0.5, at), None):  # type: ignore[arg-type]
            y = _attention.attention(q, k, v, mask, isa=isa)
            assert y is not None and torch.equal(
                y, _attention.attention(q.clone(), k.clone(), v.clone(), mask, isa=isa)
            )


@pytest.mark.parametrize("isa", isas())
def test_odd_numbers(isa: str) -> None:
    """As torch: masks of -inf and of the least number, a query that sees nothing, NaN and infinities of v and k; rows
    far apart by powers of two."""
    q, k, v = heads(1, 2, 6, 32), heads(1, 2, 9, 32), heads(1, 2, 9, 32)
    masks = [torch.zeros(6, 9), torch.zeros(6, 9), torch.zeros(1, 9), torch.full((6, 9), -math.inf)]
    masks[0][2], masks[0][3, 4:], masks[1][1] = -math.inf, -math.inf, torch.finfo(torch.float32).min
    masks[2][:, ::2] = -1e4
    for mask in masks:
        y = _attention.attention(q, k, v, mask, isa=isa)
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, mask))
    for number in (math.nan, math.inf):
        odd = v.clone()
        odd[0, 1, 4, 7] = number
        y = _attention.attention(q, k, odd, isa=isa)
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, odd), equal_nan=True)
    odd = k.clone()
    odd[0, 0, 3, 3] = math.nan
    y = _attention.attention(q, odd, v, masks[0], isa=isa)
    assert y is not None and y[:, 0].isnan().all() and y[:, 1].isfinite().all()
    wide = torch.randn(1, 50, 1024)[..., :32].unsqueeze(1)
    y = _attention.attention(wide[:, :, :3], wide, wide, isa=isa)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(wide[:, :, :3], wide, wide))


def test_rows() -> None:
    """Rows as linear layers have them give the bits of the same rows cut into heads, and so they do where the batch is
    second; others are left to the caller."""
    for dtype, (h, g) in itertools.product(DTYPES, ((4, 4), (4, 2))):
        x = torch.randn(2, 19, 24 * h + 48 * g).to(dtype)
        parts = x.split([24 * h, 24 * g, 24 * g], -1)
        cut = [t.unflatten(-1, (-1, 24)).transpose(1, 2) for t in parts]
        for causal in (False, True):
            y = _attention.attention(*parts, None, causal, None, True, rows=(h, g))
            want = _attention.attention(*cut, None, causal, None, True)
            assert y is not None and want is not None and y.is_contiguous()
            assert torch.equal(y, want.transpose(1, 2).flatten(2))
            turned = [t.transpose(0, 1).contiguous() for t in parts]
            y = _attention.attention(*turned, None, causal, None, True, rows=(h, g), length_first=True)
            assert y is not None and y.is_contiguous() and torch.equal(y, want.permute(2, 0, 1, 3).flatten(2))
        assert _attention.attention(*parts, rows=(h, 5)) is None
        assert _attention.attention(*(t[..., ::2] for t in parts), rows=(h, g)) is None
        assert _attention.attention(*cut, rows=(h, g)) is None


def test_a_mask_of_all_heads() -> None:
    """One mask of all heads is turned once, and another in the next batch."""
    for queries in (7, 32, 33, 70):
        q, k = heads(3, 2, queries, 16), heads(3, 2, 40, 16)
        mask = torch.rand(3, 1, queries, 40) < 0.6
        mask[..., 0] = True
        for each in _kernels.isas():
            try:
                y = _attention.attention(q, k, k, mask, isa=each)
            except ValueError:
                continue
            torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, k, mask))


def test_threads_and_parts() -> None:
    """Many heads, and one that is cut, on two threads: the bits of one thread, of heads one by one."""
    for b, h, g, rows, causal in (
        (3, 8, 2, 40, False),
        (1, 1, 1, 300, False),
        (1, 2, 1, 200, True),
        (1, 6, 1, 1, False),
    ):
        q, k, v = heads(b, h, rows, 32), *(heads(b, g, rows if rows > 1 else 4000, 32) for _ in range(2))
        one = _attention.attention(q, k, v, None, causal, None, True)
        torch.set_num_threads(2)
        two = _attention.attention(q, k, v, None, causal, None, True)
        torch.set_num_threads(1)
        assert one is not None and two is not None
        torch.testing.assert_close(one, two)
        alone = _attention.attention(q[-1:, -1:], k[-1:, -1:], v[-1:, -1:], None, causal)
        assert torch.equal(one[-1:, -1:], alone)


def test_what_it_does_not_take() -> None:
    """Other dtypes, devices, shapes, strides and kinds of tensors are left to the caller; a wrong ISA is named."""
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 6, 8)
    assert _attention.attention(q, k, k, grouped=True) is not None
    assert _attention.attention(q, k, k) is None
    assert _attention.attention(q, k[:, :, :, :4], k, grouped=True) is None
    assert _attention.attention(q, k, k[:, :, :5], grouped=True) is None
    assert _attention.attention(q.double(), k.double(), k.double(), grouped=True) is None
    assert _attention.attention(q.bfloat16(), k, k, grouped=True) is None
    assert _attention.attention(q.to("meta"), k, k, grouped=True) is None
    assert _attention.attention(q[0], k[0], k[0], grouped=True) is None
    assert _attention.attention(q[..., ::2], k[..., ::2], k[..., ::2], grouped=True) is None
    assert _attention.attention(torch._neg_view(q), k, k, grouped=True) is None
    assert _attention.attention(q[:0], k[:0], k[:0], grouped=True) is None
    for mask in (torch.zeros(5, 5), torch.zeros(5, 6).double(), torch.zeros(6, 5).t(), torch.zeros(2, 4, 5, 6)):
        assert _attention.attention(q, k, k, mask, grouped=True) is None or mask.shape == (5, 6)
    assert _attention.attention(q, k, k, torch.zeros(5, 6), True, grouped=True) is None
    with pytest.raises(ValueError, match=r"isa is one of scalar.* not 'avx1024'"):
        _attention.attention(q, k, k, isa="avx1024", grouped=True)


# ---- the cache ----

# B, H, G, L, S, D: heads that end within vectors of every ISA, and those of models
CACHES = [(1, 1, 1, 1, 1, 2), (2, 4, 2, 3, 7, 20), (1, 9, 3, 1, 9, 64), (1, 2, 1, 70, 90, 128), (2, 3, 3, 5, 6, 34)]


def angles(b: int, rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of positions, in whose halves nobody promises the same numbers."""
    found = torch.randn(b, rows, size)
    return found.cos().to(dtype), found.sin().to(dtype)


@pytest.mark.parametrize("isa", isas())
def test_rotated_and_stored(isa: str) -> None:
    """Rows of a cache are what the specification says within a rounding, and all others as they were; a full cache
    drops rows at its front."""
    for (b, h, g, rows, size_of_cache, size), dtype in itertools.product(CACHES, _tensors.FORMATS):
        q, k, v = (heads(b, n, rows, size, dtype) for n in (h, g, g))
        cos, sin = angles(b if rows % 2 else 1, rows, size, dtype)
        for full, at in ((False, 0), (False, size_of_cache - rows), (True, size_of_cache - rows)):
            caches = [torch.randn(b, g, size_of_cache, size).to(dtype) for _ in range(2)]
            want, before = [each.double() for each in caches], [each.clone() for each in caches]
            turned = spec.store(*(t.double() for t in (q, k, v, cos, sin)), *want, at, full)
            rotated = _attention.store(q, k, v, cos, sin, *caches, at, full, isa)
            assert rotated is not None and rotated.transpose(1, 2).is_contiguous()
            for ours, exact in zip((rotated, *caches), (turned, *want), strict=True):
                off = 2.0**-22 * 8 + torch.finfo(dtype).eps / 2 * exact.abs()
                assert ((ours.double() - exact).abs() <= off).all(), (dtype, full, at)
            assert torch.equal(caches[1], want[1].to(dtype))
            lying = [each.transpose(1, 2).flatten(2) for each in (q, k, v)]  # as linear layers have them
            again = _attention.store(*lying, cos, sin, *before, at, full, isa, (h, g))
            assert again is not None and torch.equal(again, rotated) and all(map(torch.equal, before, caches))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("at", ["start", "end"])
def test_nothing_else_is_touched(isa: str, at: str) -> None:
    """Operands and a cache that lie against forbidden pages."""
    for dtype in _tensors.FORMATS:
        q, k, v = (guarded(torch.randn(1, n, 3, 22).to(dtype), at) for n in (2, 1, 1))  # type: ignore[arg-type]
        cos, sin = (guarded(each, at) for each in angles(1, 3, 22, dtype))  # type: ignore[arg-type]
        caches = [guarded(torch.zeros(1, 1, 5, 22, dtype=dtype), at) for _ in range(2)]  # type: ignore[arg-type]
        assert _attention.store(q, k, v, cos, sin, *caches, 2, False, isa) is not None
        assert _attention.store(q, k, v, cos, sin, *caches, 2, True, isa) is not None
        assert torch.equal(caches[1][:, :, 2:], v) and torch.equal(caches[1][:, :, :2], v[:, :, 1:])


def test_what_the_cache_does_not_take() -> None:
    """Whatever does not fit is left to the caller, and nothing is written."""
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    cos, sin = angles(2, 3, 8, torch.float32)
    cache = torch.zeros(2, 2, 7, 8)
    store = _attention.store
    assert store(q, k, k, cos, sin, cache, cache.clone(), 4) is not None
    cache.zero_()
    for at, full in ((5, False), (-1, False), (3, True)):
        assert store(q, k, k, cos, sin, cache, cache.clone(), at, full) is None
    assert store(q, k, k[:, :1], cos, sin, cache, cache.clone(), 0) is None
    assert store(q, k, k, cos[:, :2], sin, cache, cache.clone(), 0) is None
    assert store(q, k, k, cos, sin.double(), cache, cache.clone(), 0) is None
    assert (
        store(q[..., :7], k[..., :7], k[..., :7], cos[..., :7], sin[..., :7], cache[..., :7], cache[..., :7], 0) is None
    )
    assert store(q.bfloat16(), k, k, cos, sin, cache, cache.clone(), 0) is None
    assert store(q, k, k, cos, sin, cache[:, :1], cache.clone(), 0) is None
    assert store(q, k, k, cos, sin, cache.mT.contiguous().mT, cache.clone(), 0) is None
    assert not cache.any()
