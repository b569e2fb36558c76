"""One way to generate text from a GGUF file, in a process of its own: python generator.py NAME FILE TOKENS THREADS

generation.py is the other end; it runs llama.cpp with the interpreter of an environment that has neither torch nor
fastlinear.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apart import serve
from timing import settle

Generate = Callable[[list[int], int], tuple[list[int], list[float]]]
# From a prompt and a number of tokens to the answer, and the time before it and after each of its tokens.


def llama_cpp(path: Path, tokens: int, threads: int) -> Generate:
    import llama

    model = llama.Model(path, tokens, threads)

    def generate(prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        answer, times = list[int](), [time.perf_counter()]
        model.forget()
        for _ in range(count):
            answer.append(model.next_of(answer[-1:] or prompt))
            times.append(time.perf_counter())
        return answer, times

    return generate


def transformers_generate(model: Any) -> Generate:
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Takes the time whenever tokens are handed to it; those of the prompt come first, before anything is made."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def generate(prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        ids, clock = torch.tensor([prompt]), Clock()
        with torch.inference_mode():
            start = time.perf_counter()
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                streamer=clock,
            )
        return made[0, len(prompt) :].tolist(), [start, *clock.times[1:]]

    return generate


def backend(path: Path, tokens: int, threads: int, dynamic: bool = False, half: bool = False) -> Generate:
    """Through transformers' generate on recorded graphs, and a cache that is there from the start."""
    import gguf_files
    import torch
    import transformers

    from fastlinear.hf import prepare_generation

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model = gguf_files.load(path, torch.bfloat16 if half else torch.float32, dynamic)
    return transformers_generate(prepare_generation(model, length=tokens))


WAYS: dict[str, Callable[[Path, int, int], Generate]] = {
    "fp32 rows": backend,
    "int8 rows": functools.partial(backend, dynamic=True),
    "bf16 rows": functools.partial(backend, half=True),
    "llama.cpp": llama_cpp,
}


class Generator:
    """What generation.py may ask for."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate

    def generate(self, prompt: Sequence[int], count: int) -> tuple[list[int], float, float]:
        """The answer, seconds of the prompt up to its first token, and seconds of each token after that."""
        answer, times = self._generate(list(prompt), count)
        settle()
        return answer, times[1] - times[0], (times[-1] - times[1]) / (count - 1)

    def about(self) -> str:
        """Of llama.cpp, the instruction sets that it was built for."""
        import llama

        return llama.about()


def main(name: str, path: str, tokens: str, threads: str) -> None:
    serve(lambda: Generator(WAYS[name](Path(path), int(tokens), int(threads))))


if __name__ == "__main__":
    main(*sys.argv[1:])
