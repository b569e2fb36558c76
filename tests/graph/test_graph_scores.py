"""Attention that a model spells out as two products and a softmax is one, wherever that is the same."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear
from fastlinear.graph import backend
from fastlinear.model.rows import NodeReport

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, 4, L, 8], a mask [L, L] -> [B, L, 32]


def joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def _nano(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(8))
    w = F.dropout(F.softmax(s.masked_fill(mask == 0, -math.inf), dim=-1), 0.1, training=False)
    return (w @ v).transpose(1, 2).contiguous().view(q.shape[0], -1, 32)


def _in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = torch.matmul(q, k.transpose(3, 2))
    s += mask
    return joined(torch.matmul(F.softmax(s.float(), dim=-1).type_as(s), v))


def _of_transformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    w = torch.matmul(q, k.transpose(2, 3)) * 0.3 + torch.where(mask > 0, 0.0, torch.finfo(q.dtype).min)[None, None]
    w = F.softmax(w, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(w, v).transpose(1, 2).contiguous().reshape(q.shape[0], -1, 32)


def _letters(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    w = torch.einsum("b h i d, b h j d -> b h i j", q, k).div(3).softmax(3)
    return torch.einsum("bhqk,bhkd->bqhd", w, v).flatten(2)


def _letters_of_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.einsum("bhlm,bmhd->blhd", torch.softmax(torch.einsum("blhd,bmhd->bhlm", q, k), -1), v).flatten(2)


def _batches(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    folded = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
    w = torch.softmax(torch.bmm(folded[0], folded[1].transpose(1, 2)) / 2 + mask, -1)
    return joined(torch.bmm(w, folded[2]).view(q.shape))


def _two_masks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = (q * 0.3) @ k.mT + mask.cos()
    return joined(s.masked_fill(mask < 1, -1e9).softmax(-1) @ v)


def _alibi(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, h, length = q.shape[:3]
    q, k, v = (t.reshape(b * h, length, 8) for t in (q, k, v))
    bias = mask[-1].cumsum(0).expand(b * h, 1, length)
    s = bias.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=0.3).view(b, h, length, -1)
    hidden = torch.where(mask > 0, 0.0, torch.finfo(q.dtype).min).to(q.dtype)[None, None]
    w = F.softmax(s + hidden, dim=-1, dtype=torch.float32).to(q.dtype).view(b * h, length, -1)
    return torch.bmm(w, v).view(b, h, length, 8).transpose(1, 2).reshape(b, length, 32)


def _disentangled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, h, length = q.shape[:3]
    folded = [t.reshape(b * h, length, 8) for t in (q, k, v)]
    s = torch.bmm(folded[0], folded[1].transpose(-1, -2) / torch.full((), 3.0, dtype=q.dtype))
    near = folded[0][..., :1] * folded[1][..., :1].mT
    near += 2 * near.mT  # which is written to after q and k were read, and before it is
    hidden = (mask == 0)[None, None].expand(b, 1, length, length)
    s = (s + near).view(-1, h, length, length).masked_fill(hidden, torch.finfo(q.dtype).min)
    y = torch.bmm(s.softmax(-1).view(b * h, length, length), folded[2])
    return y.view(b, h, length, 8).permute(0, 2, 1, 3).contiguous().view(b, length, -1)


def _windows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, _, length = q.shape[:3]
    heads = (mask[:4, :1].cumsum(0) / 4).exp()[:, None]
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * heads + mask.cos()[None, None]
    s = s.view(b, 1, 4, length, length) + mask[None, None, None]
    return joined(s.view(-1, 4, length, length).softmax(-1) @ v)


SINKS = nn.Parameter(torch.linspace(-1, 2, 4, device="cpu"))


def _sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    sinks = SINKS.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    s = torch.cat([q @ k.transpose(2, 3) * 0.3 + (mask - 1), sinks], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    w = F.dropout(F.softmax(s, dim=-1, dtype=s.dtype)[..., :-1], p=0.0, training=False).to(v.dtype)
    return (w @ v).transpose(1, 2).contiguous().reshape(q.shape[0], -1, 32)


def _cap(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * 0.3 / 2.0) * 2.0 + torch.where(mask > 0, 0.0, -1e30)
    w = F.dropout(F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype), p=0.0, training=False)
    return torch.matmul(w, v).transpose(1, 2).contiguous().reshape(q.shape[0], -1, 32)


def _beside(s: Tensor, numbers: Tensor) -> Tensor:
    """Scores and sinks, in a softmax without its last column."""
    sinks = numbers.view(1, -1, 1, 1).expand(*s.shape[:-1], 1)
    return torch.cat([s, sinks], -1).softmax(-1)[..., :-1]


TAKEN: dict[str, Attend] = {
    "as in gpt-oss": _sinks,
    "as in Gemma 2": _cap,
    "a cap and sinks": lambda q, k, v, mask: joined(_beside((q @ k.mT).tanh() * 3 + mask, mask[3, :4]) @ v),
    "as in BLOOM": _alibi,
    "as in DeBERTa": _disentangled,
    "as in Swin V2": _windows,
    "as in nanoGPT": _nano,
    "mask in place": _in_place,
    "as transformers do": _of_transformers,
    "letters": _letters,
    "letters of rows": _letters_of_rows,
    "batches of heads": _batches,
    "two masks": _two_masks,
    "where": lambda q, k, v, mask: joined(torch.where(mask > 0, q @ k.mT, -math.inf).softmax(-1) @ v),
    "a row of a mask": lambda q, k, v, mask: joined((q @ k.mT + mask[-1]).softmax(-1) @ v),
    "a query scaled": lambda q, k, v, mask: joined(((q / 3) @ (2.0 * k).mT).softmax(-1) @ v),
    "as in GPT-2": lambda q, k, v, mask: joined((0.3 * (q @ k.mT) + mask).softmax(-1).type(v.dtype) @ v),
    "a mask that is turned": lambda q, k, v, mask: joined((q @ k.mT + (mask - 1).T[None]).softmax(-1) @ v),
    "queries that see all alike": lambda q, k, v, mask: joined((q @ k.mT).masked_fill(mask < 9, -1e9).softmax(-1) @ v),
    "heads viewed later": lambda q, k, v, mask: joined(((q @ k.mT).softmax(-1) @ v).view(-1, *q.shape[1:]) * 2),
}
LEFT: dict[str, Attend] = {
    "sinks for each query": lambda q, k, v, mask: joined(
        torch.cat([q @ k.mT, q.mean(-1, True)], -1).softmax(-1)[..., :-1] @ v
    ),
    "the first is dropped": lambda q, k, v, mask: joined(
        torch.cat([q @ k.mT, mask[3, :4].view(1, -1, 1, 1).expand(*q.shape[:3], 1)], -1).softmax(-1)[..., 1:] @ v
    ),
    "another maximum": lambda q, k, v, mask: joined(
        (
            (s := torch.cat([q @ k.mT, mask[3, :4].view(1, -1, 1, 1).expand(*q.shape[:3], 1)], -1))
            - s.max(2, True).values
        ).softmax(-1)[..., :-1]
        @ v
    ),
    "a mask that is capped": lambda q, k, v, mask: joined((((q @ k.mT) + mask).tanh() * 3).softmax(-1) @ v),
    "capped twice": lambda q, k, v, mask: joined(((q @ k.mT).tanh() * 3).tanh().softmax(-1) @ v),
    "weights read": lambda q, k, v, mask: joined((w := (q @ k.mT).softmax(-1)) @ v) + w.sum(),
    "scores read": lambda q, k, v, mask: joined((s := q @ k.mT).softmax(-1) @ v) + s.sum(),
    "of another dimension": lambda q, k, v, mask: joined((q @ k.mT).softmax(-2) @ v),
    "a mask multiplied": lambda q, k, v, mask: joined(((q @ k.mT + mask) * q.mean((2, 3), True)).softmax(-1) @ v),
    "rows multiplied": lambda q, k, v, mask: joined(((q @ k.mT) * q.mean(3, True)).softmax(-1) @ v),
    "scores of other rows": lambda q, k, v, mask: joined(
        (q @ k.mT).view(q.shape[0], 2, -1, q.shape[2]).softmax(-1).view(*q.shape[:3], -1) @ v
    ),
    "half of what is added": lambda q, k, v, mask: joined(
        torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5).softmax(-1).view(*q.shape[:3], -1) @ v
    ),
    "a mask scaled": lambda q, k, v, mask: joined(((q @ k.mT + mask) * 0.3).softmax(-1) @ v),
    "a small number": lambda q, k, v, mask: joined((q @ k.mT).masked_fill(mask < 1, -2.0).softmax(-1) @ v),
    "queries that see nothing": lambda q, k, v, mask: joined((q @ k.mT).masked_fill(mask < 9, -1e4).softmax(-1) @ v),
    "a view written to meanwhile": lambda q, k, v, mask: joined(((q @ k.mT).softmax(-1), v[..., :1].mul_(2))[0] @ v),
    "a sign changed": lambda q, k, v, mask: joined(((q @ k.mT) * -0.3).softmax(-1) @ v),
    "keys of one head": lambda q, k, v, mask: joined((q @ k[:, :1].mT).softmax(-1) @ v),
    "written to meanwhile": lambda q, k, v, mask: joined(((q @ k.mT).softmax(-1), v.mul_(2))[0] @ v),
    "another activation": lambda q, k, v, mask: joined(F.softplus(q @ k.mT) @ v),
}


class Spelled(nn.Module):
    """The same q, k and v, to each of some ways to attend."""

    def __init__(self, ways: dict[str, Attend]) -> None:
        super().__init__()
        self.qkv, self.ways = nn.Linear(32, 96), [*ways.values()]
        self.register_buffer("mask", torch.ones(16, 16).tril())

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for way in self.ways:
            heads = (t.view(x.shape[0], -1, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            outputs.append(way(*heads, self.mask[: x.shape[1], : x.shape[1]]))
        return outputs


def attentions(ways: dict[str, Attend], dtype: torch.dtype, close: float) -> list[NodeReport]:
    """What the report tells of attention in a graph of all these, which gives what the model does."""
    torch._dynamo.reset()
    model = Spelled(ways).to(dtype).eval()
    fast = torch.compile(model, backend=backend, fullgraph=True, dynamic=True, options={"tune": "off"})
    with torch.no_grad():
        for shape in ((2, 10, 32), (3, 7, 32)):
            x = torch.randn(shape).to(dtype)
            for name, y, want in zip(ways, fast(x), model(x), strict=True):
                torch.testing.assert_close(y, want, rtol=close, atol=close, msg=lambda why, at=name: f"{at}: {why}")
    (graph,) = fastlinear.report(fast).graphs
    return [node for node in graph.nodes if node.why.startswith("attention: ")]


@pytest.mark.parametrize(
    ("ways", "dtype", "close"),
    [
        ([*TAKEN], torch.float32, 1e-5),
        (["mask in place", "as transformers do"], torch.bfloat16, 3e-2),
        pytest.param([*TAKEN], torch.bfloat16, 3e-2, marks=pytest.mark.exhaustive),
    ],
    ids=["fp32", "some in bf16", "all in bf16"],
)
def test_every_spelling_is_taken(ways: list[str], dtype: torch.dtype, close: float) -> None:
    """Each gives what it gave, by our kernels; and in 16 bits, where torch rounds scores and weights, what is near."""
    found = attentions({name: TAKEN[name] for name in ways}, dtype, close)
    assert [node.why for node in found] == ["attention: fastlinear, by rule"] * len(ways)


def test_what_is_another_thing_is_left() -> None:
    """Weights that something else reads, another dimension, a mask that counts otherwise: no attention of torch's."""
    assert not attentions(LEFT, torch.float32, 1e-5)
