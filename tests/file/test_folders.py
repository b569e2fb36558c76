"""load_quantized on folders of safetensors: each scheme, packed here as its own packer does, arrives bit for bit."""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packers import GROUP, SCHEMES, Parts, compressed, ct, gptq, scales, spread
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlinear
from fastlinear import FormatError

from .test_damage import in_child, mutate_bytes

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heuristic chooses: these tests are of bits."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")


def config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=48, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip


def on_meta(dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config(), dtype=dtype).eval()


def written(folder: Path, scheme: str, shards: int = 1) -> dict[str, Tensor]:
    """Writes a checkpoint, and tells its weights in fp64."""
    torch.manual_seed(0)
    pack, told, _ = SCHEMES[scheme]
    weights: dict[str, Tensor] = {}
    tensors: Parts = {}
    model = on_meta()
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and name != "lm_head.weight":
            weights[name], parts = pack(*parameter.shape)
            stem = name.removesuffix("weight")
            tensors |= {stem + part: tensor.contiguous() for part, tensor in parts.items()}
        else:
            tensors[name] = torch.randn(parameter.shape).half()
            weights[name] = tensors[name].double()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": told}))
    names = ["model.safetensors"] if shards == 1 else [f"model-{i}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        save_file(dict(list(tensors.items())[i::shards]), folder / name)
    if shards > 1:
        places = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return weights


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, tmp_path: Path) -> None:
    """Each weight is the fp64 formula of the format, rounded to fp32 no more than its own steps round, packed as wide
    as it has to be; and the model runs."""
    weights = written(tmp_path, scheme, shards=2 if scheme == "awq" else 1)
    fast = fastlinear.load_quantized(tmp_path, on_meta())
    state = fast.state_dict()
    assert state.keys() == weights.keys()
    exact = scheme not in ("hqq", "nf4 nested")  # whose zero points, or scales, are floats of their own
    for name, expected in weights.items():
        if exact:
            assert torch.equal(state[name], expected.float()), name
        else:
            torch.testing.assert_close(state[name], expected.float(), rtol=1e-6, atol=1e-6)
    packs = {m._frozen.packed.format for name, m in fast.named_modules() if isinstance(m, nn.Linear) and "proj" in name}
    assert packs == {SCHEMES[scheme][2]}
    with torch.inference_mode():
        assert fast(IDS).logits.isfinite().all()


_MIXED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*mlp.*": {"bits": 8}}}),
    "compressed-tensors": (
        compressed,
        {"quant_method": "compressed-tensors", "config_groups": {
            f"group_{i}": {"targets": [target], "weights": {"num_bits": bits, "type": "int"}}
            for i, (target, bits) in enumerate((("re:.*attn.*", 4), ("re:.*mlp.*", 8)))
        }},
    ),
}  # fmt: skip


_INPUTS = ("input_scale", "input_zero_point")


@pytest.mark.parametrize("method", _MIXED)
def test_layers_of_several_kinds(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer has the bits that its tensors have, whatever patterns of names a config tells of; and what packers
    have written beside weights (biases of zeros, buffers that a model computes, scales of inputs) is no fault."""
    pack, told = _MIXED[method]
    bits = itertools.cycle((4, 8))

    def mixed(n: int, k: int) -> Any:
        weight, parts = pack(n, k, bits=next(bits))
        return weight, parts | (
            {"bias": torch.zeros(n)} if method == "gptq" else {name: torch.zeros(1) for name in _INPUTS}
        )

    monkeypatch.setitem(SCHEMES, "mixed", (mixed, told, ""))
    weights = written(tmp_path, "mixed")
    save_file(
        {**load_file(tmp_path / "model.safetensors"), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)},
        tmp_path / "model.safetensors",
    )
    fast = fastlinear.load_quantized(tmp_path, on_meta())
    state = fast.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name].float()) for name in weights)
    assert {m._frozen.packed.format for m in fast.model.modules() if isinstance(m, nn.Linear)} == {"int4", "int8g"}


@pytest.mark.parametrize("zeros", [False, True])
def test_compressed_tensors_own_packer(zeros: bool, tmp_path: Path) -> None:
    """What its package packs is what is read."""
    reason = "compressed-tensors is the format's own packer"
    helpers: Any = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason=reason)
    from fastlinear.spec.checkpoints import SCHEMES as READ
    from fastlinear.spec.packed import stands_for

    n, k = 24, 128
    codes, scale = torch.randint(-8, 8, (n, k)).to(torch.int8), scales(n, k // GROUP)
    parts = {
        "weight_packed": helpers.pack_to_int32(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }
    zero = torch.zeros(n, k // GROUP, dtype=torch.int8)
    if zeros:
        zero = torch.randint(-8, 8, zero.shape).to(torch.int8)
        parts["weight_zero_point"] = helpers.pack_to_int32(zero, 4, packed_dim=0)
    weight = READ["compressed-tensors"][0].weight(parts, ct(4))
    assert torch.equal(stands_for(weight), (spread(scale, k) * (codes - spread(zero, k))).float())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_own_packer(kind: str, nested: bool) -> None:
    """What its package packs is read as its own dequantization has it."""
    bnb: Any = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is the format's own packer")
    from fastlinear.spec.checkpoints import SCHEMES as READ
    from fastlinear.spec.packed import stands_for

    data, state = bnb.quantize_4bit(torch.randn(24, 128), quant_type=kind, compress_statistics=nested, blocksize=64)
    parts = {"weight": data, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
    read = stands_for(READ["bitsandbytes"][0].weight(parts, {}))
    torch.testing.assert_close(read, bnb.dequantize_4bit(data, state), rtol=1e-6 if nested else 0, atol=0)


@pytest.mark.parametrize("number", [math.inf, math.nan])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_table_that_has_no_numbers(number: float, dynamic: bool, tmp_path: Path) -> None:
    """Bits are kept whatever they stand for, and such codes are none that integer products take."""
    changed(tmp_path, "nf4", lambda tensors, _: tensors[f"{Q}.weight.quant_map"][3:4].fill_(number))
    layer = fastlinear.load_quantized(tmp_path, on_meta(), dynamic=dynamic).get_submodule(Q)
    assert layer._frozen.packed.format == "int4" and layer._precision.rows is None and not layer.weight.isfinite().all()


# ---- bad input ----


def changed(folder: Path, scheme: str, edit: Callable[[Parts, dict[str, Any]], object]) -> None:
    written(folder, scheme)
    from safetensors.torch import load_file

    tensors, told = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    edit(tensors, told["quantization_config"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(told))


Q = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[str, Callable[[Parts, dict[str, Any]], object], str]] = {
    "3 bits": ("gptq v1", lambda t, c: c.update(bits=3), rf"layer '{Q}': its bits are 3, and 4 and 8 are supported"),
    "AWQ gemv": ("awq", lambda t, c: c.update(version="gemv"), r"AWQ's version 'gemv', and 'gemm' is supported"),
    "groups that are none": (
        "compressed", lambda t, c: c.update(config_groups={"group_0": 4}), r"config_groups do not tell in which way",
    ),
    "HQQ axis 0": ("hqq", lambda t, c: t.update({f"{Q}.axis": torch.tensor(0)}), rf"{Q}': its axis is \[0\]"),
    "a format of compressed-tensors": (
        "compressed", lambda t, c: c.update(format="nvfp4-pack-quantized"),
        "its format is 'nvfp4-pack-quantized', and read are pack-quantized, int-quantized",
    ),
    "a format of some layers": (
        "compressed", lambda t, c: c["config_groups"]["group_0"].update(format="mxfp4-pack-quantized"),
        "its format is 'mxfp4-pack-quantized'",
    ),
    "a packing of AutoRound": (
        "auto-round", lambda t, c: c.update(packing_format="auto_round:tritonv2"),
        "its packing_format is 'auto_round:tritonv2', and read are auto_round:auto_gptq, auto_round:auto_awq",
    ),
    "another method": ("awq", lambda t, c: c.update(quant_method="quip"), r"quant_method is 'quip', and read are gptq"),
    "a lost part": ("gptq v1", lambda t, c: t.pop(f"{Q}.scales"), rf"lacks 1 tensor \({Q}.weight\).* has 3 tensors"),
    "another dtype": (
        "awq", lambda t, c: t.update({f"{Q}.scales": t[f"{Q}.scales"].double()}), "scales is torch.float64",
    ),
    "a group that does not fit": (
        "awq", lambda t, c: t.update({f"{Q}.scales": t[f"{Q}.scales"][:1], f"{Q}.qzeros": t[f"{Q}.qzeros"]}),
        rf"{Q}': qzeros is of shape \[2, 16\], not \[1, 16\]",
    ),
    "another shape": (
        "compressed", lambda t, c: t.update({f"{Q}.weight_shape": torch.tensor([128, 1 << 40])}), "does not hold",
    ),
    "groups out of range": (
        "gptq order", lambda t, c: t[f"{Q}.g_idx"].fill_(99), rf"{Q}': g_idx names groups that are none of 2",
    ),
}  # fmt: skip


def snapshot(model: nn.Module) -> list[Any]:
    return [(type(m), *map(id, (*m._parameters.values(), *m._buffers.values()))) for m in model.modules()]


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    """With the tensor or the layer, what is supported, and the model as it was."""
    scheme, edit, message = REFUSED[what]
    changed(tmp_path, scheme, edit)
    model = on_meta()
    before = snapshot(model)
    with pytest.raises(FormatError, match=message):
        fastlinear.load_quantized(tmp_path, model)
    assert snapshot(model) == before


def mutations(folder: Path, scheme: str, count: int) -> Counter[str]:
    """Of the file, and of the numbers in its tensors that tell shapes and groups."""
    written(folder, scheme)
    path = folder / "model.safetensors"
    good = path.read_bytes()

    def work() -> Any:
        outcomes: Counter[str] = Counter()
        dice, model = random.Random(3), on_meta()
        for i in range(count):
            raw = bytearray(good)
            if i % 2:
                mutate_bytes(raw, dice)
            else:
                for _ in range(8):
                    raw[dice.randrange(len(raw))] = dice.choice((0, 1, 127, 128, 255))
            path.write_bytes(raw)
            before = snapshot(model)
            try:
                fastlinear.load_quantized(folder, model)
            except FormatError:
                assert snapshot(model) == before
                outcomes["refused"] += 1
            else:
                outcomes["loaded"] += 1
                model = on_meta()
        return outcomes

    return Counter(in_child(work, 3000))


@pytest.mark.parametrize("scheme", ["gptq order", "compressed zeros", "nf4 nested"])
def test_random_mutations(scheme: str, tmp_path: Path) -> None:
    """Refused, the model being as it was, or loaded whole; no crash, no hang, no huge allocation."""
    assert mutations(tmp_path, scheme, 40).total() == 40


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_mutations_for_long(scheme: str, tmp_path: Path) -> None:
    """20,000 of them."""
    outcomes = mutations(tmp_path, scheme, 20_000)
    assert outcomes.total() == 20_000 and outcomes["refused"] > 1000 and outcomes["loaded"] > 100
