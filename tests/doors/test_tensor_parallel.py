"""Models that two processes share by tensor parallelism: the kernels multiply each one's part."""

from pathlib import Path

import pytest
import ranks

STACK = """
import re
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from fastlinear.layer.linear import is_fast
from fastlinear.layer.frozen import is_frozen

def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 10)).eval()

def shared(model):
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

x = torch.randn(5, 12)
expected = stack()(x).detach()

def raises(call, kind, words):
    try:
        call()
    except kind as error:
        assert re.search(words, str(error), re.DOTALL), error
    else:
        raise AssertionError(f"no {kind.__name__}")

def check(model, tolerance=1e-5):
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
"""


def test_parallelize_module() -> None:
    """Layers that torch split run on the kernels, with plans for their parts, whether they were converted before or
    after; frozen ones too, of which state dicts and `weight` are DTensors again. The report tells each layer's part,
    and where the sum costs more than what the other ranks spare."""
    ranks.run(
        STACK
        + """
for make in (
    lambda: shared(fastlinear.convert(stack(), tune="off")),
    lambda: fastlinear.convert(shared(stack()), tune="off"),
):
    model = make()
    check(model)
    check(model)
    for layer, shape in ((model[0], (15, 12)), (model[2], (10, 15))):
        assert is_fast(layer) and layer.plans and not layer._elsewhere, layer._elsewhere
        packed = layer._engine.packed or layer._engine.elsewhere.packed
        assert (packed.n, packed.k) == shape
    assert (model[0].in_features, model[0].out_features) == (12, 30)
    fastlinear.freeze(model)
    assert is_frozen(model[0]) and is_frozen(model[2])
    check(model)
    whole = model.state_dict()["0.weight"]
    assert isinstance(whole, DTensor) and torch.equal(whole.full_tensor(), stack()[0].weight)
    assert isinstance(model[0].weight, DTensor) and not is_frozen(model[0])
    check(fastlinear.unconvert(model))
    assert type(model[2]) is nn.Linear

from fastlinear.model import agreement
model = fastlinear.convert(shared(stack()), tune="off")
check(model)
for layer in (model[0], model[2]):
    for key, plan in layer._plans.items():
        layer._plans[key] = plan._replace(table=((plan.name, 0.01),))
agreement.costs[mesh] = 1e-3, 0.0
text = " ".join(str(fastlinear.report(model)).split())
assert "1 of 2 parts, by its outputs" in text and "1 of 2 parts, by its inputs" in text, text
assert text.count("too small to be split at M=5: the other ranks spare 0.02 ms, the sum takes 1") == 2, text
agreement.costs[mesh] = 0.0, 0.0
assert "too small" not in str(fastlinear.report(model))

frozen = shared(fastlinear.convert(stack(), tune="off", freeze=True))
raises(lambda: frozen(x), RuntimeError, "'0' was frozen before its model was split")
"""
    )


def test_gradients() -> None:
    """They reach the parameters of every part, in eval and in training mode, as those of stock layers do; whatever the
    placements of x and of the weight are, the answer is the stock layer's."""
    ranks.run(
        STACK
        + """
def gradients(model, x):
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    found = [p.grad for p in model.parameters()] + [x.grad]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]

for training in (False, True):
    want = gradients(stack().train(training), x)
    model = fastlinear.convert(shared(stack().train(training)), tune="off")
    for got, each in zip(gradients(model, x), want, strict=True):
        torch.testing.assert_close(got, each, rtol=1e-4, atol=1e-4)
    assert (model[2]._engine.packed is None) is training

for weight in (Shard(0), Shard(1), Replicate()):
    for placed in (Shard(0), Shard(1), Replicate()):
        torch.manual_seed(0)
        layer, rows = nn.Linear(7, 9).eval(), torch.randn(6, 7)
        expected = layer(rows).detach()
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [weight]))
        bias = Shard(0) if weight == Shard(0) else Replicate()
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [bias]))
        fast = fastlinear.convert(layer, tune="off")
        with torch.no_grad():
            y = fast(distribute_tensor(rows, mesh, [placed]))
        assert y.shape == (6, 9)
        torch.testing.assert_close(y.full_tensor(), expected, msg=f"{weight} {placed}")
"""
    )


def test_disagreement() -> None:
    """Ranks that disagree about a layer, of which one raises or does not come at all, raise in each of them, within a
    time limit, and the model stays as it was."""
    ranks.run(
        STACK
        + """
import time
from fastlinear.model import agreement
convert = lambda **options: fastlinear.convert(shared(stack()), tune="off", **options)
raises(
    lambda: convert(exclude="2" if rank else None), ValueError,
    "disagree about '2' in convert: rank 0: .*, fast; rank 1: .*, excluded by '2'",
)
raises(
    lambda: convert(quantize=fastlinear.Int8Dynamic() if rank else None), ValueError,
    "'0' in convert: rank 0: as it is.*rank 1: Int8Dynamic",
)
model = shared(stack())
if rank:
    raises(lambda: fastlinear.convert(model, filter_fn=lambda *_: 1 / 0), ZeroDivisionError, "division")
else:
    raises(lambda: fastlinear.convert(model), RuntimeError, "convert failed in rank 1: ZeroDivisionError: division")
check(model)
assert not any(map(is_fast, model.modules()))
torch.manual_seed(0)
other = nn.Sequential(nn.Linear(12, 30), nn.Linear(30, 10))
plan = {"0": ColwiseParallel()} if rank else {"1": ColwiseParallel()}
for name in ("0.weight", "1.weight"):
    layer = other[int(name[0])]
    layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, [Shard((int(name[0]) + rank) % 2)]))
raises(lambda: fastlinear.convert(other), ValueError, r"of \\(60, 12\\) as .*of \\(30, 24\\) as")
agreement.PATIENCE = 0.5
model, start = shared(stack()), time.monotonic()
if not rank:
    raises(lambda: fastlinear.convert(model), RuntimeError, "convert waited 0.5 s for all ranks")
    assert time.monotonic() - start < 10
"""
    )


def test_plans_of_the_whole() -> None:
    """A file of plans for the layers as they were before they were split is a FormatError that names both shapes."""
    ranks.run(
        STACK
        + """
import json
from pathlib import Path
from fastlinear.plan.problem import shape_of
whole = fastlinear.convert(stack(), tune="off")
whole(x)
keys = [key for layer in (whole[0], whole[2]) for key in layer.problem_keys()]
assert [shape_of(key) for key in keys] == [(30, 12), (10, 30)] and shape_of("m8") is None
path = Path(folder, f"plans{rank}.json")
def write(keys):
    machine = {"machine": {}, "entries": dict.fromkeys(keys, {})}
    path.write_text(json.dumps({"format": "fastlinear plans", "version": 1, "machines": [machine]}))
write(keys)
model = fastlinear.convert(shared(stack()), tune="off")
wrong = "plans for a weight of 30 x 12, but of that of layer '0' this process has 15 x 12"
raises(lambda: fastlinear.load_plans(path, model), fastlinear.FormatError, wrong)
raises(lambda: fastlinear.load_plans(path, fastlinear.freeze(model)), fastlinear.FormatError, wrong)
assert fastlinear.load_plans(path) == fastlinear.load_plans(path, whole) == 0
with torch.no_grad():
    model(x)
write(keys + model[0].problem_keys() + model[2].problem_keys())
assert fastlinear.load_plans(path, model) == 0
raises(lambda: fastlinear.load_plans(path, 3), TypeError, "takes an nn.Module")
"""
    )


def test_files() -> None:
    """Each rank saves and loads its part, frozen; a file of other shapes is a FormatError that names both, and the
    other ranks raise, too."""
    ranks.run(
        STACK
        + """
fast = fastlinear.convert(shared(stack()), tune="off", freeze=True)
path = f"{folder}/{rank}.safetensors"
fastlinear.save(fast, path)
with torch.device("meta"):
    empty = stack()
loaded = fastlinear.load(path, shared(stack()))
assert all(map(is_frozen, (loaded[0], loaded[2])))
check(loaded)
fastlinear.unfreeze(loaded)
assert torch.equal(loaded[2].weight.full_tensor(), stack()[2].weight)
whole = f"{folder}/whole{rank}.safetensors"
fastlinear.save(fastlinear.convert(stack(), tune="off", freeze=True), whole)
model = shared(stack())
wrong = "its layer '0' is 12 x 30, but Linear.in_features=12, out_features=30.*, of which this process has 12 x 15,"
raises(lambda: fastlinear.load(whole, model), fastlinear.FormatError, wrong)
if rank:
    raises(lambda: fastlinear.load(whole, model), fastlinear.FormatError, wrong)
else:
    raises(lambda: fastlinear.load(path, model), RuntimeError, "load failed in rank 1: FormatError")
check(model)
"""
    )


def test_transformers(tmp_path: Path) -> None:
    """tp_plan="auto" runs on the kernels, with and without a FastLinearConfig, in place, as a copy and frozen."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    ranks.run(
        f"""
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import transformers
from fastlinear.hf import FastLinearConfig
from fastlinear.layer.linear import is_fast
from fastlinear.layer.frozen import is_frozen
from transformers.distributed import DistributedConfig
transformers.logging.disable_progress_bar()
load = transformers.AutoModelForCausalLM.from_pretrained
tokens = torch.arange(10).view(2, 5)
stock = load({str(tmp_path)!r}).eval()
with torch.no_grad():
    expected = stock(tokens).logits
def shared(**options):
    return load({str(tmp_path)!r}, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"), **options).eval()
def check(model, frozen, tolerance=1e-5):
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=tolerance, atol=tolerance)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            assert is_fast(layer) and is_frozen(layer) is frozen, layer
            assert layer.plans and not layer._elsewhere, (layer, layer._elsewhere)
    up = model.model.layers[0].mlp.up_proj
    assert (up._engine.packed.n, up._engine.packed.k) == (24, 32)
    return model
model = shared()
copy = check(fastlinear.convert(model, tune="off"), False)
assert not any(map(is_fast, model.modules()))
with torch.no_grad():
    torch.testing.assert_close(model(tokens).logits, expected)
check(fastlinear.freeze(copy), True)
check(fastlinear.convert(model, tune="off", inplace=True, dtype=torch.bfloat16), False, 3e-2)
check(fastlinear.unconvert(model) and fastlinear.convert(model, tune="off"), False)
fast = check(shared(quantization_config=FastLinearConfig(quantize=fastlinear.Int8Dynamic())), True, 5e-2)
tokens = fast.generate(tokens, max_new_tokens=3, do_sample=False)
everyone = [torch.empty_like(tokens) for _ in range(2)]
dist.all_gather(everyone, tokens)
assert torch.equal(*everyone)
""",
        ahead="from transformers import AutoModelForCausalLM, LlamaForCausalLM",
    )
