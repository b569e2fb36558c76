"""fastlinear.hf: what transformers loads with a FastLinearConfig is what convert makes of the stock model."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import library
import pytest
import torch
import zygote
from models import fast_names
from torch import Tensor, nn

import fastlinear
from fastlinear.layer import experts
from fastlinear.layer.embedding import FastEmbedding
from fastlinear.layer.frozen import is_frozen

transformers = pytest.importorskip("transformers")
from fastlinear.hf import FastLinearConfig  # noqa: E402

TOKENS = torch.arange(10, device="cpu").view(2, 5)
SCHEMES: list[dict[str, Any]] = [
    {},
    {"freeze": False},
    {"dtype": torch.bfloat16},
    {"quantize": fastlinear.Int8WeightOnly()},
    {"quantize": fastlinear.Int8Dynamic(asymmetric=True), "include": "model.layers.0.*", "exclude": "*q_proj"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A language model of random weights as transformers saves it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


@pytest.mark.parametrize("how", SCHEMES, ids=str)
def test_loading(folder: Path, how: dict[str, Any]) -> None:
    """from_pretrained converts as convert does, saved it loads again with the same answers, and stock elsewhere."""
    expected = fastlinear.convert(load(folder), **{"freeze": True, **how})
    model = load(folder, quantization_config=FastLinearConfig(**how))
    assert fast_names(model) == fast_names(expected) != set()
    layers = [model.get_submodule(name) for name in fast_names(model)]
    assert all(is_frozen(layer) is how.get("freeze", True) for layer in layers)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)

    model.save_pretrained(folder.parent / "saved")
    again = load(folder.parent / "saved")
    assert fast_names(again) == fast_names(model)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert again.config.quantization_config.to_dict() == FastLinearConfig(**how).to_dict()


def test_a_saved_folder_is_a_stock_one_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this module is not imported, transformers knows no such method, and loads plain layers."""
    model = load(folder, quantization_config=FastLinearConfig(freeze=False))
    model.save_pretrained(folder)
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "fastlinear")
    stock = load(folder)
    assert fast_names(stock) == set()
    torch.testing.assert_close(logits(stock), logits(model))


def test_what_keeps_its_parameters_is_an_ordinary_model(folder: Path, tmp_path: Path) -> None:
    """half(), to() and Trainer do what they do to a stock model."""
    model = load(folder, quantization_config=FastLinearConfig(freeze=False))
    names = fast_names(model)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer(model, tmp_path).train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert logits(model.eval().half()).dtype is torch.float16
    assert logits(model.to(torch.bfloat16)).dtype is torch.bfloat16
    assert fast_names(model) == names


def test_what_is_frozen_is_quantized_to_transformers(folder: Path, tmp_path: Path) -> None:
    """half() and Trainer say so, to() and dequantize() give parameters again."""
    model = load(folder, quantization_config=FastLinearConfig())
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer(model, tmp_path)
    assert logits(model.to(torch.bfloat16)).dtype is torch.bfloat16
    stock = load(folder, quantization_config=FastLinearConfig()).dequantize()
    assert fast_names(stock) == set()
    torch.testing.assert_close(logits(stock), logits(load(folder)))
    assert logits(stock.half()).dtype is torch.float16


def trainer(model: Any, folder: Path) -> Any:
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows)


def test_generate(folder: Path) -> None:
    """Greedy tokens are those of the stock model."""
    model = load(folder, quantization_config=FastLinearConfig())
    tokens = [m.generate(TOKENS + 3, max_new_tokens=6, do_sample=False) for m in (load(folder), model)]
    assert torch.equal(*tokens)


def test_a_calibration_is_used_and_not_written(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Int8Static loads so; save_pretrained refuses, and the log names what can save it."""
    calibration = fastlinear.calibrate(load(folder), [TOKENS])
    config = FastLinearConfig(quantize=fastlinear.Int8Static(calibration))
    model = load(folder, quantization_config=config)
    assert fast_names(model)
    json.dumps(config.to_dict())
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert "fastlinear.save can" in caplog.text


def test_a_file_of_save_beside_the_config(folder: Path) -> None:
    """from_pretrained maps it, by whatever config.json, and save_pretrained writes stock weights of it."""
    model = load(folder, quantization_config=FastLinearConfig(quantize=fastlinear.Int8WeightOnly()))
    fastlinear.save(model, folder / "model.safetensors")
    again, info = load(folder, quantization_config=FastLinearConfig(), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert fast_names(again) == fast_names(model)
    assert all(is_frozen(again.get_submodule(name)) for name in fast_names(model))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    tokens = [each.generate(TOKENS + 3, max_new_tokens=4, do_sample=False) for each in (model, again)]
    assert torch.equal(*tokens)

    model.config.save_pretrained(folder)  # which names the quantizer, so that nobody has to
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "transformers_weights": "fast.safetensors"}))
    (folder / "model.safetensors").rename(folder / "fast.safetensors")
    torch.testing.assert_close(logits(load(folder)), logits(model), rtol=0, atol=0)
    again.save_pretrained(folder.parent / "saved")
    stock = load(folder.parent / "saved").dequantize()
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)


def test_a_file_of_save_that_is_of_another_model(folder: Path) -> None:
    """FormatError, as of `fastlinear.load`."""
    model = load(folder, quantization_config=FastLinearConfig())
    del model.lm_head
    fastlinear.save(model, folder / "model.safetensors")
    with pytest.raises(fastlinear.FormatError, match=r"lacks 1 tensor \(lm_head\.weight\)"):
        load(folder, quantization_config=FastLinearConfig())


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16], ids=str)
def test_memory(tmp_path: Path, dtype: Any) -> None:
    """Loading peaks at 1.15 times the larger of file and model, and leaves no pages of the file that were packed."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    load(tmp_path, quantization_config=FastLinearConfig(), dtype=dtype)  # what it imports
    size = (tmp_path / "model.safetensors").stat().st_size
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew
    before = status()
    model = load(tmp_path, quantization_config=FastLinearConfig(), dtype=dtype)
    after = status()
    assert len(fast_names(model)) == 43
    assert after["VmHWM"] - before["VmRSS"] < 1.15 * size
    assert after["RssFile"] - before["RssFile"] < 0.15 * size


@pytest.mark.parametrize(
    "how", [{"quantize": fastlinear.Int8Dynamic()}, {"dtype": torch.bfloat16}], ids=["int8", "bf16"]
)
def test_weights_that_are_cast_up(tmp_path: Path, how: dict[str, Any]) -> None:
    """Of a file in bf16 that is loaded as fp32 and packed in fewer bytes: the layers are those of a model that was
    loaded, and then converted."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    asked = FastLinearConfig(exclude="model.layers.0.mlp", **how)
    plain = load(tmp_path, dtype=torch.float32)
    want = fastlinear.convert(plain, exclude="model.layers.0.mlp", freeze=True, inplace=True, **how)
    model = load(tmp_path, quantization_config=asked, dtype=torch.float32)
    assert fast_names(model) == fast_names(want) and len(fast_names(model)) == 39
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), logits(want), rtol=0, atol=0)
    state, expected = model.dequantize().state_dict(), fastlinear.unconvert(want).state_dict()
    assert all(torch.equal(state[name], value) and value.dtype is torch.float32 for name, value in expected.items())


_PEAK = f"""{library.PEAK}
import sys, torch, transformers, fastlinear
from fastlinear.hf import FastLinearConfig

def load(path):
    how = dict(
        int8=dict(quantize=fastlinear.Int8Dynamic()), int4=dict(quantize=fastlinear.Int4Dynamic()),
        bf16=dict(dtype=torch.bfloat16),
    )[sys.argv[3]]
    asked = FastLinearConfig(**how)
    return transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=asked, dtype=torch.float32)

load(sys.argv[1])  # what it imports
begin()
model = load(sys.argv[2])
print(peak())
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["int8", "int4", "bf16"])
def test_memory_of_weights_that_are_cast_up(folder: Path, tmp_path: Path, how: str) -> None:
    """No more than 1.15 times the file, with what quantization and its measure take on the way, and freed memory that
    lies between packs; in a process of its own, which has no other to reuse."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=4
    )
    path = tmp_path / "larger"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    found = subprocess.run(
        [sys.executable, "-c", _PEAK, folder, path, how], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    size = (path / "model.safetensors").stat().st_size
    assert 0.3 * size < float(found.stdout.split()[-1]) <= 1.15 * size


def status() -> dict[str, int]:
    """Memory of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"dtype": "float7"}, TypeError, "dtype must be"),
        ({"dtype": torch.float64}, ValueError, "dtype must be"),
        ({"quantize": "int8"}, TypeError, "quantize must be"),
        ({"quantize": {"scheme": "Int3"}}, ValueError, "a scheme of Int8Dynamic"),
        ({"include": nn.Linear}, TypeError, "takes names and globs"),
        ({"exclude": [3]}, TypeError, "takes names and globs"),
        ({"freeze": "no"}, TypeError, "True or False"),
        ({"embeddings": fastlinear.Int8Dynamic()}, TypeError, "embeddings must be Int8WeightOnly"),
        ({"quant_method": "awq"}, ValueError, "'awq'"),
    ],
)
def test_arguments(how: dict[str, Any], error: type[Exception], words: str) -> None:
    """Wrong ones are refused where they are given, before a model is loaded."""
    with pytest.raises(error, match=words):
        FastLinearConfig(**how)


@pytest.mark.parametrize(
    "scheme", [fastlinear.Int4WeightOnly(64, scales=torch.bfloat16), fastlinear.Int4Dynamic(), fastlinear.Int8Dynamic()]
)
def test_what_a_config_tells(scheme: Any) -> None:
    """Every scheme that needs no calibration survives JSON, and so do embeddings."""
    config = FastLinearConfig(quantize=scheme, embeddings=fastlinear.Int8WeightOnly())
    again = FastLinearConfig(**json.loads(json.dumps(config.to_dict())))
    assert again.quantize == scheme and again.embeddings == fastlinear.Int8WeightOnly()
    assert again.to_dict() == config.to_dict()


def test_embeddings(folder: Path) -> None:
    """They are packed as by `convert`, unless they are excluded."""
    asked: dict[str, Any] = {"embeddings": fastlinear.Int8WeightOnly()}
    model = load(folder, quantization_config=FastLinearConfig(**asked))
    plain = fastlinear.convert(load(folder), freeze=True, **asked)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
    assert isinstance(model.get_input_embeddings(), FastEmbedding)
    kept = load(folder, quantization_config=FastLinearConfig(exclude="model.embed_tokens", **asked))
    assert not isinstance(kept.get_input_embeddings(), FastEmbedding)


def test_transformers_missing_or_old() -> None:
    """One line names the extra and the version, and `import fastlinear` needs neither."""
    program = """
import sys
from importlib import metadata
import fastlinear
assert "transformers" not in sys.modules
real = metadata.version
def version(name):
    if name == "transformers" and there is None:
        raise metadata.PackageNotFoundError(name)
    return there if name == "transformers" else real(name)
metadata.version = version
for there in (None, "4.57.1"):
    try:
        import fastlinear.hf
    except ImportError as error:
        print(error)
"""
    printed = zygote.checked(program)
    needs = "fastlinear.hf needs transformers 5.0 or newer"
    remedy = "pip install 'fastlinear[hf]'"
    assert printed.splitlines() == [
        f"{needs}, which is not installed: {remedy}",
        f"{needs}, but 4.57.1 is installed: {remedy}",
    ]


def test_nothing_is_said_while_loading(folder: Path) -> None:
    """No warning, neither of transformers nor of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, quantization_config=FastLinearConfig())


@torch.no_grad()
def test_experts_implementation() -> None:
    """experts_implementation="fastlinear": experts alone become fast, at their first call; training is as before."""
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    stock = transformers.MixtralForCausalLM(config).eval()
    want = stock(TOKENS).logits
    stock.set_experts_implementation("fastlinear")
    torch.testing.assert_close(stock(TOKENS).logits, want)
    mixture = stock.model.layers[0].mlp.experts
    assert experts.is_fast_experts(mixture) and not mixture._elsewhere and not fast_names(stock)
    torch.testing.assert_close(stock.train()(TOKENS).logits, want)
    assert mixture._elsewhere == {"training": 1}
    odd = transformers.MixtralForCausalLM(config).eval()
    odd.model.layers[0].mlp.experts.act_fn = nn.Softshrink()
    want = odd(TOKENS).logits
    odd.set_experts_implementation("fastlinear")
    torch.testing.assert_close(odd(TOKENS).logits, want)
    assert not experts.is_fast_experts(odd.model.layers[0].mlp.experts)
