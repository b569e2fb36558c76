"""What calibration sees of a model, and what it makes of it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import OFF, Model, inputs, mlp
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlinear
from fastlinear import Calibration, calibrate
from fastlinear.model import calibration
from fastlinear.spec.int8 import Rows, output_snr, quantize_rows, quantize_weight

UNREACHED = "no batch of the calibration reached it"


def single(k: int = 3, n: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(k, n))


def scale_and_zero(found: Calibration, name: str = "0") -> tuple[float, int]:
    return found.layers[name].scale, found.layers[name].zero


def fp32(value: float) -> float:
    return float(np.float32(value))


# ---- ranges ----------------------------------------------------------------------------------------------------------


def test_a_range_by_hand() -> None:
    """min-max over all batches, to 0 ... 255 or, symmetric, by max |x| about 128; 0 always belongs to the range."""
    batches = [torch.tensor([[0.0, 1.0, -55.0]]), torch.tensor([[200.0, 7.0, 7.0], [1.0, 1.0, 1.0]])]
    assert scale_and_zero(calibrate(single(), batches)) == (1.0, 55)
    assert scale_and_zero(calibrate(single(), batches, symmetric=True)) == (
        fp32(np.float32(200) / np.float32(127)),
        128,
    )
    positive = calibrate(single(), [torch.tensor([[51.0, 102.0, 255.0]])])
    assert scale_and_zero(positive) == (1.0, 0)
    negative = calibrate(single(), [torch.tensor([[-51.0, -102.0, -255.0]])])
    assert scale_and_zero(negative) == (1.0, 255)


def test_the_range_is_that_of_dynamic_rows() -> None:
    """Of one row, static quantization with its own range is the very dynamic quantization."""
    x = torch.randn(1, 64)
    for symmetric, kind in ((False, "asymmetric"), (True, "symmetric")):
        observed = calibrate(single(64), [x], symmetric=symmetric).layers["0"]
        static = quantize_rows(x, Rows("static", observed.scale, observed.zero))
        assert all(map(torch.equal, static, quantize_rows(x, Rows(kind))))


@pytest.mark.parametrize("percentile", [90, 99.9, 100])
def test_percentiles_are_those_of_numpy(percentile: float) -> None:
    """of all values seen, while these are few; symmetric: of their absolute values."""
    batches = [torch.randn(50, 3) * 4 + 1 for _ in range(7)]
    everything = torch.cat(batches).double().numpy()
    low, high = (np.float32(np.percentile(everything, p)) for p in (100 - percentile, percentile))
    found = calibrate(single(), batches, method="percentile", percentile=percentile)
    expected = np.float32(high / np.float32(255)) - np.float32(low / np.float32(255))
    assert scale_and_zero(found) == (pytest.approx(expected, rel=1e-6), int(np.rint(-low / expected)))
    found = calibrate(single(), batches, method="percentile", percentile=percentile, symmetric=True)
    high = np.percentile(np.abs(everything), percentile)
    assert scale_and_zero(found) == (pytest.approx(high / 127, rel=1e-6), 128)
    if percentile == 100:
        assert scale_and_zero(found) == scale_and_zero(calibrate(single(), batches, symmetric=True))


def test_percentiles_keep_0_within_the_range() -> None:
    """also where all that was seen is of one sign."""
    for sign, zero in ((1, 0), (-1, 255)):
        found = calibrate(single(), [sign * (torch.rand(50, 3) + 2)], method="percentile", percentile=90)
        assert found.layers["0"].zero == zero and 2 / 255 < found.layers["0"].scale < 3 / 255


def test_percentiles_keep_rare_outliers_out() -> None:
    """One value in ten thousand does not cost the others their precision."""
    x = torch.rand(500, 32)
    x[7, 3] = 1000.0
    layer = single(32)
    scales = [calibrate(layer, [x], method=method).layers["0"].scale for method in ("minmax", "percentile")]
    assert scales[0] == pytest.approx(1000 / 255) and scales[1] == pytest.approx(1 / 255, rel=0.01)
    rows = [Rows("static", scale, 0) for scale in scales]
    weight = layer[0].weight.detach()
    snr = [output_snr(x[10:], weight, quantize_weight(weight), way) for way in rows]
    assert snr[1] > snr[0] + 30


def test_a_sample_stands_for_many_values() -> None:
    """Beyond what is kept, percentiles are those of a fair sample: each batch weighs as much as the next."""
    batches = [torch.rand(4000, 64) + i for i in range(5)]  # 1.28 million values, evenly from 0 to 5
    assert sum(map(torch.numel, batches)) > 4 * calibration._VALUES
    observed = calibrate(single(64), batches, method="percentile", percentile=90, symmetric=True).layers["0"]
    assert observed.scale * 127 == pytest.approx(4.5, abs=0.02)


def test_memory_does_not_grow_with_the_batches() -> None:
    """What is kept of a layer's inputs has a bound, however many batches come, and of whatever size."""
    sample = calibration._Sample(10)
    seen: list[Tensor] = []
    for start in range(0, 3000, 30):
        sample.offer(30, lambda at, start=start: at + start)
        assert len(sample.items) == len(sample._drawn) == 10
        seen.append(sample.items)
    assert sample.items.unique().numel() == 10 and sample.items.max() > 1000  # a sample of all, none of it twice
    found = calibrate(single(), (torch.randn(5, 3) for _ in range(50)), method="percentile")
    assert found.layers["0"].inputs.shape == (32, 3)


def test_the_same_batches_give_the_same_calibration() -> None:
    """in every run, without a look at torch's random numbers, nor a change to them."""
    batches = [torch.randn(3000, 64) for _ in range(3)]
    layer, results = single(64), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(calibrate(layer, batches, method="percentile").layers["0"])
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0].scale == results[1].scale and torch.equal(results[0].inputs, results[1].inputs)


def test_some_inputs_are_kept_as_they_were() -> None:
    """Rows of x, before smoothing, by which the error of the output can be told."""
    x = torch.randn(100, 3)
    inputs = calibrate(single(), [x], smooth=0.5).layers["0"].inputs
    assert inputs.shape == (32, 3) and all(any(torch.equal(row, other) for other in x) for row in inputs)
    few = calibrate(single(), [x[:4]]).layers["0"].inputs
    assert sorted(few.tolist()) == sorted(x[:4].tolist())


# ---- smoothing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 0.5, 0.8, 1])
@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
def test_smoothing_is_that_of_the_paper(alpha: float, conv: bool) -> None:
    """smooth = 1 / s, s[k] = max |x[k]|^alpha / max |w[k]|^(1 - alpha), and the range is that of x * smooth."""
    model = nn.Sequential(Conv1D(5, 6) if conv else nn.Linear(6, 5))
    x = torch.randn(40, 6) * torch.tensor([1.0, 1, 30, 1, 0.1, 1])
    weight = model[0].weight.detach().t() if conv else model[0].weight.detach()
    observed = calibrate(model, [x[:20], x[20:]], smooth=alpha).layers["0"]
    s = x.abs().amax(0).double() ** alpha / weight.abs().amax(0).double() ** (1 - alpha)
    assert observed.smooth is not None and observed.smooth.dtype == torch.float32
    torch.testing.assert_close(observed.smooth.double(), 1 / s, rtol=1e-6, atol=0)
    smoothed = x * observed.smooth
    expected = (smoothed.max().clamp(min=0) - smoothed.min().clamp(max=0)).item() / 255
    assert observed.scale == pytest.approx(expected, rel=1e-6)
    by_percentile = calibrate(model, [x], smooth=alpha, method="percentile", percentile=100).layers["0"]
    assert by_percentile.scale == pytest.approx(expected, rel=1e-6) and by_percentile.zero == observed.zero


def test_smoothing_lessens_the_error() -> None:
    """With outlier channels in x, the output of the same int8 layer is at least 6 dB nearer to the exact one."""
    model, x = single(128, 48), torch.randn(200, 128)
    x[:, ::40] *= 60
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    snr = []
    for smooth in (None, 0.5):
        found = calibrate(model, [x], smooth=smooth).layers["0"]
        rows = Rows("static", found.scale, found.zero, found.smooth)
        snr.append(output_snr(found.inputs, weight, quantize_weight(weight, found.smooth), rows, bias))
    assert snr[1] > snr[0] + 6


def test_channels_without_use_are_not_smoothed() -> None:
    """Where x or the weight has only zeros, a factor would be 0 or infinite: it is 1."""
    model, x = single(4), torch.randn(9, 4)
    x[:, 1] = 0
    model[0].weight.data[:, 2] = 0
    smooth = calibrate(model, [x], smooth=0.5).layers["0"].smooth
    assert smooth is not None and smooth[1] == smooth[2] == 1
    x[:, 3] = 1e-42
    smooth = calibrate(model, [x], smooth=1).layers["0"].smooth
    assert smooth is not None and bool((smooth.isfinite() & (smooth > 0)).all())


# ---- which layers ----------------------------------------------------------------------------------------------------


def test_every_layer_is_watched_where_it_is_called() -> None:
    """Each by its name and with the input that it really gets, also a model that is a layer."""
    model = mlp(8, 16, 4)
    x = torch.randn(10, 8)
    found = calibrate(model, [x])
    assert list(found.layers) == ["0", "2"] and found.skipped == {}
    with torch.no_grad():
        assert scale_and_zero(found, "2") == scale_and_zero(calibrate(single(16), [model[1](model[0](x))]))
    assert list(calibrate(nn.Linear(8, 4), [x]).layers) == [""]


def test_layers_that_nothing_reached_are_listed() -> None:
    """with a reason that Int8Static hands on; so are those that only saw zeros."""
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2), "zeros": nn.Linear(3, 2)})
    model.forward = lambda x: model["used"](x) + model["zeros"](x * 0)
    found = calibrate(model, [torch.randn(4, 3), torch.randn(0, 3)])
    assert list(found.layers) == ["used"]
    assert found.skipped["unused"] == UNREACHED and "from 0 to 0 while calibrating" in found.skipped["zeros"]
    static = fastlinear.Int8Static(found)
    assert static.why_not("used") is None and static.why_not("unused") == UNREACHED
    assert repr(found) == "Calibration(1 layers, 2 skipped)"


def test_a_shared_layer_has_one_range() -> None:
    """A layer that is called twice sees both inputs, and goes by its first name."""
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data = -2 * torch.eye(3)
    found = calibrate(nn.Sequential(layer, layer), [torch.tensor([[1.0, 0.0, 126.5]])])
    assert list(found.layers) == ["0"] and scale_and_zero(found, "0") == (fp32(379.5 / 255), 170)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    """The inputs are taken as the fp32 that they widen (or round) to."""
    model, x = single().to(dtype), torch.randn(8, 3).to(dtype)
    assert scale_and_zero(calibrate(model, [x])) == scale_and_zero(calibrate(single(), [x.float()]))
    found = calibrate(model, [x], smooth=0.5, method="percentile").layers["0"]
    assert found.smooth is not None and found.inputs.dtype == found.smooth.dtype == torch.float32


def test_a_fast_model_is_watched_like_any_other() -> None:
    """Fused activations and frozen weights change no input; a frozen weight is not smoothed."""
    model = mlp(8, 16, 4).eval()
    x = torch.randn(10, 8)
    expected = calibrate(model, [x])
    fast = OFF(model)
    for found in (calibrate(fast, [x]), calibrate(fastlinear.freeze(fast), [x])):
        assert scale_and_zero(found, "0") == scale_and_zero(expected, "0")
        assert found.layers["2"].scale == pytest.approx(expected.layers["2"].scale, rel=1e-5)
    assert calibrate(fast, [x], smooth=0.5).layers["0"].smooth is None


def test_a_chained_model_is_watched_like_any_other() -> None:
    """Where somebody watches, layers hand on no integers, which would say nothing of the range."""
    model, x = mlp(8, 16, 4).eval(), torch.randn(10, 8)
    expected = calibrate(model, [x])
    chained = OFF(model, quantize=fastlinear.Int8Static(expected, chain=True))
    found = calibrate(chained, [x])
    assert scale_and_zero(found, "0") == scale_and_zero(expected, "0") and not found.skipped
    assert found.layers["2"].scale == pytest.approx(expected.layers["2"].scale, rel=0.05)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_does_not_bypass_the_hooks() -> None:
    """nn.TransformerEncoder's layers are seen, also of padded batches, of which padding is no part."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    found = calibrate(encoder, [{"src": torch.randn(3, 5, 16), "src_key_padding_mask": mask}])
    assert list(found.layers) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert set(found.skipped) == {f"layers.{i}.self_attn.out_proj" for i in (0, 1)}
    assert all(len(observed.inputs) == 13 for observed in found.layers.values())


# ---- the run ---------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        return self.fc(input=x * times)


def test_batches_are_called_like_examples() -> None:
    """Tensors, tuples of arguments, mappings of keyword arguments, from a list or a generator; layers may be called by
    keyword."""
    x = torch.tensor([[51.0, 102.0, 255.0]])

    def generator() -> Iterator[Any]:
        yield x
        yield x, 2.0
        yield {"x": x, "times": 4.0}

    assert scale_and_zero(calibrate(TwoInputs(), generator()), "fc") == (4.0, 0)


def test_the_model_is_as_it_was() -> None:
    """Hooks go, and each module is in its own mode again; while it runs it is in eval mode, without gradients."""
    model = Model()
    model.train()
    model.layers[3].eval()
    modes = [module.training for module in model.modules()]
    running = model.norm.running_mean.clone()
    seen: list[tuple[bool, bool]] = []
    handle = model.head.register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), model.training)))
    calibrate(model, [inputs()])
    handle.remove()
    assert seen == [(False, False)] and torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.norm.running_mean, running)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinity_or_a_nan_is_refused(value: float) -> None:
    """ValueError that names the layer; the model is as it was."""
    model = mlp(8, 16, 4).train()
    x = torch.randn(10, 8)
    broken = torch.randn(10, 8)
    broken[3, 5] = value
    with pytest.raises(ValueError, match="an infinity or a NaN in the input of layer '0'"):
        calibrate(model, [x, broken])
    assert model.training and model[0].training and not model[0]._forward_pre_hooks


def test_an_error_of_the_models_own_comes_through() -> None:
    """An input that a layer cannot take is the layer's to complain of."""
    model = single()
    for wrong in (torch.randn(2, 4), torch.tensor(1.0)):
        with pytest.raises(RuntimeError):
            calibrate(model, [wrong])
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 1}, TypeError, "takes an nn.Module, but was given int"),
        ({"batches": torch.ones(2, 3)}, TypeError, "batches must be several examples, in a list, .* type Tensor"),
        ({"batches": {"x": torch.ones(2, 3)}}, TypeError, "batches must be several examples, .* type dict"),
        ({"batches": 3}, TypeError, "batches must be several examples, .* type int"),
        ({"batches": []}, ValueError, "given no batches"),
        ({"batches": [[torch.ones(2, 3)]]}, TypeError, "the example must be a tensor, a tuple .* of type list"),
        ({"method": "max"}, ValueError, "method must be 'minmax' or 'percentile', but is 'max'"),
        ({"percentile": 0.999}, ValueError, "percentile must be a number above 50, up to 100, but is 0.999"),
        ({"percentile": 101}, ValueError, "percentile must be .* but is 101"),
        ({"percentile": True}, ValueError, "percentile must be a number"),
        ({"symmetric": None}, TypeError, "symmetric must be True or False, but is None"),
        ({"smooth": 1.5}, ValueError, "smooth must be None or a number from 0 to 1, but is 1.5"),
        ({"smooth": float("nan")}, ValueError, "smooth must be None or a number from 0 to 1, but is nan"),
        ({"smooth": True}, ValueError, "smooth must be None or a number from 0 to 1, but is True"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """An error of one sentence, before or at the batch that is wrong."""
    good: dict[str, Any] = {"model": single(), "batches": [torch.ones(2, 3)]}
    model, batches, *_ = (good | arguments).values()
    run: Callable[[], object] = functools.partial(
        calibrate, model, batches, **{key: value for key, value in arguments.items() if key not in good}
    )
    with pytest.raises(error, match=message):
        run()
