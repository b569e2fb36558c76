"""The op fastlinear::attention in everything of torch that traces, transforms or watches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastlinear.layer import sdpa
from fastlinear.spec import attention as spec

OP = sdpa.OP
sdpa = F.scaled_dot_product_attention


def heads(b: int = 2, h: int = 4, rows: int = 9, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(b, rows, h, size, dtype=dtype).transpose(1, 2)


def test_opcheck() -> None:
    """Schema, fake tensors, autograd and dispatch agree, where the kernels answer and where they do not."""
    for tensors, keywords in (
        ((heads(), heads(), heads()), {}),
        ((heads(), heads(h=2), heads(h=2)), {"enable_gqa": True, "is_causal": True}),
        ((heads(), heads(rows=5), heads(rows=5), torch.rand(2, 1, 1, 5) < 0.5), {"scale": 0.5}),
        ((heads(),) * 3, {"sinks": torch.randn(4), "cap": 3.0}),
        ((heads(dtype=torch.float64),) * 3, {}),
        ((heads().contiguous().requires_grad_(),) * 3, {}),
    ):
        torch.library.opcheck(OP, tensors, keywords)


def test_modes() -> None:
    """Gradients, forward mode, vmap and autocast give what torch's attention gives."""
    q, k, v = heads(), heads(), heads()
    expected = sdpa(q, k, v)
    torch.testing.assert_close(OP(q, k, v), expected)
    ours, theirs = (
        torch.autograd.grad(f(x, k, v).square().sum(), x)[0] for f in (OP, sdpa) for x in (q.clone().requires_grad_(),)
    )
    torch.testing.assert_close(ours, theirs)
    batch, mask = torch.stack((q, k, v)), torch.rand(3, 9, 9) < 0.8
    got = torch.vmap(OP, (0, None, None))(batch, k, v)
    torch.testing.assert_close(got, torch.stack([sdpa(x, k, v) for x in batch]))
    got = torch.vmap(lambda x, m: OP(x, k, v, m))(batch, mask)
    torch.testing.assert_close(got, torch.stack([sdpa(x, k, v, m) for x, m in zip(batch, mask, strict=True)]))
    ours, theirs = (torch.func.jvp(lambda x, f=f: f(x, k, v), (q,), (k,))[1] for f in (OP, spec.attention))
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.func.grad(lambda x, f=f: f(x, k, v).square().sum())(q) for f in (OP, sdpa))
    torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert OP(q, k, v).dtype is torch.bfloat16


def test_modes_of_sinks_and_a_cap() -> None:
    """Gradients, also of sinks, forward mode and vmap, also over sinks, are those of the specification."""
    q, k, v, sinks = heads(), heads(), heads(), torch.randn(4)

    def both(q: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return OP(q, k, v, sinks=sinks, cap=2.0), spec.attention(q, k, v, sinks=sinks, cap=2.0)

    torch.testing.assert_close(*both(q, sinks))
    torch.testing.assert_close(*both(q.bfloat16().float(), sinks.bfloat16()))
    for at in range(2):
        given = [q, sinks]
        given[at] = given[at].clone().requires_grad_()
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), given[at])[0] for y in both(*given)))
    ours, theirs = torch.func.jvp(lambda x: both(x, sinks), (q,), (k,))[1]
    torch.testing.assert_close(ours, theirs)
    several = torch.stack((sinks, sinks - 3))
    for dims in ((0, None), (None, 0), (0, 0)):
        given = [torch.stack((q, k)) if dims[0] == 0 else q, several if dims[1] == 0 else sinks]
        got = torch.vmap(lambda x, s: both(x, s)[0], dims)(*given)
        cut = [[t, t] if dim is None else t for t, dim in zip(given, dims, strict=True)]
        want = torch.stack([both(x, s)[1] for x, s in zip(*cut, strict=True)])
        torch.testing.assert_close(got, want)


class Net(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return OP(q, k, k).transpose(1, 2).flatten(2)


def test_recorded() -> None:
    """torch.export and torch.fx keep the op."""
    q, k = heads(), heads()
    with torch.no_grad():
        for module in (torch.export.export(Net(), (q, k)).module(), make_fx(Net())(q, k)):
            assert any(node.target is OP for node in module.graph.nodes)
            torch.testing.assert_close(module(q, k), Net()(q, k))
