"""report: every linear layer is accounted for, in data and in a table that fits a terminal and a log."""

import dataclasses
import json
import re

import pytest
import torch
from models import OFF, Model, mlp
from reports import answer, entry
from torch import nn

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
from fastlinear.layer import linear
from fastlinear.layer.quality import Quality
from fastlinear.model.reporting import Report
from fastlinear.model.rows import LayerReport
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.roofline import Roofline, Spot
from fastlinear.spec.activations import Activation


def test_every_layer_has_its_line() -> None:
    """Each linear layer is reported once, in order, with sizes, dtype, activation and decision; skips have reasons."""
    model = nn.Sequential(
        nn.Linear(8, 16),
        nn.LeakyReLU(0.1),
        nn.Linear(16, 8).double(),
        nn.MultiheadAttention(8, 2, kdim=4),
        nn.Linear(8, 3),
    )
    rows = fastlinear.report(OFF(model, exclude="4"))
    assert [row.name for row in rows] == ["0", "2", "3.out_proj", "4"]
    assert [row.decision for row in rows] == ["untuned", "skipped", "skipped", "skipped"]
    assert (rows[0].in_features, rows[0].out_features, rows[0].dtype) == (8, 16, "float32")
    assert rows[0].activation == Activation("leaky_relu", (0.1,)) and rows[0].reason is None
    for row, reason in zip(rows[1:], ("float64", "widths of their own", "excluded by '4'"), strict=True):
        assert row.reason is not None and reason in row.reason
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows[0].name = "x"  # type: ignore[misc]


def test_reasons_survive_and_go() -> None:
    """The reasons for a choice of the caller's stay with a copy of the model, and unconvert forgets them."""
    model = OFF(Model(2), include="layers", filter_fn=lambda module, name: "fc1" in name)
    reasons = {row.name: row.reason for row in fastlinear.report(OFF(model, inplace=True, include="layers.0.fc1"))}
    assert reasons["head"] == "not among the included layers"
    first = {row.name: row.reason for row in fastlinear.report(OFF(Model(2), filter_fn=lambda m, name: name == "head"))}
    assert first["layers.0.fc1"] == "refused by filter_fn" and first["head"] is None
    assert {row.reason for row in fastlinear.report(fastlinear.unconvert(model))} == {"convert was not called on it"}


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_may_be_filled_later(assign: bool) -> None:
    """That its weights were on meta is no reason that lasts: the report says what to do, and that helps."""
    stock = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    with pytest.warns(UserWarning, match="nothing to convert"):
        model = OFF(empty)
    assert {row.reason for row in fastlinear.report(model)} == {"its weight is on device meta"}
    (model if assign else model.to_empty(device="cpu")).load_state_dict(stock.state_dict(), assign=assign)
    told = {row.reason for row in fastlinear.report(model)}
    assert told == {"its parameters were on device meta when convert was called: call it again"}
    assert {row.reason for row in fastlinear.report(OFF(model))} == {None}


def test_plans_and_memory_after_calls() -> None:
    """Buckets list what ran, smallest M first; the pack's memory is counted once it exists."""
    fast = OFF(mlp(64, 64)).eval()
    assert fastlinear.report(fast).pack_mib == 0
    with torch.no_grad():
        for rows in (100, 3):
            fast(torch.randn(rows, 64))
    (row,) = fastlinear.report(fast)
    assert [chosen.bucket for chosen in row.buckets] == [3, _plans.bucket(100)]
    assert {chosen.source for chosen in row.buckets} == {"heuristic"}
    assert row.decision == "fast" and row.pack_mib >= 64 * 64 * 4 / 2**20


def test_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is "torch" where torch won every bucket, "fast" where a kernel won one."""
    fast = OFF(mlp(8, 8))
    plans: list[Chosen] = []
    monkeypatch.setattr(type(fast[0]), "plans", property(lambda self: tuple(plans)))
    for chosen, decision in (
        (answer(8, "torch/linear", "tuned"), "torch"),
        (answer(1, "torch/mkl", "cache"), "torch"),
        (answer(4, "fp32/avx2/4x16", "tuned"), "fast"),
    ):
        plans.append(chosen)
        (row,) = fastlinear.report(fast)
        assert row.decision == decision
    assert row.buckets == tuple(plans)


def test_table() -> None:
    """Equal layers share a row that counts them; every M has a line; the footer tells memory, sources, CPU, threads."""
    runs = (
        answer(1, "bf16/avx512/1x128", "cache", 1.5, "bf16"),
        answer(1, "bf16/avx512/6x64", "cache", 1.1),
        answer(32, "fp32/avx512/14x32", "tuned", 1.234),
    )
    table = Report(
        [entry(f"layer.{i}.fc", *runs, dtype="float32 as bfloat16") for i in range(12)]
        + [entry("head", answer(32, "torch/mkl", "tuned"), activation=None, decision="torch")]
    )
    lines = [" ".join(line.split()) for line in str(table).splitlines()]
    assert lines[2] == "layer.*.fc 12 768x3072 fp32 as bf16 gelu 1 bf16 bf16/avx512/1x128 1.50x 108.00"
    assert lines[3] == "1 fp32 bf16/avx512/6x64 1.10x"
    assert lines[4] == "32 fp32 fp32/avx512/14x32 1.23x"
    assert lines[5] == "head 1 768x3072 fp32 32 fp32 torch/mkl 9.00"
    footer = "\n".join(lines[6:])
    assert "12 fast, 1 torch" in footer and "117.0 MiB" in footer
    assert "24 from the tuning cache, 13 measured in this process" in footer
    info = _kernels.cpu_info()
    assert info["model"] in footer and all(isa in footer for isa in info["isas"])
    assert f"{_products.num_threads()} threads" in footer


@pytest.mark.parametrize(
    "layer",
    [
        entry("a" * 200, answer(16384, "int8/avx512_vnni/14x128", "tuned", 123.456)),
        entry(".".join(["block"] * 40), in_features=100000, out_features=100000, pack_mib=38146.97),
        entry("x", decision="skipped", reason="a long and winding reason " * 10),
        entry("x", activation=Activation("softplus", (2.00000001, 20.12345678))),
        entry("b" * 200, answer(16384, "bf16/avx512_bf16/14x128", "tuned", 123.456), dtype="float32 as bfloat16"),
        entry(
            "b" * 200,
            answer(16384, "bf16/avx512_bf16/14x128", "tuned", 123.456, "uint8", "int8"),
            dtype="bfloat16 as w8f",
            quality=Quality(41.5, 138.2),
            frozen=True,
        ),
        entry("b" * 200, dtype="float32 as bfloat16", decision="skipped", reason="a long and winding reason " * 10),
        entry(""),
    ],
)
def test_table_fits(layer: LayerReport) -> None:
    """No line is longer than 120 columns, none has control characters, and no word of a reason is lost."""
    text = str(Report([layer]))
    assert max(map(len, text.splitlines())) <= 120
    assert re.fullmatch(r"[ -~\n]+", text)
    assert " ".join(text.split()).count("winding") == (layer.reason or "").count("winding")


def test_errors_and_refusals() -> None:
    """Layers alike show the least signal to noise among them; a bucket that int8 lost says so below."""
    runs = answer(8, "int8/avx512_vnni/6x64", "tuned"), answer(32, "fp32/avx512/14x32", "tuned", 1.5, refused="int8")
    table = Report(
        [
            entry(f"layer.{i}.fc", *runs, dtype="float32 as int8", activation=None, quality=Quality(40.0 - i, 30.4 + i))
            for i in range(3)
        ]
        + [entry("head", answer(8, "w8f/avx512/6x64", "cache"), dtype="float32 as w8f", quality=Quality(39.9))]
        + [entry("stock", answer(8, "fp32/avx512/6x64", "cache"))]
    )
    lines = [" ".join(line.split()) for line in str(table).splitlines()]
    assert lines[0] == "layer n in x out weight dB activation M x runs on speed-up MiB"
    assert lines[2] == "layer.*.fc 3 768x3072 fp32 as int8 38/30 8 fp32 int8/avx512_vnni/6x64 27.00"
    assert lines[3:5] == ["32 fp32 fp32/avx512/14x32 1.50x", "(int8 refused)"]
    assert lines[5] == "head 1 768x3072 fp32 as w8f 40 gelu 8 fp32 w8f/avx512/6x64 9.00"
    assert lines[6] == "stock 1 768x3072 fp32 gelu 8 fp32 fp32/avx512/6x64 9.00" and "dB: signal" in str(table)


def test_columns_stand_below_their_heads() -> None:
    """Words of one column begin or end where its head does, however wide the contents are."""
    layers = [
        entry("a.fc", answer(3, "fp32/avx512/6x64", "tuned", 1.0), answer(16384, "torch/linear", "tuned", x="bf16")),
        entry("a" * 200, dtype="float16", decision="skipped", reason="a long and winding reason " * 10),
    ]
    head, _, *lines = str(Report(layers)).splitlines()
    for word in ("fp32/avx512/6x64", "torch/linear", "skipped: a long"):
        assert head.index("runs on") in [line.find(word) for line in lines[:3]]
    for word in ("fp32", "fp16"):
        assert head.index("weight") in [line.find(word) for line in lines[:3]]
    assert lines[1].index("16384") + len("16384") == head.index(" M ") + len(" M")
    assert lines[2].startswith("...aaaaaaaaa")


def test_the_dtype_of_a_pack() -> None:
    """A layer tells the dtype of its parameter and, where that is another one, of its pack; so does its repr."""
    fast = OFF(mlp(8, 8).eval(), dtype=torch.bfloat16)
    (row,) = fastlinear.report(fast)
    assert row.dtype == "float32 as bfloat16" and "dtype=float32 as bfloat16" in repr(fast)
    (row,) = fastlinear.report(OFF(mlp(8, 8).half()))
    assert row.dtype == "float16"


def test_each_format_of_x_has_its_rows() -> None:
    """Calls with other dtypes of x are listed by that, then by M, those under autocast too; all packs are counted."""
    fast = OFF(mlp(64, 64).eval(), dtype=torch.float16)
    with torch.no_grad():
        for dtype, rows in ((torch.float32, 3), (torch.float16, 100), (torch.float16, 3)):
            fast(torch.randn(rows, 64, dtype=dtype))
        (row,) = fastlinear.report(fast)
        assert [(c.x, c.bucket) for c in row.buckets] == [("fp16", 3), ("fp16", _plans.bucket(100)), ("fp32", 3)]
        with torch.autocast("cpu", torch.bfloat16):
            fast(torch.randn(3, 64))
    (after,) = fastlinear.report(fast)
    assert after.buckets[0].x == "bf16" and after.buckets[1:] == row.buckets
    assert after.pack_mib == 2 * row.pack_mib


def test_different_layers_do_not_share_a_row() -> None:
    """Repeated blocks share a row only where shape, activation, plans and reason are equal."""
    one, other = entry("layer.0.fc"), entry("layer.1.fc", out_features=768)
    assert "layer.0.fc" in str(Report([one, other])) and "layer.1.fc" in str(Report([one, other]))
    assert "layer.*.fc" in str(Report([one, entry("layer.7.fc")]))


def test_empty_and_lone() -> None:
    """A model without linear layers reports none; a lone layer has a line too; a stock model says what to do."""
    assert "no linear ones" in str(fastlinear.report(nn.ReLU()))
    (row,) = fastlinear.report(nn.Linear(2, 2))
    assert row.reason == "convert was not called on it"
    assert "(the model)" in str(fastlinear.report(OFF(nn.Linear(2, 2))))
    assert linear.is_fast(OFF(nn.Linear(2, 2)))


def test_report_as_data() -> None:
    """to_dict is what JSON can hold, with plan, speed-up, spread, roofline, memory, quality and calls elsewhere."""
    spot = Spot(0.5, 5e10, 3.0, Roofline("fp32", 1, 1e11, 5e10, 2e10, 1e10))
    plan = answer(8, "fp32/avx512/6x64", "equal", 1.25, spread=0.03, table=(("fp32/avx512/6x64 t1", 0.2),))
    row = entry("a", plan, roofline=(spot,), quality=Quality(40.0, 30.0), elsewhere={"training": 2}, weight_mib=4.5)
    said = json.loads(json.dumps(Report([row]).to_dict()))
    (layer,) = said["layers"]
    (of_plan,) = layer["plans"]
    assert layer["memory"] == {"before": 4.5, "after": 13.5, "packed": 9.0} and layer["elsewhere"] == {"training": 2}
    assert layer["quality"] == {"weight": 40.0, "output": 30.0} and layer["activation"] == ["gelu"]
    wanted = {"rows": 8, "speedup": 1.25, "spread": 0.03, "roofline": 0.5, "gflops": 50.0, "milliseconds": 0.2}
    assert wanted.items() <= of_plan.items() and of_plan["source"] == "measured for an equal layer"
    assert said["environment"]["torch"] == torch.__version__


def test_no_speedup_is_explained() -> None:
    """A plan without a speed-up says why: nothing was measured, or there is nothing to compare with."""
    silent = entry("a", answer(8, "int8/avx512_vnni/6x64", "tuned", table=(("x", 1.0),)), frozen=True)
    assert "frozen" in silent.why_no_speedup(silent.buckets[0]) and "frozen: there is no" in str(Report([silent]))
    assert "rule" in silent.why_no_speedup(answer(8, "x", "heuristic"))
    assert silent.why_no_speedup(answer(8, "x", "tuned", 1.5)) == ""


class Experts(nn.Module):
    """Most of its weights, and all of its attention, are no linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.experts = (
            nn.Embedding(9, 16),
            nn.Linear(16, 16),
            nn.Parameter(torch.randn(3, 16, 16)),
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.table(ids))
        return nn.functional.scaled_dot_product_attention(x, x, x) @ self.experts[0]


def test_the_share_that_runs_fast() -> None:
    """Weights of experts and multiply-adds of attention count as not fast, embeddings not at all."""
    fast, ids = OFF(Experts().eval()), torch.zeros(2, 4, dtype=torch.long)
    found = fastlinear.report(fast, ids)
    assert found.share is not None
    assert (found.share.weights, found.share.fast_weights, found.share.slow) == (4 * 256, 256, (("experts", 768),))
    linear, attention, experts = 8 * 256, 2 * 2 * 4 * 4 * 16, 8 * 256
    assert (found.share.multiply_adds, found.share.fast_multiply_adds) == (linear + attention + experts, linear)
    assert str(found).startswith("fast: 25% of 1024 weights and 40% of 5120 multiply-adds")
    assert fastlinear.report(fast).share.multiply_adds is None
    assert fast.linear._elsewhere == {}  # the count was made of a copy


class Reads(nn.Module):
    """Attention as WavLM has it: torch's function is handed the weights of layers that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.up = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = {f"{name}_proj_weight": getattr(self, name).weight for name in "qkv"}
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        own = (16, 2, torch.empty(0), bias, None, None, False, 0.0, self.out.weight, self.out.bias)
        of = nn.functional.multi_head_attention_forward
        y, _ = of(x, x, x, *own, use_separate_proj_weight=True, need_weights=False, **weights)
        return self.up.forward(y)  # no call of a module's, but of the layer


def test_layers_that_are_read_and_not_called() -> None:
    """Layers by whose weights a model multiplies without calling them are not fast, and the report says so; in a graph
    they are, and their multiply-adds count."""
    model, x = Reads().eval(), torch.randn(6, 2, 16)
    fast = OFF(model)
    for _ in range(2):
        found = fastlinear.report(fast, x)
        assert found.share.uncalled == ("k", "out", "q", "v") and found.share.fast_weights == 256
        assert found.share.fast_multiply_adds == 12 * 256 and str(found).count("without calling it") == 4
        fast(x)
    assert fastlinear.report(fast).share.uncalled == ()
    compiled = torch.compile(model, backend="fastlinear", options={"tune": "off"})
    with torch.no_grad():
        compiled(x)
    share = fastlinear.report(compiled, x).share
    assert (share.uncalled, share.fast_weights) == ((), 5 * 256) and share.fast_multiply_adds >= 5 * 12 * 256


class Attends(nn.Module):
    """Attention by torch's function, spelled out, and of which others read the weights, on rows to which a table of
    positions is added, and a kernel that is made of another."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(16, 48), read
        self.positions, self.kernel = (nn.Parameter(torch.randn(1, 16, 16)) for _ in range(2))
        self.table = nn.Parameter(torch.randn(7, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        rows = self.positions[:, :length] + 2 * self.table[torch.zeros(length, dtype=torch.long)]
        qkv = self.linear(x + rows).view(-1, length, 3, 2, 8)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        y = y + (q @ k.transpose(2, 3)).softmax(-1) @ v
        y = y + (weights := (q @ k.transpose(2, 3)).softmax(-1)) @ v if self.read else y
        y = y + weights.sum() if self.read else y
        return y.transpose(1, 2).flatten(2) @ (self.kernel * 2)[0]


@pytest.mark.parametrize("read", [False, True], ids=["two", "two of three"])
def test_the_share_of_attention_and_tables(read: bool) -> None:
    """What of attention our kernel runs counts as fast, and as it is called, where its size is dynamic; a table that is
    only added is no weight, with or without an example, a parameter that is multiplied after all is a slow one."""
    model, x = Attends(read).eval(), torch.randn(2, 5, 16)
    compiled = torch.compile(model, backend="fastlinear", options={"tune": "off"}, dynamic=True)
    with torch.no_grad():
        compiled(x)
    one, linear, rest = 2 * 2 * 2 * 5 * 5 * 8, 10 * 16 * 48, 10 * 256
    for share in (fastlinear.report(compiled).share, fastlinear.report(compiled, x).share):
        assert (share.weights, share.fast_weights, share.slow) == (4 * 256, 768, (("kernel", 256),))
    assert share.multiply_adds == linear + rest + (3 if read else 2) * one
    assert share.fast_multiply_adds == linear + 2 * one
    stock = fastlinear.report(OFF(Attends(read).eval()), x).share
    assert (stock.weights, stock.fast_multiply_adds) == (4 * 256, linear)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.q, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack((self.q(x), self.k(x), self.v(x))).sum(0)


class Broken(nn.Module):
    """Blocks that Dynamo compiles one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    @torch._dynamo.disable(recursive=False)  # type: ignore[untyped-decorator]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_products_of_several_layers_have_names_of_the_model() -> None:
    """Also where a graph is of a part of the model: names were those within the part, and the same for all blocks."""
    model = torch.compile(Broken().eval(), backend="fastlinear", options={"tune": "off"})
    with torch.no_grad():
        model(torch.randn(3, 8))
    assert [row.name for row in fastlinear.report(model)] == ["blocks.0.(q, k, v)", "blocks.1.(q, k, v)"]
    assert "blocks.1.(q, k, v)" in str(fastlinear.explain(model, "blocks.1.(q, k, v)"))


def test_the_share_of_frozen_and_skipped_layers() -> None:
    """A frozen layer's weight counts as what it was; one that was left alone is named."""
    fast = (
        OFF(mlp(8, 8), exclude="2")
        if len(mlp(8, 8)) > 2
        else OFF(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), exclude="1")
    )
    before = fastlinear.report(fast).share
    after = fastlinear.report(fastlinear.freeze(fast)).share
    assert before == after and before.fast_weights == 64 and len(before.slow) == 1
