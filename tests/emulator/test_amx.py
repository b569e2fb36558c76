"""The AMX kernels in instructions, which stand for time where no machine is at hand; their session; whole layers."""

import ctypes
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grouped
import library
import machines
import native
import pytest
import torch
import zygote
from models import other_kernels
from torch import Tensor, nn

import emulator
import fastlinear
from emulator.code import call
from emulator.test_tiles import SILICON, config, pinned, stored_config
from fastlinear import _kernels, _plans, _products
from fastlinear.spec.int4 import Coding

AMX = [kernel for kernel in native.ALL if kernel["isa"] in ("amx", "amx_fp16") and kernel["id"] == kernel["name"]]
needs_amx = pytest.mark.skipif("skipped" in library.way("amx"), reason=f"amx is {library.way('amx')}")
COUNTED: list[str] = []  # the tests that count instructions, which only fault where the process has no tiles


def counted(test: Callable[..., None]) -> Callable[..., None]:
    COUNTED.append(test.__name__)
    skips = pytest.mark.skipif(
        library.way("amx") != library.EMULATED, reason="see test_the_counts_where_there_are_tiles"
    )
    return skips(test)


CONFIGURED = 0 if SILICON else 1  # a CPU that has tiles, though it gives this process none, configures them itself
DYNAMIC = _plans.RowQuantizer("symmetric")


def multiply(name: str, m: int, n: int, k: int, *, threads: int = 1, k_slices: int = 1, pad: int = 0) -> Counter[str]:
    """What a product costs on a kernel; the result is held to the bound. `pad`: elements between the rows of x."""
    kernel = next(kernel for kernel in AMX if kernel["name"] == name)
    integers = kernel["accumulate"] == "int32"
    dtype = torch.float16 if kernel["rows"] == "fp16" else torch.bfloat16
    x = torch.randn(m, k + pad).to(dtype)[:, :k]
    w = torch.randint(-127, 128, (n, k)).to(torch.int8) if integers else torch.randn(n, k).to(dtype)
    torch.set_num_threads(threads)
    packed, out = native.pack(w, kernel["layout"]), torch.empty(m, n)
    emulator.reset()
    with emulator.running():
        if not integers:
            emulator.watch(x, "x")
            emulator.watch(packed.data.view(1, -1), "the panels")
        plan = _plans.Plan(name, threads, k_slices)
        _products.run(packed, plan, _plans.Epilogue(), x, None, out, DYNAMIC if integers else None)
        found = emulator.counts()
    if integers:
        expected = x.float() @ w.float().T
        assert ((out - expected).abs() <= 0.02 * (x.float().abs() @ w.float().abs().T) + 1e-3).all()
    else:
        native.check(kernel, out, x, w)
    return found


def products(counts: Counter[str]) -> int:
    return sum(count for name, count in counts.items() if name.startswith("tdp"))


@counted
@pytest.mark.parametrize("name", ["bf16/amx/32x32", "int8/amx/32x32", "fp16/amx_fp16/32x32"])
def test_large_products_cost_what_arithmetic_needs(name: str) -> None:
    """M = N = K = 512: at most 1.05 times the multiplies, one load each, no spill, one configuration."""
    needed = 512 * 512 * 512 // (16 * 16 * (64 if name.startswith("int8") else 32))
    counts = multiply(name, 512, 512, 512)
    assert needed <= products(counts) <= 1.05 * needed
    assert counts["tileloadd"] + counts["tileloaddt1"] <= products(counts)
    assert counts["tilestored"] == counts["tilezero"] == 512 * 512 // 256  # each when it is done
    assert (counts["sttilecfg"], counts["ldtilecfg"], counts["tilerelease"]) == (CONFIGURED,) * 3


@counted
@pytest.mark.parametrize("group", [64, 128])
def test_large_products_of_groups_store_each_sum_once_a_group(group: int) -> None:
    """M = N = K = 512: no multiply too many, one load each, and tiles as the session set them, where a group is as long
    as what a tile takes."""
    packed = grouped.pack(grouped.coded(512, 512, Coding(group, (), offsets=True)), "int8g/32x4")
    x, y = torch.randn(512, 512), torch.empty(512, 512)
    emulator.reset()
    with emulator.running():
        plan = _plans.Plan("int8g/amx/32x32")
        _products.run(packed, plan, _plans.Epilogue(), x, None, y, _plans.RowQuantizer("groups"))
        counts = emulator.counts()
    assert products(counts) == counts["tdpbssd"] == 512 * 512 * 512 // (16 * 16 * 64)
    assert counts["tileloadd"] + counts["tileloaddt1"] <= products(counts)
    assert counts["tilestored"] == counts["tilezero"] == 512 * 512 // 256 * (512 // group)
    assert (counts["sttilecfg"], counts["ldtilecfg"], counts["tilerelease"]) == (CONFIGURED,) * 3


@counted
@pytest.mark.parametrize("name", ["bf16/amx/16x64", "int8/amx/16x64", "fp16/amx_fp16/16x64"])
def test_few_rows_load_little(name: str) -> None:
    """M = 16: at most 1.35 loads a multiply, no multiply too many."""
    counts = multiply(name, 16, 512, 512)
    assert products(counts) == 16 * 512 * 512 // (16 * 16 * (64 if name.startswith("int8") else 32))
    assert counts["tileloadd"] <= 1.35 * products(counts)
    assert counts["tilestored"] == counts["tilezero"] == 16 * 512 // 256


@counted
@pytest.mark.parametrize("kernel", AMX, ids=[kernel["name"] for kernel in AMX])
def test_ragged_products_cost_whole_tiles_and_no_more(kernel: native.Kernel) -> None:
    """Rows, columns and K that end within a tile: every one of them is multiplied once, whatever the cut."""
    step = kernel["k_step"]
    for m, n, k in [(1, 1, 1), (17, 33, step + 1), (50, 70, 3 * step - 1), (33, 65, 2 * step)]:
        panels = -(-n // 32) * 2  # columns are padded to whole panels of two tiles
        counts = multiply(kernel["name"], m, n, k, pad=7)
        assert products(counts) == -(-m // 16) * panels * -(-k // step)


@counted
@pytest.mark.parametrize("kernel", AMX, ids=[kernel["name"] for kernel in AMX])
def test_one_configuration_a_thread_and_call(kernel: native.Kernel) -> None:
    """Two threads configure twice, with K slices as well, and no thread is left with its tiles."""
    for k_slices in (1, 3):
        counts = multiply(kernel["name"], 200, 200, 200, threads=2, k_slices=k_slices)
        assert CONFIGURED <= counts["ldtilecfg"] <= 2 * CONFIGURED
        assert counts["sttilecfg"] == counts["ldtilecfg"] == counts["tilerelease"]


@counted
@pytest.mark.parametrize("kernel", AMX, ids=[kernel["name"] for kernel in AMX])
def test_later_blocks_of_k_add_to_what_is_there(kernel: native.Kernel) -> None:
    """A product of several K blocks loads each sum once a block more, and has no multiply more."""
    size = kernel["k_step"]
    with emulator.running():
        block = _plans.Plan(kernel["name"]).blocks[0]
    k = block // (kernel["columns"] * (1 if kernel["rows"] == "uint8" else 2)) + size
    counts = multiply(kernel["name"], 32, 64, k)
    assert products(counts) == 2 * 4 * -(-k // size)
    assert counts["tilestored"] == 2 * counts["tilezero"] == 16


@counted
def test_anothers_configuration_is_put_back() -> None:
    """Another library that has set its own on this thread finds it again; one that is the same is not touched."""
    for wanted, loads in ((config({0: (3, 8), 6: (16, 4)}), 2), (config(), 0)):
        call("ldtilecfg (%rdi)", ctypes.addressof(pinned(wanted)))
        counts = multiply("bf16/amx/32x32", 16, 32, 32)
        assert stored_config() == wanted
        assert (counts["ldtilecfg"], counts["tilerelease"]) == (loads * CONFIGURED, 0)
        call("tilerelease")


@pytest.mark.skipif(library.way("amx") != library.NATIVELY, reason="the tests above are run as they are")
def test_the_counts_where_there_are_tiles() -> None:
    """The tests above, in a process that the system gives no tiles."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--without-tiles", __file__, "-rs"]
    chosen = ["-k", " or ".join(COUNTED)]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout and f"{3 + 3 + 2 + 3 * len(AMX) + 1} passed" in done.stdout, done.stdout


# ---- whole layers ----------------------------------------------------------------------------------------------------


@contextmanager
def on_amx() -> Iterator[None]:
    """The package on a machine with AMX, with nothing remembered of another; and the other way round."""
    with emulator.running(), other_kernels():
        yield


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 70)).eval()


def kernels_of(model: nn.Module) -> set[str]:
    layers = [layer for layer in model.modules() if isinstance(layer, fastlinear.FastLinear)]
    assert len(layers) == 2
    return {chosen.name for layer in layers for chosen in layer.plans}


@needs_amx
@pytest.mark.parametrize(("m", "isa"), [(2, "avx512_bf16"), (33, "amx")])
def test_a_bf16_model(m: int, isa: str) -> None:
    """Converted there, its layers run on AMX; for few rows on AVX512-BF16, from the same panels; right either way."""
    model = mlp().bfloat16()
    x = torch.randn(m, 96).bfloat16()
    with torch.inference_mode(), on_amx():
        fast = fastlinear.convert(model, tune="off")
        y = fast(x)
        assert {name.split("/")[1] for name in kernels_of(fast)} == {isa}
        assert fast[0](x).shape == (m, 160)
    expected = mlp_in_double(model, x)
    assert (y.double() - expected).abs().max() <= 0.02 * expected.abs().max()


def mlp_in_double(model: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        copy = mlp().double()
        copy.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
        return copy(x.double())


@needs_amx
@pytest.mark.parametrize(("m", "isa"), [(2, "avx512_vnni"), (33, "amx")])
def test_an_int8_model(m: int, isa: str) -> None:
    """The same bits as on the ISAs below: integer sums are exact."""
    model, x = mlp(), torch.randn(m, 96)
    with torch.inference_mode():
        with on_amx():
            fast = fastlinear.convert(model, quantize=fastlinear.Int8Dynamic(), tune="off")
            y = fast(x)
            assert {name.split("/")[1] for name in kernels_of(fast)} == {isa}
        plain = fastlinear.convert(model, quantize=fastlinear.Int8Dynamic(), tune="off")
        assert torch.equal(plain(x), y)


@needs_amx
def test_a_frozen_model_and_the_tuner(tmp_path: Path) -> None:
    """The tuner measures AMX beside the ISAs below; a frozen file made there loads and computes here."""
    model, x = mlp().bfloat16(), torch.randn(40, 96).bfloat16()
    with torch.inference_mode():
        with on_amx():
            fast = fastlinear.convert(model, tune="now", example_inputs=(x,))
            tried = {name for layer in fast.modules() for name in table_of(layer)}
            assert {name.split("/")[1] for name in tried} >= {"amx", "avx512_bf16"}
            y = fast(x)
            fastlinear.freeze(fast)
            fastlinear.save(fast, tmp_path / "m.safetensors")
            assert torch.equal(fast(x), y)
        loaded = fastlinear.load(tmp_path / "m.safetensors", mlp().bfloat16())
        assert (loaded(x) - y).abs().max() <= 0.02 * y.abs().max()


def table_of(layer: nn.Module) -> list[str]:
    """The kernels that a layer's plans were chosen from."""
    plans = layer.plans if isinstance(layer, fastlinear.FastLinear) else []
    return [name.split(" ")[0] for chosen in plans for name, _ in chosen.table if name.count("/") == 2]


# ---- on silicon ------------------------------------------------------------------------------------------------------

PRODUCTS = """
import sys, torch, emulator, machines
from fastlinear import _kernels, _plans, _products, _weights
from fastlinear.spec.int4 import Coding
from grouped import coded, pack

def compute():
    for name in [row["name"] for row in _kernels.rows() if row["isa"] == "amx"]:
        for m, n, k in [(1, 1, 1), (16, 64, 64), (33, 70, 100), (64, 64, 640)]:
            plan = _plans.Plan(name)
            x, out = torch.randn(m, k).bfloat16(), torch.empty(m, n)
            if name.startswith("bf16"):
                packed, rows = _weights.Packed(torch.randn(n, k).bfloat16(), plan.layout), None
            elif name.startswith("int8g"):
                coding = Coding(group=16 if m % 2 else 128, table=(), offsets=m > 16)
                packed, rows = pack(coded(n, k, coding), plan.layout), _plans.RowQuantizer("groups")
            else:
                w = torch.randint(-127, 128, (n, k)).to(torch.int8)
                packed, rows = _weights.Packed(w, plan.layout, torch.ones(n)), _plans.RowQuantizer("symmetric")
            _products.run(packed, plan, _plans.Epilogue(), x, None, out, rows)
            yield out

torch.manual_seed(0)
if sys.argv[1] == "silicon":
    results = list(compute())
else:
    with emulator.running():
        results = list(compute())
    assert all(emulator.counts()[name] > 0 for name in ("tdpbf16ps", "tdpbusd", "tdpbssd"))
torch.save(results, sys.argv[2])
"""


def outputs(by: str, file: Path) -> list[Tensor]:
    """The products by "silicon" or "emulator", in a process of its own: tiles that were asked for fault no more."""
    zygote.checked(PRODUCTS, by, str(file))
    found: list[Tensor] = torch.load(file)
    return found


@needs_amx
def test_silicon_and_emulator_compute_the_same_bits(tmp_path: Path) -> None:
    """Where there are tiles, the machine's results and the emulator's are equal; elsewhere there are the latter."""
    emulated = outputs("emulator", tmp_path / "emulated.pt")
    assert len(emulated) == 4 * sum(row["isa"] == "amx" for row in _kernels.rows())
    if "amx" in _kernels.cpu_info()["isas"]:
        silicon = outputs("silicon", tmp_path / "silicon.pt")
        assert all(torch.equal(a, b) for a, b in zip(silicon, emulated, strict=True))


@needs_amx
def test_every_machine_with_tiles_has_all_kernels() -> None:
    """The rows of the table that this file is about are those that such a machine may run."""
    with emulator.running(machines.SPR_WITH_TILES):
        assert {row["name"] for row in _kernels.kernels() if row["runnable"]} >= {
            k["name"] for k in AMX if k["isa"] == "amx"
        }
