"""A packed weight is never stale: whoever changes the weight densely, by whatever means, the next call sees it."""

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import OFF
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlinear
import fastlinear._fingerprints as _fingerprints
import fastlinear._reasons as _reasons
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.layer import unpacked
from fastlinear.layer.linear import FastLinear
from fastlinear.layer.planning import prepare
from fastlinear.plan import rivals

K, N = 70, 96  # larger than what is compared whole
FORMATS = list(_tensors.FORMATS)


def packed_layer(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Any, Tensor]:
    """A stock layer, its fast twin, packed, which shares its parameters, and an input."""
    stock = nn.Linear(K, N, dtype=dtype).eval()
    fast, x = OFF(stock), torch.randn(5, K, dtype=dtype)
    with torch.no_grad():
        fast(x)
    assert fast._engine.fresh(fast)
    return stock, fast, x


def assert_seen(stock: nn.Module, fast: Any, x: Tensor) -> None:
    assert not fast._engine.fresh(fast)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), stock(x))


# ---- optimizers ------------------------------------------------------------------------------------------------------


def optimizers() -> Iterator[Any]:
    """Every class of torch.optim that takes dense gradients, in every way it can be run."""
    for name, cls in sorted(vars(torch.optim).items()):
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            continue
        if cls in (torch.optim.Optimizer, torch.optim.SparseAdam):
            continue
        ways = inspect.signature(cls).parameters
        for way in (None, *(way for way in ("foreach", "fused") if way in ways)):
            settings: dict[str, Any] = {way: True} if way else {way: False for way in ("foreach",) if way in ways}
            yield pytest.param(cls, settings, id=f"{name}-{way or 'loop'}")


def step(parameters: list[Tensor], loss: Callable[[], Tensor], cls: Any, settings: dict[str, Any]) -> None:
    optimizer = cls(parameters, lr=0.01, **settings)

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    optimizer.step(closure)


@pytest.mark.parametrize(("cls", "settings"), [*optimizers()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_optimizers(cls: Any, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """After one step of any optimizer of torch, in a loop, foreach or fused, the answer is the stock layer's."""
    if cls is torch.optim.LBFGS and dtype != torch.float32:
        pytest.skip("LBFGS in 16 bits diverges")
    stock, fast, x = packed_layer(dtype=dtype)
    parameters = [stock.weight] if cls.__name__ == "Muon" else list(stock.parameters())
    before = stock.weight.detach().clone()
    step(parameters, lambda: stock(x).float().square().sum(), cls, settings)
    if torch.equal(before, stock.weight):
        pytest.skip("this torch's step does nothing here")  # SGD, fused, bf16 in torch 2.13
    assert_seen(stock, fast, x)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_steps_that_leave_dead_units(fused: bool, axis: int) -> None:
    """Rows of dead units and columns of dead inputs have no gradients, and Adam leaves them as they are."""
    for part in (slice(0, None, 2), slice(1, None, 2), slice(0, N // 2), slice(K // 2, None)):
        stock, fast, x = packed_layer()
        mask = torch.ones(N, K)
        mask[part if axis == 0 else (slice(None), part)] = 0
        stock.weight.grad = torch.randn(N, K) * mask
        torch.optim.Adam([stock.weight], lr=0.1, fused=fused).step()
        assert_seen(stock, fast, x)


# ---- everything else that writes -------------------------------------------------------------------------------------


def through_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[...] *= 3


def through_dlpack(weight: Tensor) -> None:
    torch.from_dlpack(weight.detach()).mul_(3)


def swapped_storage_at_the_same_address(weight: Tensor) -> None:
    nbytes = weight.nbytes
    values = weight.detach() * 3
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(nbytes)
    weight.data.copy_(values)


def offloaded_and_back(weight: Tensor) -> None:
    values = (weight.detach() * 3).numpy().tobytes()
    weight.data = torch.empty(0)
    weight.data = torch.frombuffer(bytearray(values), dtype=torch.float32).view(N, K).clone()


def moved_to_shared_memory_and_written(weight: Tensor) -> None:
    weight.untyped_storage().share_memory_()
    weight.data.mul_(3)


def collective(run: Callable[[Any, Tensor], Any]) -> Callable[[Tensor], None]:
    """A write of gloo's, between two ranks that are threads."""

    def write(weight: Tensor) -> None:
        store, tensors = dist.HashStore(), (weight.data, torch.randn(N, K))

        def rank(i: int) -> None:
            run(dist.ProcessGroupGloo(store, i, 2, timedelta(seconds=30)), tensors[i]).wait()

        threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return write


WRITES: dict[str, Callable[[Tensor], object]] = {
    ".data.copy_": lambda w: w.data.copy_(torch.randn(N, K)),
    ".data +=": lambda w: w.data.add_(0.01),
    ".data.mul_": lambda w: w.data.mul_(1.001),
    ".data.zero_": lambda w: w.data.zero_(),
    "an average, through .data": lambda w: w.data.lerp_(torch.randn(N, K), 0.001),
    "a clipped copy, through .data": lambda w: w.data.clamp_(-0.05, 0.05),
    "_foreach": lambda w: torch._foreach_mul_([w.data], 2.0),
    "out=": lambda w: torch.mul(w.detach(), 2, out=w.data),
    "numpy": through_numpy,
    "DLPack": through_dlpack,
    "resize_ to 0 and back": swapped_storage_at_the_same_address,
    "offload and back": offloaded_and_back,
    "shared memory": moved_to_shared_memory_and_written,
    "all_reduce": collective(lambda group, t: group.allreduce([t])),
    "broadcast": collective(lambda group, t: group.broadcast(t, 1)),
    "init": lambda w: nn.init.xavier_normal_(w.data),
    "a row's worth of the rows": lambda w: w.data[: N // 4].mul_(2),
    "some of the columns": lambda w: w.data[:, K // 2 :].mul_(2),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_writes_that_torch_does_not_count(write: Callable[[Tensor], object]) -> None:
    """What has no effect on torch's count of changes is seen by the contents."""
    stock, fast, x = packed_layer()
    with torch.no_grad():
        write(stock.weight)
    assert_seen(stock, fast, x)


def test_a_flat_buffer() -> None:
    """Parameters that are views of one tensor, as FSDP keeps them: a write to that is seen by all."""
    flat = torch.randn(2 * N * K + 13)
    model = nn.Sequential(nn.Linear(K, N, bias=False), nn.Linear(N, K, bias=False)).eval()
    model[0].weight = nn.Parameter(flat[13 : 13 + N * K].view(N, K))
    model[1].weight.data = flat[13 + N * K :].view(K, N)
    fast, x = OFF(model), torch.randn(5, K)
    with torch.no_grad():
        fast(x)
        flat.data.mul_(0.5)
        torch.testing.assert_close(fast(x), model(x))


def test_a_flat_buffer_under_an_attention_to_another_sequence() -> None:
    """The layers of query, key and value apart are views of a memory that `.data =` may take from the whole."""
    stock = nn.MultiheadAttention(K, 2, batch_first=True).eval()
    fast, x = OFF(stock), torch.randn(1, 5, K)
    flat = torch.randn(sum(p.numel() for p in fast.parameters()))
    with torch.no_grad():
        fast(x, x + 1, x)
        for parameter, part in zip(fast.parameters(), flat.split([p.numel() for p in fast.parameters()]), strict=True):
            parameter.data = part.view_as(parameter)
        for factor in (1.0, 0.5):
            flat.mul_(factor)
            now = nn.MultiheadAttention(K, 2, batch_first=True).eval()
            now.load_state_dict(fast.state_dict())
            torch.testing.assert_close(fast(x, x + 1, x)[0], now(x, x + 1, x)[0])


def test_memory_that_comes_back_at_the_same_address() -> None:
    """A freed weight's address is reused by the next one, which may differ in a single element: the storage tells."""
    stock, fast, x = packed_layer()
    values = stock.weight.detach().clone()
    for i in range(20):
        values[i % N, 37] += 1
        stock.weight.data = torch.empty(0)
        stock.weight.data = values.clone()
        assert_seen(stock, fast, x)
        with torch.no_grad():
            for _ in range(10):
                fast(x)
        assert fast._engine.fresh(fast)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "fewer rows": lambda w: w[:32],
    "more rows": lambda w: torch.cat([w, w]),
    "transposed": lambda w: w.t(),
    "fewer columns": lambda w: w[:, :32],
    "every second column": lambda w: torch.cat([w, w], 1)[:, ::2],
    "bf16": lambda w: w.bfloat16(),
    "fp64": lambda w: w.double(),
    "empty": lambda w: w[:0],
    "expanded": lambda w: w[:1].expand(64, 64),
}


@pytest.mark.parametrize("change", SHAPES.values(), ids=list(SHAPES))
def test_other_shapes_and_dtypes_through_data(change: Callable[[Tensor], Tensor]) -> None:
    """`w.data = ...` may change shape, strides and dtype: the answer is stock, in shape and values."""
    stock = nn.Linear(64, 64, bias=False).eval()
    fast = OFF(stock)
    with torch.no_grad():
        fast(torch.randn(5, 64))
        stock.weight.data = change(stock.weight.data)
        x = torch.randn(5, stock.weight.shape[1], dtype=stock.weight.dtype)
        for _ in range(3):
            torch.testing.assert_close(fast(x), stock(x))


def test_tied_layers_share_a_pack_only_of_the_same_contents() -> None:
    """A tied layer that is called after an unseen write does not take the pack that the other has from before it."""
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K)).eval()
    model[1].weight = model[0].weight
    fast, x = OFF(model), torch.randn(5, K)
    with torch.no_grad():
        for _ in range(10):
            fast[0](x)
        model[0].weight.data.mul_(-1)
        torch.testing.assert_close(fast[1](x), model[1](x))
        torch.testing.assert_close(fast[0](x), model[0](x))
        assert fast[0]._engine.packed is fast[1]._engine.packed


# ---- the sample ------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "rows apart": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "columns apart": lambda w: torch.stack([w, w], 2)[..., 0],
    "offset": lambda w: torch.cat([w.new_zeros(3), w.flatten()])[3:].view(w.shape),
}
SIZES = [(1, 1), (1, 3000), (3000, 1), (3, 5), (17, 16), (40, 7), (144, 610), (89, 1000), (512, 513)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_sample_is_spread(layout: str, dtype: torch.dtype) -> None:
    """It changes with every eighth of the rows and every quarter of the columns, in every layout, and with nothing
    beside the weight."""
    for n, k in SIZES:
        weight = LAYOUTS[layout](torch.randn(n, k, dtype=dtype))
        fingerprint = _fingerprints.Fingerprint(weight)
        assert fingerprint.fits(weight)
        for parts, axis in ((min(8, n), 0), (min(4, k), 1)):
            for part in weight.data.tensor_split(parts, axis):
                before = part.clone()
                part.add_(1)
                assert not fingerprint.fits(weight), (n, k, axis)
                part.copy_(before)
                assert fingerprint.fits(weight)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_nan_and_zeros(dtype: torch.dtype) -> None:
    """Bits are compared: NaN is equal to itself, and -0 is not 0."""
    weight = torch.full((N, K), torch.nan, dtype=dtype)
    assert (fingerprint := _fingerprints.Fingerprint(weight)).fits(weight)
    weight.data.zero_()
    assert not fingerprint.fits(weight)
    fingerprint = _fingerprints.Fingerprint(weight)
    weight.data.neg_()
    assert not fingerprint.fits(weight)


def test_no_shape_is_read_beyond_its_memory() -> None:
    """Empty, expanded and one-element weights have a fingerprint, too."""
    for weight in (torch.empty(0, 5), torch.empty(5, 0), torch.ones(1).expand(1 << 20, 1 << 20), torch.ones(3, 1)):
        assert _fingerprints.Fingerprint(weight).fits(weight)
    with pytest.raises(TypeError, match="weight must be a dense"):
        _fingerprints.Fingerprint(torch.empty(3, 3, device="meta"))


# ---- what it costs ---------------------------------------------------------------------------------------------------


def test_plans_survive_a_change_of_the_weight() -> None:
    """Kernels that were chosen for a layer are not chosen again, and their plans not made again, when it repacks."""
    stock, fast, x = packed_layer()
    plans, decided = fast.plans, []
    fast._plan = lambda *args: decided.append(args)  # would be called where a plan is wanting
    with torch.no_grad():
        for _ in range(10):
            fast(x)
        stock.weight.mul_(2)
        assert prepare(fast, fast._engine, "fp32", x) and fast.plans == plans
        assert fast._engine.planned(5, 1, torch.float32)
        torch.testing.assert_close(fast(x), stock(x))


def test_torchs_own_packs_do_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL's pack of the old weight goes with it."""
    monkeypatch.setenv("FASTLINEAR_KERNEL", "torch/mkl")
    stock, fast, x = packed_layer()
    assert [plan.name for plan in fast.plans] == ["torch/mkl"]
    with torch.no_grad():
        for _ in range(10):
            fast(x)
        stock.weight.data.mul_(2)
        torch.testing.assert_close(fast(x), stock(x))
        assert fast._engine.fresh(fast) and [plan.name for plan in fast.plans] == ["torch/mkl"]


def test_a_weight_that_keeps_changing_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is packed twice, then no more until it has stood still for some calls; each answer is right."""
    packs = []
    real = _weights.Packed
    monkeypatch.setattr(_weights, "Packed", lambda *args: packs.append(args) or real(*args))
    stock, fast, x = packed_layer()
    with torch.no_grad():
        for _ in range(50):
            stock.weight.mul_(1.01)
            torch.testing.assert_close(fast(x), stock(x))
        assert len(packs) == 2 and fast.pack_nbytes == 0
        for _ in range(10):
            torch.testing.assert_close(fast(x), stock(x))
        assert len(packs) == 3 and fast._engine.fresh(fast)
        for _ in range(10):
            fast(x)
        stock.weight.mul_(2)  # the pack has paid for itself: the next one is made at once
        torch.testing.assert_close(fast(x), stock(x))
        assert len(packs) == 4 and fast._engine.fresh(fast)


@pytest.mark.parametrize("train", [False, True], ids=["changing", "training"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as held", "rounded"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("after", [False, True], ids=["", "after a tracer"])
def test_torch_is_called_at_once(train: bool, dtype: torch.dtype | None, kind: type[nn.Module], after: bool) -> None:
    """Training, and while its weight keeps changing, a small layer costs what the stock one does: no Python of ours
    runs but the activation's. Answers, gradients and the report's counts are what they were; so they are after a tracer
    has put nn.Module.__call__ back, when the first call comes by another way than those behind it."""
    if after:
        nn.Module.__call__ = vars(nn.Module)["__call__"]
    stock = nn.Sequential(nn.Linear(K, N) if kind is nn.Linear else Conv1D(N, K), nn.ReLU()).eval()
    fast, x = OFF(stock, dtype=dtype), torch.randn(5, K)
    with torch.no_grad():
        fast(x)
    stock.train(train)
    fast.train(train)
    rounded = stock if dtype is None or train else copy.deepcopy(stock)
    slow = type(fast[0])._slow
    for i in range(20):
        with torch.no_grad():
            stock[0].weight.mul_(1.01)
            if rounded is not stock:
                rounded[0].weight.copy_(stock[0].weight.to(dtype))
        vars(fast[0]).pop("_slow", None)
        if i >= 3:
            fast[0]._slow = None  # whoever calls it, raises
        with torch.set_grad_enabled(i % 2 == 1):
            y, expected = fast(x), rounded(x)
        torch.testing.assert_close(y, expected)
        if i % 2:
            got, want = (
                torch.autograd.grad(each.square().sum(), tuple(of.parameters()))
                for each, of in ((y, fast), (expected, rounded))
            )
            torch.testing.assert_close(got, want)
    del fast[0]._slow
    assert type(fast[0])._slow is slow
    word = _reasons.TRAINING if train else _reasons.CHANGING
    assert fast[0]._elsewhere == {word: 20 if train else 19}
    assert f"calls elsewhere: {word}" in " ".join(str(fastlinear.report(fast)).split())
    fast.eval()
    with torch.no_grad():
        for _ in range(10):
            fast(x)
    assert fast[0]._engine.fresh(fast[0])


def test_two_weights_in_turn() -> None:
    """functional_call with two state dicts is right, whichever answers."""
    stock, fast, x = packed_layer()
    states = [{key: torch.randn_like(t) for key, t in stock.state_dict().items()} for _ in range(2)]
    with torch.no_grad():
        for i in range(40):
            state = states[i % 2]
            torch.testing.assert_close(
                torch.func.functional_call(fast, state, x), torch.func.functional_call(stock, state, x)
            )
        for _ in range(10):
            torch.func.functional_call(fast, states[0], x)
        assert fast._engine.packed is not None


def smoothed(stock: nn.Module, x: Tensor) -> fastlinear.Calibration:
    return fastlinear.calibrate(stock, [x, x * torch.linspace(0.1, 9, K)], smooth=0.5)


QUANTIZED = {
    "dynamic": lambda stock, x: fastlinear.Int8Dynamic(),
    "asymmetric": lambda stock, x: fastlinear.Int8Dynamic(asymmetric=True),
    "smoothed": lambda stock, x: fastlinear.Int8Dynamic(calibration=smoothed(stock, x)),
    "static": lambda stock, x: fastlinear.Int8Static(fastlinear.calibrate(stock, [x])),
    "weight-only": lambda stock, x: fastlinear.Int8WeightOnly(),
    "4 bits": lambda stock, x: fastlinear.Int4Dynamic(),
}


@pytest.mark.parametrize("multiplies", [True, False], ids=["", "no exact product of torch's"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("scheme", QUANTIZED)
@torch.no_grad()
def test_a_quantized_weight_that_keeps_changing_keeps_its_numbers(
    scheme: str, kind: type[nn.Module], multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of int8 each answer has the bits that a pack would give, before the activation, but is given without one; sums
    that are no integers may be summed up in another order. Weights of 4 bits are packed at each change."""
    monkeypatch.setattr(unpacked, "_multiplies", lambda: multiplies)
    layer = nn.Linear(K, N) if kind is nn.Linear else Conv1D(N, K)
    stock, x = nn.Sequential(layer).eval(), torch.randn(3, 5, K)
    how = {"quantize": QUANTIZED[scheme](stock, x[0])}
    fast, packs, real = OFF(stock, **how), [], _weights.Packed
    fast(x)
    for i in range(30):
        stock[0].weight.mul_(1.1)
        rows = x.to(torch.bfloat16) if i % 3 == 2 else x
        with monkeypatch.context() as patch:
            patch.setattr(_weights, "Packed", lambda *args: packs.append(args) or real(*args))
            y = fast(rows)
        again = OFF(copy.deepcopy(stock), **how)(rows)
        assert y.dtype is rows.dtype and (rows is not x or not torch.equal(y, stock(x)))
        if scheme == "weight-only":
            torch.testing.assert_close(y, again)
        else:
            assert torch.equal(y, again), i
    changing = fast[0]._elsewhere.get(_reasons.CHANGING, 0)
    assert (len(packs), changing) == ((30, 0) if scheme == "4 bits" else (1, 29))
    for _ in range(10):
        y = fast(x)
    assert fast[0]._engine.fresh(fast[0]) and torch.equal(y, OFF(copy.deepcopy(stock), **how)(x))


def test_gradients_of_a_quantized_weight_that_keeps_changing() -> None:
    """Are those through the numbers that are multiplied, as of a pack."""
    stock, x = nn.Linear(K, N).eval(), torch.randn(5, K)
    fast = OFF(stock, quantize=fastlinear.Int8Dynamic())
    for _ in range(12):
        with torch.no_grad():
            stock.weight.mul_(1.1)
        again = OFF(copy.deepcopy(stock), quantize=fastlinear.Int8Dynamic())
        got, want = (torch.autograd.grad(each(x).square().sum(), tuple(each.parameters())) for each in (fast, again))
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_no_number_in_a_quantized_weight_that_keeps_changing() -> None:
    """Is refused as it would be in a pack."""
    stock, x = nn.Linear(K, N).eval(), torch.randn(5, K)
    fast = OFF(stock, quantize=fastlinear.Int8WeightOnly())
    for _ in range(5):
        stock.weight.mul_(1.1)
        fast(x)
    stock.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"nan \(at \[3, 4\]\) cannot be quantized to int8"):
        fast(x)


def test_tune_packs_what_kept_changing() -> None:
    """Whoever tunes a model means to run it."""
    stock, fast, x = packed_layer()
    with torch.no_grad():
        for _ in range(3):
            stock.weight.mul_(2)
            fast(x)
    assert not fast._engine.fresh(fast)
    fastlinear.tune(fast, x)
    assert fast._engine.fresh(fast)


@pytest.mark.parametrize("changes", [0, 1, 3])
def test_no_weak_reference_to_a_parameter(changes: int) -> None:
    """torch.utils.swap_tensors refuses tensors that have one, such as a weight that changed and waits to be packed;
    after it, the answer is that of the new contents."""
    stock, fast, x = packed_layer()
    other = nn.Linear(K, N).eval()
    with torch.no_grad():
        for _ in range(changes):
            stock.weight.mul_(1.5)
            fast(x)
    torch.utils.swap_tensors(stock.weight, other.weight)
    assert_seen(stock, fast, x)


@pytest.mark.parametrize("kernel", ["", *rivals.NAMES])
def test_the_storage_is_held_weakly(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that was offloaded through `.data` is freed at once, though its layer has not been called since,
    whatever was chosen for it."""
    from torch.multiprocessing.reductions import StorageWeakRef

    monkeypatch.setenv("FASTLINEAR_KERNEL", kernel)
    layer = FastLinear(512, 512, bias=False).eval()
    with torch.no_grad():
        layer(torch.randn(2, 512))
    storage = StorageWeakRef(layer.weight.untyped_storage())
    layer.weight.data = torch.empty(0)
    assert storage.expired()
