"""convert on layers that other packages quantized: they are told by their attributes, and their very codes multiply."""

import copy
import pickle
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import packers
import pytest
import torch
from packers import GROUP, SCHEMES, Parts
from torch import Tensor, nn

import fastlinear
from fastlinear.layer import takeover

N, K = 64, 128


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heuristic chooses: these tests are of bits."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")


# ---- stand-ins: the attributes that the classes of these packages have ----


class InBuffers(nn.Module):
    """QuantLinear of AutoGPTQ and gptqmodel, WQLinear_GEMM of AutoAWQ."""

    def __init__(self, parts: Parts, **settings: Any) -> None:
        super().__init__()
        for name, tensor in parts.items():
            self.register_buffer(name, tensor.contiguous())
        self.register_buffer("bias", torch.randn(N).half())
        vars(self).update({"in_features": K, "out_features": N, **settings})

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("needs its package")


def in_buffers(parts: Parts, told: dict[str, Any]) -> nn.Module:
    if told["quant_method"] == "awq" or "awq" in told.get("packing_format", ""):
        return InBuffers(parts, w_bit=4, group_size=GROUP)
    form = 2 if told.get("checkpoint_format") == "gptq_v2" else 1
    return InBuffers(parts, bits=told["bits"], sym=told.get("sym", True), qzero_format=lambda: form)


def compressed(parts: Parts, told: dict[str, Any]) -> nn.Module:
    """A linear layer of compressed-tensors: another forward, and other parameters."""
    layer: Any = nn.Linear(K, N)
    del layer.weight
    for name, tensor in parts.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    weights = SimpleNamespace(**told["config_groups"]["group_0"]["weights"])
    layer.quantization_scheme, layer.forward = SimpleNamespace(weights=weights), lambda x: x
    return layer


class FP8Linear(nn.Linear):
    def __init__(self, parts: Parts, block: list[int]) -> None:
        super().__init__(K, N)
        self.block_size = tuple(block)
        self.weight = nn.Parameter(parts["weight"], requires_grad=False)
        self.weight_scale_inv = nn.Parameter(parts["weight_scale_inv"], requires_grad=False)


class HQQLinear(nn.Module):
    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.W_q = nn.Parameter(parts["W_q"], requires_grad=False)
        self.meta = {"axis": 1, "nbits": 4, "group_size": GROUP, "shape": (N, K), "view_as_float": False,
                     "scale": parts["scale"], "zero": parts["zero"]}  # fmt: skip
        self.bias, self.in_features, self.out_features = torch.randn(N), K, N


class Params4bit(nn.Parameter):
    quant_state: Any = None
    quant_type = "nf4"


def linear_4bit(parts: Parts, told: dict[str, Any]) -> nn.Module:
    layer = nn.Linear(K, N)
    state = {name.removeprefix("weight."): tensor for name, tensor in parts.items() if name != "weight"}
    weight = Tensor._make_subclass(Params4bit, parts["weight"], False)
    weight.quant_state = SimpleNamespace(as_dict=lambda packed: state)
    layer._parameters["weight"] = weight
    layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    return layer


class Int8Params(nn.Parameter):
    has_fp16_weights = False
    CB: Any = None
    SCB: Any = None


def linear_8bit(parts: Parts) -> nn.Module:
    layer = nn.Linear(K, N)
    weight = Tensor._make_subclass(Int8Params, parts["weight"], False)
    weight.CB, weight.SCB = parts["weight"], parts["SCB"]
    layer._parameters["weight"] = weight
    layer.__class__ = type("Linear8bitLt", (nn.Linear,), {})
    return layer


STANDS_FOR: dict[str, Callable[[Parts, dict[str, Any]], nn.Module]] = {
    "gptq": in_buffers,
    "auto-round": in_buffers,
    "awq": in_buffers,
    "compressed-tensors": compressed,
    "fp8": lambda parts, told: FP8Linear(parts, told["weight_block_size"]),
    "hqq": lambda parts, told: HQQLinear(parts),
    "bitsandbytes": lambda parts, told: linear_8bit(parts) if "SCB" in parts else linear_4bit(parts, told),
}


def quantized(scheme: str) -> tuple[Tensor, nn.Module]:
    """A weight in fp64, and a layer of the package that quantized it."""
    torch.manual_seed(1)
    pack, told, _ = SCHEMES[scheme]
    weight, parts = pack(N, K)
    return weight, STANDS_FOR[told["quant_method"]](parts, told)


def around(layer: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(K, dtype=dtype), layer, nn.ReLU(), nn.Linear(N, 8, dtype=dtype)).eval()


def agrees(fast: nn.Module, weight: Tensor, bias: Tensor | None, tolerance: float = 1e-5) -> None:
    """A layer's answer is the fp64 product by the weight that the codes stand for."""
    x = torch.randn(5, weight.shape[1])
    with torch.inference_mode():
        want = nn.functional.linear(x.double(), weight, None if bias is None else bias.double()).relu()
        y = fast(x)
    assert float((y.double().relu() - want).norm() / want.norm()) < tolerance


# ---- what is taken over ----


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_format(scheme: str, inplace: bool) -> None:
    """The layer's weight is the format's formula in fp64 on the stored codes, it is packed as narrow as the reader of
    checkpoints packs it, the activation is fused, the bias kept; without `inplace` the model keeps its own layer."""
    weight, layer = quantized(scheme)
    model, kind, state = around(layer), type(layer), dict(vars(layer))
    bias = vars(layer).get("bias", dict(layer.named_parameters()).get("bias", dict(layer.named_buffers()).get("bias")))
    fast = fastlinear.convert(model, inplace=inplace)
    found = fast[1]
    assert type(found) is fastlinear.FastLinear and found._frozen.packed.format == SCHEMES[scheme][2]
    exact = scheme not in ("hqq", "nf4 nested")  # whose zero points, or scales, are floats of their own
    torch.testing.assert_close(found.weight, weight.float(), rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
    assert found.activation.name == "relu" and not found.training
    agrees(found, weight, bias)
    row = next(row for row in fastlinear.report(fast) if row.name == "1")
    unpacked = SCHEMES[scheme][2] == "fp32"
    assert row.frozen and row.origin.startswith("unpacked from" if unpacked else "from")
    assert inplace or (type(model[1]) is kind and vars(model[1]).keys() == state.keys())
    assert type(fastlinear.unconvert(fast)[1]) is nn.Linear
    assert torch.equal(fast[1].weight, found.weight) and fast[1].bias.dtype is torch.float32


def int4_tensor(torchaos_own: bool) -> tuple[Tensor, Tensor]:
    """torchao's Int4Tensor (two codes in a byte), or IntxUnpackedToInt8Tensor, by their parts."""
    codes, scale = torch.randint(-8, 8, (N, K)).to(torch.int8), packers.scales(N, K // GROUP, torch.bfloat16)
    made: Any = Tensor._make_wrapper_subclass(Parted, (N, K), dtype=torch.bfloat16)
    made.block_size, by_k = (1, GROUP), packers.spread(scale, K)
    if torchaos_own:
        zero = torch.randn(N, K // GROUP).bfloat16()
        made.qdata = codes[:, ::2] & 15 | codes[:, 1::2] << 4
        made.scale, made.zero_point = scale.t().contiguous(), zero.t().contiguous()
        return by_k * codes + packers.spread(zero, K), made
    zero = torch.randint(-8, 8, (N, K // GROUP)).to(torch.int8)
    made.qdata, made.scale, made.zero_point, made.target_dtype = codes, scale, zero, torch.int4
    return by_k * (codes - packers.spread(zero, K)), made


class Parted(Tensor):
    def __repr__(self, **_: object) -> str:
        return "Parted()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default, f"{func} would need the numbers"
        return args[0]


@pytest.mark.parametrize("torchaos_own", [True, False])
def test_torchao(torchaos_own: bool) -> None:
    """Of 4 bits, in a byte each or two of them."""
    torch.manual_seed(1)
    weight, tensor = int4_tensor(torchaos_own)
    layer = nn.Linear(K, N, bias=False)
    layer._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)
    fast = fastlinear.convert(around(layer))[1]
    assert fast._frozen.packed.format == "int4"
    torch.testing.assert_close(fast.weight.double(), weight, rtol=1e-6, atol=1e-6)
    agrees(fast, weight, None)


def test_the_real_torchao() -> None:
    ao = pytest.importorskip("torchao.quantization", reason="torchao makes the tensors itself")
    for dtype, packed in ((torch.int4, "int4"), (torch.int8, "int8g")):
        model = around(nn.Linear(K, N))
        config = ao.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=ao.PerGroup(32))
        ao.quantize_(model, config, filter_fn=lambda module, name: name == "1")
        weight, bias = model[1].weight.dequantize(), model[1].bias
        fast = fastlinear.convert(model)[1]
        assert torch.equal(fast.weight, weight) and fast._frozen.packed.format == packed
        agrees(fast, weight.double(), bias.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits(dtype: torch.dtype) -> None:
    """The weight shows the dtype of the model around it, whatever that of its scales is, and x is multiplied as it
    is."""
    _, layer = quantized("gptq v1")
    fast = fastlinear.convert(around(layer, dtype))
    assert fast[1].weight.dtype is dtype and fast[1].bias.dtype in (torch.float32, dtype)
    with torch.inference_mode():
        assert fast(torch.randn(3, K, dtype=dtype)).dtype is dtype
    assert fast[1]._frozen.packed.format == "int4"


def test_a_layer_by_itself() -> None:
    weight, layer = quantized("awq")
    fast = fastlinear.FastLinear.from_linear(layer, activation="relu")
    assert torch.equal(fast.weight, weight.half()) and isinstance(layer, InBuffers)
    agrees(fast.eval(), weight, layer.bias)


@pytest.mark.parametrize("scheme", ["hqq", "gptq order, zeros", "fp8", "fp8 by channel"])
def test_what_is_taken_over_lives_on(scheme: str, tmp_path: Any) -> None:
    """Copied, pickled, saved and loaded without the package."""
    _, layer = quantized(scheme)
    fast, x = fastlinear.convert(around(layer)), torch.randn(3, K)
    fastlinear.save(fast, tmp_path / "m.safetensors")
    loaded = fastlinear.load(tmp_path / "m.safetensors", around(nn.Linear(K, N)))
    with torch.inference_mode():
        want = fast(x)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded):
            assert torch.equal(other(x), want)
            assert other[1]._frozen.packed.layout == fast[1]._frozen.packed.layout


class Siblings(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@pytest.mark.parametrize("alike", [False, True])
def test_siblings_in_an_order(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that take the columns of x in one order, as GPTQ leaves q, k and v, are one call of a compiled graph;
    those of different orders are none, for x is put in order for all at once. Either answers as each layer alone."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")
    layers: list[Any] = [quantized("gptq order")[1] for _ in range(2)]
    if not alike:
        layers[1].g_idx = layers[1].g_idx[torch.randperm(K)]
    model = fastlinear.convert(Siblings(*layers).eval(), quantize=fastlinear.Int4Dynamic())
    fast: Any = torch.compile(model, backend="fastlinear")
    for rows in (1, 1, 7):
        x = torch.randn(rows, K)
        with torch.inference_mode():
            for y, want in zip(fast(x), model(x), strict=True):
                assert torch.equal(y, want)
    whys = [node.why for node in fastlinear.report(fast).graphs[0].nodes]
    assert any(why.startswith("one call of") for why in whys) == alike


def test_nothing_becomes_fp8() -> None:
    """A layer of fp8 that gets a Parameter, for good or for a call, multiplies by that as it is, and by its own fp8
    under autocast, which packs nothing more."""
    weight, layer = quantized("fp8")
    fast = fastlinear.convert(around(layer))[1]
    bias, other, x = fast.bias.detach(), torch.randn(N, K), torch.randn(3, K)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype is torch.bfloat16 and fast.pack_nbytes == fast._frozen.packed.nbytes
    lent = torch.func.functional_call(fast, {"weight": other}, (x,))
    torch.testing.assert_close(lent.relu(), nn.functional.linear(x, other, bias).relu())
    assert fast._frozen.packed.format == "fp8"
    fastlinear.unfreeze(fast)
    assert torch.equal(fast.weight, weight.float()) and fast.packed_as == "fp32"
    agrees(fast, weight, bias)
    with torch.no_grad():
        fast.weight.copy_(other)
    agrees(fast, other.double(), bias)
    assert fastlinear.freeze(fast)._frozen.packed.format == "fp32"


def test_fp8_that_is_no_number() -> None:
    """Kernels have no NaN of fp8: a weight that has one is unpacked."""
    layer: Any = quantized("fp8")[1]
    layer.weight.data.view(torch.uint8)[3, 5] = 0xFF
    fast = fastlinear.convert(around(layer))[1]
    assert fast._frozen.packed.format == "fp32" and fast._frozen.origin.startswith("unpacked from")
    odd = fast.weight.isnan()
    assert bool(odd[3, 5]) and int(odd.sum()) == 1


def test_hooks_stay() -> None:
    seen = []
    _, layer = quantized("gptq v1")
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    fastlinear.convert(around(layer))(torch.randn(3, K))
    assert seen == [(3, N)]


# ---- schemes on top ----


def test_what_inputs_become() -> None:
    """Int4Dynamic and Int8Dynamic quantize inputs, and take codes of their bits as they are; what they cannot multiply
    has a reason, and other layers of the model are quantized beside it."""
    for scheme, asked in (
        ("gptq v1", fastlinear.Int4Dynamic()),
        ("compressed zeros", fastlinear.Int4Dynamic()),
        ("gptq order, zeros", fastlinear.Int4Dynamic()),
        ("gptq v1", fastlinear.Int4WeightOnly()),
        ("integers", fastlinear.Int8Dynamic()),
        ("integers", fastlinear.Int8WeightOnly()),
    ):
        weight, layer = quantized(scheme)
        fast = fastlinear.convert(around(layer), quantize=asked, fuse=False)
        assert fast[1].precision.rows == asked.rows("1") and torch.equal(fast[1].weight, weight.float())
        bias = fast[1].bias.detach()
        agrees(fast[1], weight, bias, 0.02 if asked.rows("") is not None else 1e-5)
    for scheme, asked, reason in (
        ("gptq v1", fastlinear.Int8Dynamic(), "its weight is quantized already, to 4 bits in groups"),
        ("integers", fastlinear.Int4WeightOnly(), "its weight is quantized already, to 8 bits"),
        ("nf4", fastlinear.Int4Dynamic(), "its codes stand for other numbers than integers or halves"),
    ):
        fast = fastlinear.convert(around(quantized(scheme)[1]), quantize=asked)
        assert not fastlinear.report(fast)[0].frozen and reason in str(fastlinear.report(fast)[0].reason)
        assert type(fast[3]) is fastlinear.FastLinear
    fast = fastlinear.convert(around(quantized("fp8")[1]), quantize=fastlinear.Int8WeightOnly())
    assert fast[1]._frozen.packed.format == "w8f"  # schemes quantize fp8 anew, as they do floats


# ---- what is left alone ----


def changed(scheme: str, change: Callable[[Any], object]) -> Any:
    layer = quantized(scheme)[1]
    change(layer)
    return layer


LEFT: dict[str, tuple[Callable[[], Any], str]] = {
    "3 bits": (lambda: changed("gptq v1", lambda m: vars(m).update(bits=3)), "of GPTQ: its bits are 3, and 4 and 8"),
    "AWQ gemv": (
        lambda: changed("awq", lambda m: setattr(m, "qweight", torch.zeros(N, K // 8, dtype=torch.int32))),
        "of AWQ: it is of AWQ's version 'gemv', and 'gemm' is supported",
    ),
    "HQQ axis 0": (
        lambda: changed("hqq", lambda m: m.meta.update(axis=0)), r"of HQQ: its axis is \[0\], and 1 is supported",
    ),
    "HQQ 3 bits": (lambda: changed("hqq", lambda m: m.meta.update(nbits=3)), r"its nbits is \[3\], and 4"),
    "HQQ with scales of 8 bits": (lambda: changed("hqq", lambda m: m.meta.pop("scale")), "its scale is quantized, too"),
    "gptqmodel, called": (lambda: changed("gptq v1", lambda m: vars(m).update(linear_mode="inference")), "repacked"),
    "bitsandbytes, called": (
        lambda: changed("nf4", lambda m: setattr(m.weight.quant_state, "packing_format_for_cpu", True)), "repacked",
    ),
    "bitsandbytes, not quantized": (
        lambda: changed("nf4", lambda m: setattr(m.weight, "quant_state", None)), "has not quantized its weight yet",
    ),
    "nvfp4": (lambda: changed("compressed", lambda m: delattr(m, "weight_shape")), "pack-quantized, int8 and fp8 are"),
    "elsewhere": (lambda: changed("awq", lambda m: m.to("meta")), "its qweight is on device meta"),
    "a group that does not fit": (
        lambda: changed("compressed", lambda m: setattr(m.weight_scale, "data", torch.ones(N, 7).half())),
        "it has 7 groups of 128 inputs, and groups of 16, 32, 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT)
def test_left_alone(what: str) -> None:
    """With a reason in the report, at the layer's name, and not a bit of it changed."""
    make, reason = LEFT[what]
    layer = make()
    model, kind, state = around(layer), type(layer), dict(vars(layer))
    fast = fastlinear.convert(model, inplace=True)
    row = fastlinear.report(fast)[0]
    assert row.name == "1" and row.decision == "skipped"
    assert re.search(reason, str(row.reason)), row.reason
    assert type(layer) is kind and all(vars(layer)[key] is value for key, value in state.items())
    assert type(fast[3]) is fastlinear.FastLinear and "skipped" in str(fastlinear.report(fast))
    with pytest.raises(ValueError, match="cannot become a FastLinear"):
        fastlinear.FastLinear.from_linear(layer)


def test_what_fails_later_gives_them_back() -> None:
    _, layer = quantized("gptq v1")
    model, kind, state = around(layer), type(layer), dict(vars(layer))
    with pytest.raises(RuntimeError):
        fastlinear.convert(model, inplace=True, tune="now", example_inputs=torch.ones(1, 99))
    assert type(model[1]) is kind and vars(layer) == state and type(model[3]) is nn.Linear


def test_plain_layers_are_not_foreign() -> None:
    """Nor are fast ones, frozen or not, whose weight is then not unpacked to be asked."""
    plain = nn.Linear(K, N)
    frozen: Any = fastlinear.convert(nn.Sequential(plain), freeze=True)[0]
    assert not any(map(takeover.is_foreign, (plain, frozen, nn.Embedding(4, 4), nn.LayerNorm(4), around(plain))))
    assert frozen._frozen.reads == 0


# ---- the packages themselves ----


@pytest.mark.parametrize("nested", [False, True])
def test_the_real_bitsandbytes(nested: bool) -> None:
    """Taken over before their first call; afterwards left alone where that has repacked the weight."""
    bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the package whose layers these are")
    layer = bnb.nn.Linear4bit(K, N, quant_type="nf4", compress_statistics=nested)
    assert "has not quantized" in str(takeover.found(layer))
    layer = layer.to("cpu")
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    fast, bias = fastlinear.convert(around(layer))[1], layer.bias.detach()
    torch.testing.assert_close(fast.weight, weight, rtol=1e-6 if nested else 0, atol=0)
    agrees(fast, weight.double(), bias)
    with torch.no_grad():
        layer.eval()(torch.randn(2, K))
    told = takeover.found(layer)
    assert isinstance(told, takeover.Found) != bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def test_the_real_int8_of_bitsandbytes() -> None:
    """Taken over before their first call and after it; those that stay floats are linear layers."""
    bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the package whose layers these are")
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    assert "has not quantized" in str(takeover.found(layer))
    layer = layer.to("cpu")
    values, largest = layer.weight.data.double(), layer.weight.SCB
    weight, bias = values * (largest.double() / 127)[:, None], layer.bias.detach().float()
    for _ in range(2):
        fast = fastlinear.convert(around(layer))[1]
        torch.testing.assert_close(fast.weight, weight.float(), rtol=1e-6, atol=0)
        assert fast._frozen.packed.format == "w8f"
        agrees(fast, weight, bias)
        with torch.no_grad():
            layer.eval()(torch.randn(2, K))
    assert takeover.found(bnb.nn.Linear8bitLt(K, N, has_fp16_weights=True)) is None


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_the_real_compressed_tensors(preset: str) -> None:
    """As transformers leaves them: compressed, with a hook of the model's that would unpack them in the first call."""
    reason = "compressed-tensors is the package whose layers these are"
    quantization: Any = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    from compressed_tensors.compressors import ModelCompressor

    torch.manual_seed(1)
    model = around(nn.Linear(K, N))
    told = quantization.QuantizationConfig(config_groups={preset: ["Linear"]}, ignore=["3"])
    quantization.apply_quantization_config(model, told)
    layer: Any = model[1]
    with torch.no_grad():
        layer.weight_scale.fill_(1 / 64)
        if "ASYM" in preset:
            layer.weight_zero_point.copy_(torch.randint(-8, 8, layer.weight_zero_point.shape))
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    assert "weight_packed" in layer._parameters
    fast, x = fastlinear.convert(model), torch.randn(3, K)
    assert type(fast[1]) is fastlinear.FastLinear and not fast._forward_pre_hooks and model._forward_pre_hooks
    with torch.inference_mode():
        y, want = fast(x), model(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(fast[1].weight, model[1].weight)  # which the call has unpacked


def test_the_real_fp8() -> None:
    """transformers' own class."""
    module: Any = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="transformers has the class")
    weight, parts = packers.fp8(N, K)
    layer = module.FP8Linear(K, N, block_size=(128, 128))
    layer.weight.data, layer.weight_scale_inv.data = parts["weight"], parts["weight_scale_inv"]
    fast = fastlinear.convert(around(layer))[1]
    assert torch.equal(fast.weight, weight.float())
    agrees(fast, weight, None)
