"""convert on transformers' own experts in fp8 (FP8Experts), which it makes by its own function: their bits multiply."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastlinear
from fastlinear.layer import experts_frozen

fp8: Any = pytest.importorskip("transformers.integrations.finegrained_fp8")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heuristic chooses: these tests are of bits."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")


def stock(hidden: int = 192) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=48, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=64, moe_intermediate_size=hidden, num_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def in_fp8(plain: Any, block: list[int] | None) -> Any:
    """The same model with experts and layers of random fp8, whose numbers `plain` gets."""
    asked = transformers.FineGrainedFP8Config(weight_block_size=block)
    model = fp8.replace_with_fp8_linear(copy.deepcopy(plain), ["lm_head", "mlp.gate"], asked, True).eval()
    for name, module in model.named_modules():
        for own, parameter in list(module._parameters.items()):
            beside = f"{own}_scale_inv"
            if parameter is not None and beside in module._parameters:
                scale = torch.rand(module._parameters[beside].shape) / 64 + 1e-3
                values = torch.randn(parameter.shape).to(torch.float8_e4m3fn)
                module._parameters[own] = torch.nn.Parameter(values, requires_grad=False)
                module._parameters[beside] = torch.nn.Parameter(scale, requires_grad=False)
                numbers = values.double() * spread(scale, values.shape, block)
                plain.get_submodule(name)._parameters[own].data.copy_(numbers)
    return model


def spread(scale: Tensor, shape: torch.Size, block: list[int] | None) -> Tensor:
    """The scale of each element: of blocks, of a weight, or of either half of the rows."""
    if scale.dim() < 2:
        return scale.double()
    n, k = shape[-2:]
    rows, columns = block or (n // scale.shape[-2], k)
    return scale.double().repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(columns, -1)[..., :k]


@pytest.mark.parametrize(
    ("block", "packed"), [([128, 128], "fp8"), ([64, 32], "fp8"), (None, "fp8"), ([24, 24], "fp32")]
)
def test_bits_are_kept(block: list[int] | None, packed: str, tmp_path: Path) -> None:
    """Blocks of 128 x 128 and others, one scale for each weight, or for both halves of the first; blocks that no group
    can be are unpacked. The model answers as that of the numbers does, is saved and loaded, and unconverted."""
    plain = stock()
    model = in_fp8(plain, block)
    fast = fastlinear.convert(model)
    mixture, theirs = fast.model.layers[0].mlp.experts, plain.model.layers[0].mlp.experts
    assert type(mixture) is fastlinear.FastExperts and experts_frozen.are_frozen(mixture)
    assert mixture.packed_as == packed and type(model.model.layers[0].mlp.experts) is not type(mixture)
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(mixture, name), getattr(theirs, name))
    assert fast.state_dict().keys() == plain.state_dict().keys()
    with torch.inference_mode():
        y, want = fast(IDS).logits, plain(IDS).logits
        assert float((y - want).norm() / want.norm()) < 1e-5 and not mixture._elsewhere
        fastlinear.save(fast, tmp_path / "model.safetensors")
        assert torch.equal(fastlinear.load(tmp_path / "model.safetensors", stock())(IDS).logits, y)
        assert {row.origin for row in fastlinear.report(fast) if row.experts} == {
            "from fp8" if packed == "fp8" else "unpacked from fp8 to fp32"
        }
        again = fastlinear.unconvert(fast)(IDS).logits
    assert float((again - want).norm() / want.norm()) < 1e-5


def test_halves_of_their_own() -> None:
    """Where gates end within a block, what goes through them may begin another one, as files of single experts have
    it."""
    plain = stock(192)
    model = in_fp8(plain, [128, 128])
    mixture = model.model.layers[0].mlp.experts
    scale = torch.rand(3, 4, 1) / 64 + 1e-3
    mixture._parameters["gate_up_proj_scale_inv"] = torch.nn.Parameter(scale, requires_grad=False)
    by_row = torch.cat([half.repeat_interleave(128, 1)[:, :192] for half in scale.chunk(2, 1)], 1)
    fast = fastlinear.convert(model)
    assert torch.equal(fast.model.layers[0].mlp.experts.gate_up_proj, mixture.gate_up_proj.float() * by_row)


LEFT: dict[str, tuple[Callable[[Any], object], dict[str, Any], str]] = {
    "a NaN": (
        lambda m: m.down_proj.data.view(torch.uint8)[1, 2, 3:4].fill_(0xFF), {}, "its down_proj has NaN, which kernels",
    ),
    "fp4": (
        lambda m: m._parameters.update(gate_up_proj=torch.nn.Parameter(m.gate_up_proj.view(torch.int8), False)), {},
        "its gate_up_proj is torch.int8 with scales, and torch.float8_e4m3fn is supported",
    ),
    "scales of another size": (
        lambda m: setattr(m.down_proj_scale_inv, "data", torch.ones(3, 7, 2)), {},
        r"of its down_proj: weight_scale_inv is of shape \[7, 2\], not \[1, 2\]",
    ),
    "on meta": (lambda m: m.to("meta"), {}, "its gate_up_proj is on device meta"),
    "quantized once more": (
        lambda m: None, {"quantize": fastlinear.Int8WeightOnly()}, "its experts are quantized already, to fp8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT)
def test_left_alone(what: str) -> None:
    """With a reason in the report, and as they were."""
    change, asked, reason = LEFT[what]
    model = in_fp8(stock(), [128, 128])
    mixture = model.model.layers[0].mlp.experts
    change(mixture)
    kind, before = type(mixture), dict(mixture._parameters)
    fast = fastlinear.convert(model, inplace=True, **asked)
    assert type(mixture) is kind and mixture._parameters == before
    reasons = [str(row.reason) for row in fastlinear.report(fast) if row.experts]
    assert reasons and all(re.search(reason, each) for each in reasons), reasons


def test_what_fails_later_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_fp8(stock(), [128, 128])
    mixture = model.model.layers[0].mlp.experts
    kind, before = type(mixture), dict(mixture._parameters)

    def fail(*_: object) -> None:
        raise RuntimeError("later")

    monkeypatch.setattr("fastlinear.model.convert.forbid_bypasses", fail)
    with pytest.raises(RuntimeError, match="later"):
        fastlinear.convert(model, inplace=True)
    assert type(mixture) is kind and mixture._parameters == before and "_form" not in vars(mixture)
