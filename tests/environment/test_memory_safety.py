"""Who owns the memory of packs, what it costs, and that no number makes the kernels leave it.

Resident memory is read from /proc in a process of its own, with margins of some megabytes for the rest of torch.
"""

import bisect
import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zygote
from models import OFF
from torch import nn

import fastlinear
import fastlinear._plans as _plans
import fastlinear._weights as _weights
from fastlinear.layer import linear
from fastlinear.plan import candidates, decide, rivals, table
from fastlinear.plan.memory import Remembered
from fastlinear.plan.problem import Problem

SETUP = """
import gc, os, sys, weakref, torch, fastlinear
import fastlinear._weights as _weights
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
def pack(n, k):
    return _weights.Packed(torch.ones(1, 1).expand(n, k), "fp32/16x1")  # of no memory beside the pack
"""


def child(code: str, **environment: str) -> str:
    """What a process of its own prints; a crash fails the test with what it said."""
    run = zygote.run(SETUP + code, **environment)
    assert run.returncode == 0, f"exit {run.returncode}: {run.stderr[-2000:]}"
    return run.stdout


# ---- whose memory it is ----


def test_views_outlive_the_pack() -> None:
    """Tensors, arrays and DLPack exports over a pack stay as they were when it and its neighbors are gone."""
    w = torch.arange(64.0 * 48).reshape(64, 48)
    packs = [_weights.Packed(w + i, "fp32/16x1") for i in range(5)]
    expected = [packed.data.clone() for packed in packs]
    views = [
        packs[0].data,
        packs[1].data.numpy(),
        torch.from_dlpack(packs[2].head(1).data),
        memoryview(packs[3].data.numpy()),
    ]
    del packs
    others = [_weights.Packed(-w, "fp32/16x1") for _ in range(50)]
    for i, view in enumerate(views):
        found = torch.frombuffer(memoryview(view), dtype=torch.uint8) if i != 0 and i != 2 else view  # type: ignore[arg-type]
        assert torch.equal(found, expected[i][: found.numel()]), i  # type: ignore[arg-type, union-attr]
    assert len(others) == 50


def test_two_views_are_two_storages() -> None:
    """Each tensor over a pack has a storage of its own, so moving or resizing one leaves the rest where they are."""
    packed = _weights.Packed(torch.randn(64, 48), "fp32/16x1")
    first, second = packed.data, packed.data
    assert first.data_ptr() == second.data_ptr()
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    assert first.untyped_storage().nbytes() == packed.nbytes
    first.share_memory_().zero_()
    assert first.data_ptr() != second.data_ptr() and torch.equal(second, packed.data) and second.any()


def test_scales_and_zero_points_are_copies() -> None:
    """What is written to them changes no pack."""
    values = torch.randint(-128, 128, (40, 24), dtype=torch.int8)
    packed = _weights.Packed(values, table.layout("int8"), torch.rand(40), torch.full((40,), 3, dtype=torch.int32))
    before = packed.data.clone()
    assert packed.scale is not None and packed.zero is not None
    packed.scale.zero_()
    packed.zero.zero_()
    assert torch.equal(packed.data, before)


def test_a_mapping_lives_as_long_as_its_packs(tmp_path: Path) -> None:
    """A model over a file that was deleted, whose panels were moved and whose other tensors are gone, answers on."""
    code = f"""
path = {str(tmp_path / "file")!r}
stock = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)).eval()
fastlinear.save(fastlinear.convert(stock, tune="off", quantize=fastlinear.Int8Dynamic()), path)
model = fastlinear.load(path, stock)
os.unlink(path)
x = torch.randn(5, 64)
with torch.inference_mode():
    before = model(x)
    for layer in (model[0], model[2]):
        layer._frozen.panels.share_memory_()
        layer.bias.data = layer.bias.data.clone()
        layer._frozen.panels = None
    gc.collect()
    junk = [torch.ones(1 << 20) for _ in range(20)]
    print(torch.equal(model(x), before), open("/proc/self/maps").read().count(path) > 0)
del model, layer, stock
gc.collect()
print(open("/proc/self/maps").read().count(path))
"""
    assert child(code).split() == ["True", "True", "0"]


# ---- what it costs ----


def test_freed_packs_go_back_to_the_system() -> None:
    """Of 100 MiB of small, middling and large packs nothing stays resident, whatever the order they go in."""
    code = """
import random
pack(16, 16)
before, order = resident(), random.Random(0)
for _ in range(3):
    packs = [pack(n, 1000) for n in [10] * 100 + [500] * 10 + [5000] * 2 + [9000]]
    assert resident() > before + 90, (before, resident())
    order.shuffle(packs)
    while packs:
        packs.pop()
assert resident() < before + 6, (before, resident())
"""
    child(code)


def test_a_small_pack_holds_its_pages_only() -> None:
    """Of 30 MiB packed together with it, a pack of some kilobytes keeps at most its own two huge pages."""
    code = """
pack(16, 16)
before = resident()
packs = [pack(500, 1000) for _ in range(8)] + [pack(16, 16)] + [pack(500, 1000) for _ in range(7)]
del packs[:8], packs[1:]
assert resident() < before + 6, (before, resident())
"""
    child(code)


def test_holes_are_used_again() -> None:
    """A model whose layers are repacked in turn, a hundred times, stays as large as it was."""
    code = """
packs = [pack(500, 1000) for _ in range(10)]
before = resident()
for i in range(1000):
    packs[i % 10] = None
    packs[i % 10] = pack(500 - i % 3, 1000)
assert resident() < before + 8, (before, resident())
"""
    child(code)


def test_a_small_weight_is_packed_again_in_its_page() -> None:
    """Of a weight that keeps changing, the page of the last pack is not given back and fetched anew, whether it lies
    alone in its chunk or not: the system would fill 2 MB with zeros each time."""
    code = """
import resource
weight = torch.zeros(64, 64)
for beside in (None, pack(5000, 1000)):
    def again():
        _weights.Packed(weight, "fp32/32x1")
    for _ in range(20):
        again()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        again()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt < before + 50
"""
    child(code)


def test_a_repack_costs_one_pack() -> None:
    """The pack of a weight that has changed goes before the new one is made: the peak is that of the first call."""
    code = """
layer, x = fastlinear.FastLinear(2048, 4096).eval().requires_grad_(False), torch.randn(3, 2048)
vars(layer)["_tune"] = "off"
layer(x)
before = resident()
for _ in range(3):
    layer.weight.mul_(1.5)
    open("/proc/self/clear_refs", "w").write("5")  # the peak is now what there is
    layer._engine.settle()  # it counts as one that keeps changing
    layer(x)
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
    assert layer._engine.fresh(layer) and peak < before + 12, (before, peak)
"""
    child(code)


@pytest.mark.parametrize("way", [name for name in rivals.NAMES if name != rivals.BASELINE])
def test_one_pack_for_all_batch_sizes(way: str) -> None:
    """What MKL or oneDNN packed serves every number of rows, rightly, is counted, and goes with the weight."""
    if way == "torch/mkl" and not torch.backends.mkl.is_available():
        pytest.skip("this torch is built without MKL")
    code = """
layer = fastlinear.FastLinear(1024, 4096).eval().requires_grad_(False)
before = resident()
for m in (1, 2, 3, 5, 7, 8, 9, 11, 12, 17, 24, 33, 64, 90, 128, 200):
    x = torch.randn(m, 1024)
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-3), m
assert {plan.name for plan in layer.plans} == {os.environ["FASTLINEAR_KERNEL"]} and len(layer.plans) > 12
mib = layer.pack_nbytes / 2**20
assert 31 < mib < 48, mib  # as much as MKL pads on some CPUs; a second pack would come to more
assert resident() < before + mib + 96, (before, resident())
layer.weight.mul_(2)
assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-3)
assert layer.pack_nbytes / 2**20 == mib and resident() < before + mib + 96, (before, resident())
packed = [weakref.ref(packed) for packed in layer._torch_packs.values()]
del layer
assert [ref() for ref in packed] == [None]
"""
    child(code, FASTLINEAR_KERNEL=way)


def _fast(**options: Any) -> nn.Module:
    stock = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 32)).eval().requires_grad_(False)
    return OFF(stock, **options)


def _tied(**options: Any) -> nn.Module:
    stock = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)).eval().requires_grad_(False)
    stock[2].weight = stock[0].weight
    return OFF(stock, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": _fast,
    "bf16": lambda: _fast(dtype=torch.bfloat16),
    "quantized": lambda: _fast(quantize=fastlinear.Int8Dynamic()),
    "tied": _tied,
    "frozen": lambda: _fast(freeze=True),
    "frozen, quantized": lambda: _fast(freeze=True, quantize=fastlinear.Int8WeightOnly()),
    "frozen, tied": lambda: _tied(freeze=True),
}


def _with_gradients(model: nn.Module) -> None:
    model(torch.randn(3, 32, requires_grad=True)).sum().backward()


def _under_autocast(model: nn.Module) -> None:
    with torch.autocast("cpu"):
        model(torch.randn(3, 32))


USES: dict[str, Callable[[nn.Module], object]] = {
    "a call": lambda model: model(torch.randn(3, 32)),
    "gradients": _with_gradients,
    "autocast": _under_autocast,
    "report": lambda model: (model(torch.randn(3, 32)), str(fastlinear.report(model))),
    "a copy": copy.deepcopy,
    "pickle": pickle.dumps,
    "a state dict": lambda model: model.state_dict(),
}


@pytest.mark.parametrize("kind", MODELS)
def test_del_frees_a_model(kind: str) -> None:
    """Modules and packs go with the last reference to the model, without the cycle collector, whatever it was used
    for."""
    gc.collect()
    gc.disable()
    try:
        for name, use in USES.items():
            model: Any = MODELS[kind]()
            use(model)
            packs = [layer._engine.packed for layer in model if linear.is_fast(layer)]
            refs = [weakref.ref(thing) for thing in (*model.modules(), *packs) if thing is not None]
            del model, packs
            assert [ref() for ref in refs if ref() is not None] == [], name
    finally:
        gc.enable()


@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(), reason="no huge pages here"
)
def test_packs_lie_in_huge_pages() -> None:
    """Small packs share the 2 MB pages of a chunk, a large one has its own; the kernel's flags of both say so."""
    small, large = (
        _weights.Packed(torch.ones(300, 300), "fp32/16x1"),
        _weights.Packed(torch.ones(9000, 1000), "fp32/16x1"),
    )
    for packed in (small, large):
        assert "hg" in _flags(packed.data.data_ptr())
    assert large.data.data_ptr() % (2 << 20) == 0


def _flags(address: int) -> list[str]:
    """The kernel's flags of the mapping at an address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            here = begin <= address < end
        elif here and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"{address:#x} is not mapped")


# ---- numbers from outside ----


def test_buckets_are_bounded() -> None:
    """A bucket is the smallest of 0 to 8, 12, 16, 24, 32 ... that holds M, and 2^40 for whatever is larger."""
    all_of_them = sorted({*range(9), *(3 << i for i in range(2, 39)), *(1 << i for i in range(4, 41))})
    numbers = random.Random(0)
    for m in [*range(3000), *(numbers.getrandbits(numbers.randint(1, 40)) for _ in range(3000))]:
        assert _plans.bucket(m) == all_of_them[bisect.bisect_left(all_of_them, m)]
    for m in (2**40, 2**40 + 1, 2**47, 2**62 + 1, 2**63 - 1):
        assert _plans.bucket(m) == 2**40


def test_more_rows_than_32_bits_count() -> None:
    """2^31 + 1 rows, all the same in memory, are planned for; to no columns, since one would take a minute."""
    code = """
for tune in ("lazy", "off"):
    layer = fastlinear.FastLinear(1, 0, bias=False, device="meta").to_empty(device="cpu").eval().requires_grad_(False)
    vars(layer)["_tune"] = tune
    print(tuple(layer(torch.ones(1, 1).expand(2**31 + 1, 1)).shape), layer.plans[0].bucket)
"""
    assert child(code).splitlines() == [f"({2**31 + 1}, 0) {3 << 30}"] * 2


def test_more_rows_than_memory_holds() -> None:
    """2^47 expanded rows are refused as nn.Linear refuses them, measured or not, and the layer works afterwards."""
    code = """
for tune in ("lazy", "off"):
    for options in ({}, {"quantize": fastlinear.Int8Dynamic()}, {"dtype": torch.bfloat16}):
        stock = nn.Linear(3, 5).eval().requires_grad_(False)
        fast = fastlinear.FastLinear.from_linear(stock, **options)
        vars(fast)["_tune"] = tune
        for shape in ((2**47, 3), (2**20, 2**27, 3)):
            errors = []
            for layer in (stock, fast):
                try:
                    layer(torch.ones(1, 3).expand(shape))
                except Exception as error:
                    errors.append(type(error).__name__)
            assert len(errors) == 2 and errors[0] == errors[1], (tune, options, shape, errors)
        x = torch.randn(4, 3)
        assert torch.allclose(fast(x), stock(x), atol=0.1)
"""
    child(code)


def test_a_pack_that_overflows_is_refused() -> None:
    """A weight of one number, seen as more than memory addresses, is a ValueError."""
    for n, k in ((2**31, 2**31), (2**40, 1), (1, 2**40), (2**32, 2**30)):
        with pytest.raises(ValueError, match=f"a weight of {n} x {k} has no packed form"):
            _weights.Packed(torch.zeros(1, 1).expand(n, k), "fp32/16x1")
    with pytest.raises(MemoryError):
        _weights.Packed(torch.zeros(1, 1).expand(2**24, 2**24), "fp32/16x1")
    assert _weights.Packed(torch.ones(3, 5), "fp32/16x1").unpack().sum() == 15


def test_memory_of_expanded_tensors() -> None:
    """What the tuner evicts is what a tensor's storage has, however large the tensor says that it is."""
    row = torch.ones(1, 4096)
    assert rivals.memory(row.expand(100_000, 4096)) == (row.data_ptr(), row.nbytes)
    assert rivals.memory(row[:, 5:]) == (row.data_ptr() + 20, row.nbytes - 20)
    assert rivals.memory(torch.empty(0))[1] == 0


def test_expanded_weights_are_tuned() -> None:
    """A weight that is one row expanded, larger than its storage by far, is packed, measured and right."""
    code = """
layer = fastlinear.FastLinear(512, 4096).eval()
layer.weight = nn.Parameter(torch.randn(1, 512).expand(4096, 512), requires_grad=False)
layer.bias.requires_grad_(False)
x = torch.randn(3, 512)
print(torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-3), layer.plans[0].source)
"""
    right, source = child(code).split()
    assert right == "True" and source in ("tuned", "heuristic")  # the latter on a busy machine


def test_a_remembered_plan_is_one_of_todays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name and numbers: what asks for other K slices or threads, each of which costs memory, is not believed."""
    problem = Problem(16, 64, 1024, "fp32", "fp32", "fp32", "fp32", True, None, False, 2)
    good = candidates.native_candidates(problem)[0]
    operands = decide.Operands(None, None, _weights.Packed(torch.ones(64, 1024), table.layout("fp32")))
    asked = []
    monkeypatch.setattr(decide, "_tuned", lambda *_: asked.append(1) or good)
    for slices, threads, believed in ((good.k_slices, good.plan_threads, True), (4096, 1, False), (1, 4096, False)):
        tuned = Remembered(good.name, {"threads": threads, "k_slices": slices})
        answers = {"get": lambda _, key, tuned=tuned: tuned, "is_of_this_process": lambda *_: False}
        monkeypatch.setattr(decide, "cache", lambda answers=answers: type("Cache", (), answers)())
        asked.clear()
        assert decide.decide(problem, operands, measure=True).source == ("cache" if believed else "tuned")
        assert bool(asked) != believed
