"""explain, profile and sensitivity: one layer's tables, where the time goes, and which kinds of layers int8 hurts."""

import json

import pytest
import torch
from models import OFF, Model, mlp
from torch import nn

import fastlinear
import fastlinear._timing as _timing
from fastlinear import Int4Dynamic, Int8Dynamic, Int8Static, Int8WeightOnly
from fastlinear.layer import linear
from fastlinear.layer.frozen import is_frozen


def test_explain_has_the_whole_table() -> None:
    """Every candidate that was measured has its line, best first, beside the verdict; as data too."""
    fast = fastlinear.convert(mlp(24, 40).eval())
    with torch.no_grad():
        fast(torch.randn(5, 24))
    (plan,) = fast[0].plans
    assert len(plan.table) > 1
    said = fastlinear.explain(fast, "0")
    lines = str(said).splitlines()
    assert [name for name, _ in plan.table] == [
        " ".join(line.split()[:-3]) for line in lines if line.endswith("%") and " ms " in line
    ]
    assert plan.name in str(said) and "of the roofline" in str(said) and "24 x 40" in lines[0]
    (of_plan,) = json.loads(json.dumps(said.to_dict()))["plans"]
    assert of_plan["table"] == [[name, ms] for name, ms in plan.table]


def test_explain_tells_why_not() -> None:
    """A layer that was left alone has its reason; a name of no layer is answered with the nearest ones."""
    fast = OFF(Model(1), exclude="head")
    assert "skipped: excluded by 'head'" in str(fastlinear.explain(fast, "head"))
    with pytest.raises(ValueError, match=r"Model has no linear layer 'hed'; the nearest are \['head'"):
        fastlinear.explain(fast, "hed")
    with pytest.raises(TypeError, match=r"explain\(\) takes an nn.Module"):
        fastlinear.explain("head", "head")


class Attending(nn.Module):
    """A fused pair, a layer that is called twice, one that is never called, and something around them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.twice, self.never = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.act(self.up(x)))
        return self.twice(self.twice(x)).softmax(-1)


@pytest.mark.parametrize("freeze", [False, True])
def test_profile_knows_every_layer_and_the_rest(freeze: bool) -> None:
    """Layers have their rows, stock and fast times and the limit, the sums are those of the pass, and fused activations
    stay fused while they are timed; the model is as it was."""
    fast = OFF(Attending().eval(), freeze=freeze)
    found = fastlinear.profile(fast, torch.randn(3, 16), seconds=0)
    assert {layer.name: layer.rows for layer in found.layers} == {"up": 3, "down": 3, "twice": 6}
    assert all(layer.stock > 0 and layer.fast > 0 and layer.limit is not None for layer in found.layers)
    assert found.around_stock >= 0 and found.around_fast >= 0 and found.rounds >= 3
    assert "aten::gelu" not in dict(found.operations) and "aten::_softmax" in dict(found.operations)
    assert "around the layers" in str(found) and json.loads(json.dumps(found.to_dict()))["rounds"] == found.rounds
    assert fast.up.activation is not None and not fast.up._forward_hooks
    assert linear.is_fast(fast.up) and is_frozen(fast.up) == freeze


class Joined(nn.Module):
    """Layers that others compute: a group's, those of attention to itself and to another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.both = fastlinear.FastLinearGroup([nn.Linear(16, 16), nn.Linear(16, 24)])
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.both(x)[0]
        x = self.own(x, x, x)[0]
        return self.cross(x, y, y)[0]


def test_what_computes_a_layer_is_told() -> None:
    """Groups and attention have rows of what runs, in report, explain and profile, and count as fast."""
    fast, example = OFF(Joined().eval()), (torch.randn(2, 3, 16), torch.randn(2, 5, 16))
    with torch.inference_mode():
        fast(*example)
    found = fastlinear.report(fast, example)
    of_cross = {f"cross.in_proj ({part})": rows for part, rows in (("query", 6), ("key", 10), ("value", 10))}
    assert {row.name for row in found} == {"both", "own.in_proj", "own.out_proj", *of_cross, "cross.out_proj"}
    assert all(row.buckets[0].bucket >= of_cross[row.name] for row in found if row.name in of_cross)
    assert all(row.decision == "fast" for row in found) and found.share.fast_weights == found.share.weights
    products = 6 * 16 * 40 + 6 * 16 * 64 + 16 * 16 * (6 + 10 + 10 + 6)
    assert found.share.fast_multiply_adds == products < found.share.multiply_adds
    assert "16 x 40" in str(fastlinear.explain(fast, "both.layers.1"))
    assert "16 x 16" in str(fastlinear.explain(fast, "cross.in_proj (key)"))
    profile = fastlinear.profile(fast, example, seconds=0)
    times = {layer.name: layer for layer in profile.layers}
    assert set(times) == {row.name for row in found} and all(layer.fast > 0 for layer in profile.layers)
    assert times["own.in_proj"].stock is None and profile.around_stock is None and "nan" not in str(profile)


def test_a_compiled_model_has_its_profile() -> None:
    """Layers of the graph are timed, those that are one product together, and explained by their own names."""
    model = Attending().eval()
    compiled, x = torch.compile(model, backend="fastlinear", options={"tune": "off"}), torch.randn(3, 16)
    profile = fastlinear.profile(compiled, x, seconds=0)
    assert {layer.name: layer.rows for layer in profile.layers} == {"up": 3, "down": 3, "twice": 6}
    assert all(layer.fast not in (0, layer.stock) for layer in profile.layers)
    assert "gelu" in str(fastlinear.explain(compiled, "up"))
    assert fastlinear.report(compiled, x).share.fast_weights == 2 * 16 * 32 + 16 * 16


class Bare(nn.Module):
    """A weight of no layer, and a vector that has the dimensions of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(40, 16)), nn.Parameter(torch.randn(1, 1, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight) * self.scale


class Sloping(nn.Linear):
    """A model that takes a gradient in its forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: super(Sloping, self).forward(row).square().sum()))(x)


def test_multiply_adds_are_those_of_all_that_runs() -> None:
    """Those by a parameter of no layer that a graph runs fast count as fast; those of a recurrence, which torch does
    not count, and of a forward that takes a gradient are counted; vectors are no weights of products."""
    compiled = torch.compile(Bare().eval(), backend="fastlinear", options={"tune": "off"})
    x = torch.randn(3, 16)
    with torch.no_grad():
        compiled(x)
    assert fastlinear.report(compiled, x).share == (640, 640, (), 3 * 640, 3 * 640, ())
    lstm = nn.LSTM(16, 16).eval()
    assert fastlinear.report(lstm, torch.randn(5, 2, 16)).share.multiply_adds == 5 * 2 * 2 * 4 * 16 * 16
    assert fastlinear.report(nn.Sequential(Sloping(16, 16)), x).share.multiply_adds == 2 * 3 * 16 * 16


def test_timing_leaves_layers_fused() -> None:
    """While calls are timed a layer still proves that its output goes to its activation."""
    fast, x = OFF(Attending().eval()), torch.randn(3, 16)
    with torch.no_grad():
        fast(x)  # the first call after Dynamo ran may go to the activation itself
    calls: list[str] = []
    fast.act._apply_original = lambda x: calls.append("original")
    _timing.tell_times(lambda layer, seconds: calls.append(layer._name))
    try:
        with torch.no_grad():
            y = fast(x)
    finally:
        _timing.tell_times(None)
    assert calls == ["up", "down", "twice", "twice"]
    torch.testing.assert_close(y, fast(x))


class Fragile(nn.Module):
    """Layers `a` have weights that int8 ruins, one large number a row; layers `b` have none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}) for _ in range(2))
        with torch.no_grad():
            for block in self.blocks:
                block["a"].weight[:, 0] = 300.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["b"](block["a"](x) * 0.01)
        return x


def test_sensitivity_finds_what_hurts() -> None:
    """Kinds are ranked by the measured loss, and the worst is proposed for exclude, with the loss that leaves."""
    model, batches = Fragile().eval(), [torch.cat([torch.zeros(4, 1), torch.randn(4, 15)], 1) for _ in range(2)]
    found = fastlinear.sensitivity(model, batches)
    assert [kind.pattern for kind in found.kinds] == ["blocks.*.a", "blocks.*.b"]
    assert [kind.names for kind in found.kinds] == [("blocks.0.a", "blocks.1.a"), ("blocks.0.b", "blocks.1.b")]
    assert found.kinds[0].loss > 2 * found.kinds[1].loss > 0
    assert fastlinear.sensitivity(model, batches, quantize=Int8WeightOnly()).everything < found.everything
    assert found.exclude == ("blocks.*.a",) and found.excluded <= found.target < found.everything
    fast = OFF(model, quantize=Int8Dynamic(), exclude=list(found.exclude))
    with torch.no_grad():
        left = sum(float((fast(x) - model(x)).norm() / model(x).norm()) for x in batches) / 2
    assert left == pytest.approx(found.excluded, rel=0.01)
    assert "exclude=['blocks.*.a']" in str(found) and not any(map(linear.is_fast, model.modules()))


def test_sensitivity_asks_the_users_metric() -> None:
    """metric(output, reference) is what ranks; a target that is met proposes nothing; training mode comes back."""
    model, seen = Fragile().train(), []

    def metric(output: torch.Tensor, reference: torch.Tensor) -> float:
        seen.append((output.shape, reference.shape))
        return 7.0

    found = fastlinear.sensitivity(model, [torch.randn(3, 16)], metric=metric, target=8.0)
    assert found.everything == 7.0 and found.exclude is None and {*seen} == {(torch.Size([3, 16]),) * 2}
    assert model.training
    with pytest.raises(ValueError, match="no batches"):
        fastlinear.sensitivity(model, [])
    with pytest.raises(ValueError, match="no layer of ReLU can be quantized"), pytest.warns(UserWarning):
        fastlinear.sensitivity(nn.ReLU(), [torch.ones(2)])


def test_quality_is_a_layers_own() -> None:
    """The error of the output stays while an uncalibrated copy, which shares the pack, is alive, and when frozen."""
    model, x = mlp(16, 16).eval(), torch.randn(64, 16)
    plain = OFF(model, quantize=Int8Dynamic())
    static = fastlinear.calibrate(model, [x])
    calibrated = OFF(model, quantize=Int8Dynamic(calibration=static))
    with torch.no_grad():
        plain(x), calibrated(x)
    assert plain[0]._engine.packed is calibrated[0]._engine.packed
    (first,), (second,) = fastlinear.report(plain), fastlinear.report(calibrated)
    assert first.quality.output is None and second.quality.output is not None
    assert fastlinear.report(fastlinear.freeze(calibrated))[0].quality == second.quality
    assert Int8Static(static).calibration is static


def test_a_kernel_is_forced_for_one_layer() -> None:
    """force has one layer run a kernel, says what it may be, and ends with None; others are as they were."""
    fast, x = OFF(mlp(16, 16, 16).eval()), torch.randn(5, 16)
    with torch.no_grad():
        want = fast(x)
    layout = fast[0]._engine.packed.layout
    names = [row["name"] for row in fastlinear.kernels() if row["runnable"] and layout in row["reads"]]
    with torch.no_grad():
        for name in (*names, "torch/linear"):
            assert fastlinear.force(fast, "0", name) is fast
            torch.testing.assert_close(fast(x), want)
            assert [(plan.name, plan.source) for plan in fast[0].plans] == [(name, "forced")]
        assert "fixed by fastlinear.force" in str(fastlinear.report(fast))
        fastlinear.force(fast, "0", None)
        fast(x)
    assert {plan.source for layer in (fast[0], fast[2]) for plan in layer.plans} == {"heuristic"}
    with pytest.raises(
        ValueError, match=f"FastLinear '0' cannot run 'fp32/none/1x1' here; it may be one of {names[0]}"
    ):
        fastlinear.force(fast, "0", "fp32/none/1x1")
    with pytest.raises(ValueError, match=r"no fast layer 'x'; the nearest are \['"):
        fastlinear.force(fast, "x", names[0])


def test_a_kernel_is_forced_for_a_layer_in_groups() -> None:
    """A layer of 4 bits, frozen or not, runs the kernels that read its panels, however these are scaled."""
    fast, x = OFF(mlp(64, 32).eval(), quantize=Int4Dynamic()), torch.randn(1, 64)
    names = [row["name"] for row in fastlinear.kernels() if row["runnable"] and row["rows"] == "int8"]
    names = [name for name in names if name.startswith("int4/")]
    for layers in (fast, fastlinear.freeze(fast)):
        with torch.no_grad():
            want = layers(x)
            for name in names:
                torch.testing.assert_close(fastlinear.force(layers, "0", name)(x), want)
                assert [(plan.name, plan.source) for plan in layers[0].plans] == [(name, "forced")]


def test_what_is_nearly_right_is_told() -> None:
    """A scheme's class instead of a scheme, and a mapping that is one argument, are answered with what to write."""
    with pytest.raises(TypeError, match=r"such as Int8Dynamic\(\.\.\.\), but is the class Int8Dynamic itself"):
        fastlinear.convert(mlp(8, 8), quantize=Int8Dynamic)
    with pytest.raises(TypeError, match=r"Sequential.forward does not have .* in a tuple: \(features,\)"):
        fastlinear.calibrate(mlp(8, 8), [{"features": torch.randn(2, 8)}])
