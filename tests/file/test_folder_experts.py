"""load_quantized on folders whose experts are stored one by one, as other packages write them, or at once in fp8."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packers import SCHEMES, Parts, awq, fp8, gptq
from safetensors.torch import save_file
from torch import Tensor, nn

import fastlinear
from fastlinear import FormatError
from fastlinear.layer import experts_frozen

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
# The model, what its checkpoints call a mixture, and the layers of an expert.
MODELS: dict[str, tuple[Any, str, tuple[str, str, str]]] = {
    "qwen3_moe": (
        lambda: transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=192, num_experts=3, head_dim=32),
        "mlp", ("gate_proj", "up_proj", "down_proj"),
    ),
    "mixtral": (
        lambda: transformers.MixtralConfig(**SIZES, intermediate_size=192, num_local_experts=3),
        "block_sparse_moe", ("w1", "w3", "w2"),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heuristic chooses: these tests are of bits."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")


def on_meta(kind: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(MODELS[kind][0](), dtype=torch.float32).eval()


def write(folder: Path, kind: str, pack: Any, told: dict[str, Any], **changed: Tensor | None) -> dict[str, Tensor]:
    """A checkpoint, and its weights in fp64 by their names in the model."""
    torch.manual_seed(0)
    _, mixture, names = MODELS[kind]
    weights: dict[str, Tensor] = {}
    tensors: Parts = {}
    model = on_meta(kind)

    def packed(stem: str, n: int, k: int) -> Tensor:
        weight, parts = pack(n, k)
        tensors.update({f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()})
        return weight

    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        stem = module.replace(".mlp", f".{mixture}")
        if parameter.dim() == 3:
            count, n, k = parameter.shape
            layers = [(names[0], n // 2), (names[1], n // 2)] if own == "gate_up_proj" else [(names[2], n)]
            weights[name] = torch.stack(
                [torch.cat([packed(f"{stem}.{e}.{layer}", rows, k) for layer, rows in layers]) for e in range(count)]
            )
        elif isinstance(model.get_submodule(module), nn.Linear) and module != "lm_head":
            weights[name] = packed(stem, *parameter.shape)
        else:
            tensors[f"{stem}.{own}"] = torch.randn(parameter.shape).half()
            weights[name] = tensors[f"{stem}.{own}"].double()
    for name, tensor in changed.items():
        full = name.replace("__", ".")
        tensors.pop(full, None)
        tensors |= {} if tensor is None else {full: tensor}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": told}))
    save_file(tensors, folder / "model.safetensors")
    return weights


def agrees(fast: Any, weights: dict[str, Tensor], exact: bool = True) -> None:
    """Its weights are these, rounded once, and it answers as the stock model of them does."""
    state = fast.state_dict()
    assert state.keys() == weights.keys()
    for name, expected in weights.items():
        near = {} if exact else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(state[name], expected.float(), **(near or {"rtol": 0, "atol": 0}), msg=name)
    stock = type(fast)(fast.config).eval()
    stock.load_state_dict({name: weight.float() for name, weight in weights.items()})
    with torch.inference_mode():
        y, want = fast(IDS).logits, stock(IDS).logits
    assert float((y - want).norm() / want.norm()) < 1e-4
    assert not any(vars(module).get("_elsewhere") for module in fast.modules())


WHOLE = [name for name in SCHEMES if "order" not in name and "uneven" not in name]


@pytest.mark.parametrize("scheme", WHOLE)
def test_every_scheme(scheme: str, tmp_path: Path) -> None:
    """Experts keep the bits of their layers, gates before what goes through them, in packs as wide as these are."""
    kind = "mixtral" if scheme == "awq" else "qwen3_moe"
    pack, told, packed = SCHEMES[scheme]
    weights = write(tmp_path, kind, pack, told)
    fast = fastlinear.load_quantized(tmp_path, on_meta(kind))
    mixture = fast.model.layers[0].mlp.experts
    assert experts_frozen.are_frozen(mixture) and mixture.packed_as == packed
    agrees(fast, weights, exact=scheme not in ("hqq", "nf4 nested"))
    (origin,) = {row.origin for row in fastlinear.report(fast) if row.experts}
    assert origin.startswith("from")


def test_experts_in_floats(tmp_path: Path) -> None:
    """Where a checkpoint leaves experts as they were, they are Parameters, which `convert` packs."""
    weights = write(tmp_path, "mixtral", lambda n, k: _plain(torch.randn(n, k)), {"quant_method": "awq"})
    fast = fastlinear.load_quantized(tmp_path, on_meta("mixtral"))
    assert isinstance(fast.model.layers[0].mlp.experts.down_proj, nn.Parameter)
    agrees(fast, weights)


def test_fp8_at_once(tmp_path: Path) -> None:
    """Weights of all experts in one tensor, with the scales of all in another."""
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    every = [fp8(n, k) for n, k in [(384, 128)] * 3 + [(128, 192)] * 3]
    at_once = {
        f"model__layers__0__mlp__experts__{own}{end}": torch.stack([parts[part] for _, parts in group])
        for own, group in (("gate_up_proj", every[:3]), ("down_proj", every[3:]))
        for end, part in (("", "weight"), ("_scale_inv", "weight_scale_inv"))
    }
    lost = {
        f"model__layers__0__mlp__experts__{e}__{layer}__{part}": None
        for e in range(3) for layer in MODELS["qwen3_moe"][2] for part in ("weight", "weight_scale_inv")
    }  # fmt: skip
    weights = write(tmp_path, "qwen3_moe", fp8, blocks, **lost, **at_once)
    for own, group in (("gate_up_proj", every[:3]), ("down_proj", every[3:])):
        weights[f"model.layers.0.mlp.experts.{own}"] = torch.stack([weight for weight, _ in group])
    fast = fastlinear.load_quantized(tmp_path, on_meta("qwen3_moe"))
    assert fast.model.layers[0].mlp.experts.packed_as == "fp8"
    agrees(fast, weights)
    with torch.inference_mode():
        assert fastlinear.unconvert(fast)(IDS).logits.isfinite().all()


def _plain(weight: Tensor) -> tuple[Tensor, Parts]:
    return weight.double(), {"weight": weight}


def test_zero_points_that_say_nothing(tmp_path: Path) -> None:
    """Some experts of an asymmetric checkpoint may have zero points in the middle, and no offsets by themselves."""
    turns = iter([True, True, False] * 99)

    def pack(n: int, k: int) -> Any:
        return gptq(n, k, sym=next(turns), second=True)

    told = {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"}
    weights = write(tmp_path, "mixtral", pack, told)
    agrees(fastlinear.load_quantized(tmp_path, on_meta("mixtral")), weights)


E0 = "model__layers__0__mlp__experts__0__"
REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Tensor | None], str]] = {
    "an order of columns": (
        lambda n, k: gptq(n, k, order="scattered"), {"quant_method": "gptq", "bits": 4}, {},
        "model.layers.0.mlp.experts: the columns of its experts are in orders of their own",
    ),
    "3 bits": (
        lambda n, k: gptq(n, k), {"quant_method": "gptq", "bits": 3}, {}, "its bits are 3, and 4 and 8 are supported",
    ),
    "a lost expert": (awq, {"quant_method": "awq"}, {f"{E0}up_proj__scales": None}, "lacks 2 tensors .*gate_up_proj"),
    "another size": (
        lambda n, k: _plain(torch.randn(n, k)), {"quant_method": "awq"}, {f"{E0}up_proj__weight": torch.ones(9, 128)},
        r"experts.1.gate_proj' is \(192, 128\)",
    ),
    "a NaN": (
        fp8, {"quant_method": "fp8"},
        {f"{E0}down_proj__weight": torch.full((128, 192), torch.nan).to(torch.float8_e4m3fn)},
        "experts: expert 1 would be packed as fp8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    """With the name of the layer, or of the experts, and the model as it was."""
    pack, told, changed, message = REFUSED[what]
    write(tmp_path, "qwen3_moe", pack, told, **changed)
    model = on_meta("qwen3_moe")
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    with pytest.raises(FormatError, match=message):
        fastlinear.load_quantized(tmp_path, model)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
