"""Attention of a graph: on kernels of our own by a rule or a measurement, and torch's where that would be wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import OFF
from torch import Tensor, nn

import fastlinear
from fastlinear.graph import backend
from fastlinear.model.rows import NodeReport
from fastlinear.plan import attention as plan
from fastlinear.plan import decide, race

sdpa = F.scaled_dot_product_attention
Heads = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Four heads of 8 between projections; `attend` is what it does with q, k and v [B, H, L, D]."""

    def __init__(self, attend: Heads, heads: int = 4) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 16 * heads), nn.Linear(32, 32)
        self.attend = attend
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        y = self.attend(self.q(x).unflatten(-1, (4, 8)).transpose(1, 2), k, v)
        return self.out(y.transpose(1, 2).reshape(*x.shape))


class Called(nn.Module):
    """Attention of x to itself."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


def compiled(model: Any, dynamic: bool | None = None, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic, options={"tune": "off"} | options)


def told(fast: nn.Module) -> NodeReport:
    (node,) = (
        node
        for graph in fastlinear.report(fast).graphs
        for node in graph.nodes
        if node.op == "scaled_dot_product_attention"
    )
    return node


def check(model: nn.Module, x: Tensor, **options: Any) -> NodeReport:
    fast = compiled(model, **options)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    return told(fast)


TAKEN: dict[str, Heads] = {
    "plain": lambda q, k, v: sdpa(q, k, v),
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "scaled": lambda q, k, v: sdpa(q, k, v, scale=0.3),
    "masked": lambda q, k, v: sdpa(q, k, v, attn_mask=(q[:, :1] @ k[:, :1].mT) > -3),
    "added": lambda q, k, v: sdpa(q, k, v, (q[:, :1, :1] @ k[:, :1].mT)),
    "of heads that lie apart": lambda q, k, v: sdpa(*map(Tensor.contiguous, (q, k, v))),  # as Whisper has them
}
LEFT: dict[str, tuple[Heads, str]] = {
    "of heads that lie apart": (lambda q, k, v: sdpa(*map(Tensor.contiguous, (q, k, v))).neg(), "in another order"),
    "dropping": (lambda q, k, v: sdpa(q, k, v, dropout_p=1e-7), "it drops out"),
    "fp64": (lambda q, k, v: sdpa(q.double(), k.double(), v.double()).float(), "no fp32, bf16 or fp16"),
    "three dimensions": (lambda q, k, v: sdpa(q[0], k[0], v[0])[None], "not of four dimensions"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_attention_is_ours(name: str) -> None:
    """Each form gives what it gave, by our kernels, and the report says so."""
    node = check(Attention(TAKEN[name]), torch.randn(1, 10, 32))
    assert node.outcome == "fast" and node.why == "attention: fastlinear, by rule"


def test_heads_that_are_too_wide_are_torchs() -> None:
    """Of more than 256 numbers, with the reason; their rows are cut and joined as others are."""

    def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (t.transpose(1, 2).repeat(1, 1, 1, 33).transpose(1, 2) for t in (q, k, v))  # heads of 264
        return sdpa(*parts).unflatten(-1, (33, 8)).mean(-2)

    node = check(Attention(wide), torch.randn(1, 10, 32))
    assert (node.outcome, node.why) == ("torch", "attention: torch: heads of 264 are more than 256 wide")


def test_heads_that_are_repeated_are_not_copied() -> None:
    """Keys and values of two heads that a model repeats for four are not copied, if nobody else reads the copy."""

    def repeated(x: Tensor) -> Tensor:
        b, heads, rows, size = x.shape
        return x[:, :, None, :, :].expand(b, heads, 2, rows, size).reshape(b, 2 * heads, rows, size)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, repeated(k), repeated(v), torch.ones(5, 5, dtype=torch.bool, device="cpu").tril())

    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = repeated(k)
        return sdpa(q, wide, repeated(v)) + wide

    for attend, copies in ((plain, 0), (read, 1)):
        model, x = Attention(attend, 2), torch.randn(3, 5, 32)
        fast = compiled(model)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
        (graph,) = fastlinear.report(fast).graphs
        assert told(fast).outcome == "fast"
        assert sum(node.op == "expand" and node.outcome != "fused" for node in graph.nodes) == copies, graph.nodes


def test_groups_of_heads() -> None:
    """Keys and values of fewer heads are shared by several of the queries."""
    node = check(Attention(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), 2), torch.randn(2, 10, 32))
    assert node.outcome == "fast"


class Rows(Attention):
    """`join` is what becomes of the output; q, k and v are cut by view and transposed."""

    def __init__(self, attend: Heads, join: Callable[[Tensor], Tensor], heads: int = 4) -> None:
        super().__init__(attend)
        self.k, self.v, self.join, self.heads = nn.Linear(32, 8 * heads), nn.Linear(32, 8 * heads), join, heads

    def forward(self, x: Tensor) -> Tensor:
        k, v = (t.view(x.shape[0], x.shape[1], self.heads, 8).permute(0, 2, 1, 3) for t in (self.k(x), self.v(x)))
        y = self.join(self.attend(self.q(x).view(x.shape[0], -1, 4, 8).transpose(1, 2), k, v))
        return self.out(y)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, enable_gqa=True)


def _joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).contiguous().view(y.shape[0], y.shape[2], 32)


WHOLE: dict[str, tuple[nn.Module, bool]] = {
    "reshape": (Rows(TAKEN["plain"], lambda y: y.transpose(1, 2).reshape(y.shape[0], -1, 32)), True),
    "contiguous": (Rows(TAKEN["causal"], _joined), True),
    "flatten": (Rows(TAKEN["scaled"], lambda y: y.transpose(1, 2).flatten(2)), True),
    "groups": (Rows(_grouped, _joined, 2), True),
    "masked": (Rows(TAKEN["masked"], _joined), True),
    "more readers": (Rows(lambda q, k, v: sdpa(q, k, v) + 0 * q.sum(), _joined), False),
    "read twice": (Rows(TAKEN["plain"], lambda y: _joined(y) + y.sum()), False),
    "joined otherwise": (Rows(TAKEN["plain"], lambda y: y.reshape(y.shape[0], -1, 32)), False),
    "turned": (Rows(lambda q, k, v: sdpa(q * 2, k, v), _joined), False),
    "written to": (Rows(lambda q, k, v: sdpa(q, k, v).mul_(2), _joined), False),
}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("reshape", None),  # each number of rows is compiled anew
        *((name, True) for name in WHOLE),
        *(pytest.param(name, None, marks=pytest.mark.exhaustive) for name in WHOLE if name != "reshape"),
    ],
)
def test_heads_are_cut_by_the_kernel(name: str, dynamic: bool | None) -> None:
    """Rows that are cut into heads for attention alone, and joined after it, are read and written as rows; what torch
    answers instead is the same, and so it is for another batch."""
    model, whole = WHOLE[name]
    fast = compiled(model, dynamic)
    with torch.no_grad():
        for shape in ((2, 10, 32), (2, 3, 32), (5, 10, 32)):
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    found = [node for graph in fastlinear.report(fast).graphs for node in graph.nodes if "cuts rows" in node.why]
    assert bool(found) == whole, found


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_of_a_converted_module_is_ours(batch_first: bool) -> None:
    """A FastMultiheadAttention cuts and joins heads so that the kernel may do it, whichever dimension is the batch."""
    attention = OFF(nn.MultiheadAttention(16, 2, batch_first=batch_first).eval())
    node = check(Called(attention), torch.randn(3, 5, 16))
    assert node.outcome == "fast" and node.why.startswith("attention: fastlinear")


@pytest.mark.parametrize("name", LEFT)
def test_attention_is_left_to_torch(name: str) -> None:
    """What the kernels do not compute stays torch's, with the reason."""
    attend, why = LEFT[name]
    node = check(Attention(attend), torch.randn(1, 10, 32))
    assert node.outcome == "torch" and why in node.why


def test_many_queries_of_many_keys_are_left_to_torch() -> None:
    """Each call is answered by its own shapes, and the report tells of the last kind; few queries read keys of any
    number."""
    fast = compiled(Attention(TAKEN["plain"]), True)
    with torch.no_grad():
        for length, heads in ((3, "fastlinear"), (20, "fastlinear")):
            fast(torch.randn(1, length, 32))
            assert heads in told(fast).why
    long = plan.Question(8, 64, 1 << 20, 64, "fp32", "none", 1)
    assert "do not fit the caches" in (plan.why_never(long) or "")
    assert plan.why_never(long._replace(queries=1)) is None


def test_keys_beyond_the_second_level_cache_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it a rule leaves them to torch, and a measurement decides; beyond all caches nothing is measured."""
    monkeypatch.setattr(plan, "_caches", lambda: (1 << 19, 1 << 22))
    asked = [plan.Question(8, 64, keys, 64, "fp32", "none", 1) for keys in (256, 2048, 1 << 15)]
    assert [plan.by_rule(each).ours for each in asked] == [True, False, False]
    assert [plan.why_never(each) is None for each in asked] == [True, True, False]


def test_fuse_and_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    """fuse=False leaves attention as it was, FASTLINEAR_DISABLE each call."""
    node = check(Attention(TAKEN["plain"]), torch.randn(1, 10, 32), fuse=False)
    assert node.outcome == "torch" and not node.why
    calls: list[object] = []
    monkeypatch.setattr("fastlinear.layer.sdpa._attention.attention", lambda *args, **_: calls.append(args))
    monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
    node = check(Attention(TAKEN["plain"]), torch.randn(1, 10, 32))
    assert not calls


def test_autocast_and_gradients() -> None:
    """Under autocast, and where gradients are wanted, torch's own runs, with what it returns."""
    model, x = Attention(TAKEN["plain"]), torch.randn(1, 10, 32)
    fast = compiled(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fast(x).dtype is model(x).dtype
    fast(x).sum().backward()
    assert model.q.weight.grad is not None


def test_what_is_measured_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A race decides once for a bucket of shapes; the answer is in the tuning cache and the report."""
    races: list[list[str]] = []
    winner = plan.TORCH

    def choose(candidates: Any, baseline: str, **_: Any) -> race.Verdict:
        races.append([candidate.name for candidate in candidates])
        for candidate in candidates:
            assert isinstance(candidate.run(), Tensor)
        return race.Verdict(winner, ((winner, 1.0),), 1.5, True, 1, 3, 0.01)

    monkeypatch.setattr(race, "choose", choose)
    q = torch.randn(2, 3, 21, 16)
    for winner, length in ((plan.OURS, 21), (plan.TORCH, 45)):
        asked = plan.Question(6, length, length, 16, "fp32", "none", 1)
        answers = [plan.answer(asked._replace(queries=n), lambda _: q, lambda: q) for n in (length, length + 2)]
        assert {found.ours for found in answers} == {winner == plan.OURS} and len({found.why for found in answers}) == 1
        remembered = decide.cache().get(asked.bucketed().key())
        assert remembered is not None and remembered.name == winner
    assert races == [[plan.OURS, plan.TORCH]] * 2


def test_products_of_bf16_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured beside the others for bf16, and for fp32 where users asked for such products, if there are more
    than a few queries; an answer that won is not believed where no kernel is for it."""
    raced: list[list[str]] = []
    given: list[str | None] = []

    def choose(candidates: Any, baseline: str, **_: Any) -> race.Verdict:
        raced.append([candidate.name for candidate in candidates])
        for candidate in candidates:
            candidate.run()
        return race.Verdict(plan.ROUNDED, ((plan.ROUNDED, 1.0),), 1.5, True, 1, 3, 0.01)

    monkeypatch.setattr(race, "choose", choose)
    monkeypatch.setattr(plan, "rounding_kernel", lambda: "bf16/amx/32x32")
    for format in plan.ROUNDABLE:
        asked = plan.Question(6, 37, 37, 16, format, "none", 1)
        for _ in range(2):
            found = plan.answer(asked, given.append, lambda: None)
            assert found.ours and found.products == "bf16/amx/32x32" and "products of bf16" in found.why
    assert raced == [[plan.OURS, plan.TORCH, plan.ROUNDED]] * 2 and given == [None, "bf16/amx/32x32"] * 2
    assert plan.rounding(asked._replace(queries=8)) is None and plan.rounding(asked._replace(format="fp32")) is None
    assert plan.by_rule(asked).products is None and plan.by_rule(asked._replace(keys=200)).products == "bf16/amx/32x32"
    monkeypatch.setattr(plan, "rounding_kernel", lambda: None)
    monkeypatch.setattr(race, "choose", lambda *_, **__: race.Verdict(plan.OURS, (), 1.5, True, 1, 3, 0.01))
    assert plan.answer(asked, given.append, lambda: None).products is None


def test_fp32_is_multiplied_in_bf16_where_users_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """products=torch.bfloat16 reaches attention; without it fp32 stays fp32."""
    asked: list[str] = []
    monkeypatch.setattr(
        plan, "answer", lambda question, *_, **__: asked.append(question.format) or plan.Answer(True, "")
    )
    check(Attention(TAKEN["plain"]), torch.randn(1, 10, 32))
    model, x = Attention(TAKEN["plain"]), torch.randn(1, 10, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        options = {"tune": "off", "products": torch.bfloat16}
        torch.compile(model, backend=backend, fullgraph=True, options=options)(x)
    assert asked == ["fp32", "fp32 as bf16"]
