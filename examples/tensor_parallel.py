"""Tensor parallelism: ranks, processes on one machine or several, share a model of whose layers they have parts.

    python examples/tensor_parallel.py [--ranks 2] [--hidden 1024] [--layers 4] [--tokens 1]

A Llama of random weights is written once, and loaded by each rank with transformers' tensor parallelism, which splits
its weights: of a block's first products each rank has a part of the outputs, of its last ones a part of the inputs,
whose sums all ranks then add. `fastlinear.convert` packs each rank's part, with plans for it. One process with the
whole model says what is right.

Ranks pay where products are large: one a socket, each with that socket's memory and threads. The last line tells what
splitting costs beside the products and the sums: hooks, and the waiting of one rank for the other.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers.distributed import DistributedConfig

import fastlinear

PATIENCE = 300.0  # seconds to wait for another process
TOKENS = 20  # that are timed


class Story(NamedTuple):
    """What a rank tells: milliseconds a token, and the answer to one."""

    token: float
    sums: float  # of that
    parts: float  # a plain model of the size of this rank's parts, which knows of no other rank
    fast: int  # layers on the kernels
    answer: list[float]
    report: str


def config(options: argparse.Namespace, ranks: int = 1) -> transformers.LlamaConfig:
    """Of the model, or of one that is as large as a rank's part of it."""
    heads = options.heads // ranks
    return transformers.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden // ranks,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=options.hidden // options.heads,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


class TimedSums:
    """Stands for dist.all_reduce, and keeps the seconds that it takes."""

    def __init__(self) -> None:
        self.plain, self.seconds = dist.all_reduce, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        done = self.plain(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return done


@torch.no_grad()
def milliseconds(model: torch.nn.Module, ids: Tensor, sums: TimedSums | None = None) -> tuple[float, float]:
    """Of one token, and of the sums in it: the medians of some. All ranks begin each together."""
    times = []
    for _ in range(TOKENS + 2):  # two to warm up
        dist.barrier()
        if sums is not None:
            sums.seconds = 0.0
        start = time.perf_counter()
        model(ids, use_cache=False)
        times.append((1e3 * (time.perf_counter() - start), 0.0 if sums is None else 1e3 * sums.seconds))
    return tuple(map(statistics.median, zip(*times[2:], strict=True)))  # type: ignore[return-value]


def work(rank: int, folder: str, options: argparse.Namespace, stories: Queue) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.ranks))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=options.ranks)
    split = DistributedConfig(tp_size=options.ranks, tp_plan="auto")
    model = transformers.AutoModel.from_pretrained(folder, distributed_config=split).eval()
    fastlinear.convert(model, inplace=True, freeze=True)
    ids = torch.arange(options.tokens)[None] + 3
    part = fastlinear.convert(transformers.LlamaModel(config(options, options.ranks)).eval(), inplace=True, freeze=True)
    with torch.no_grad():
        for each in (model, part):
            fastlinear.tune(each, {"input_ids": ids, "use_cache": False}, progress=False)
        answer = model(ids, use_cache=False).last_hidden_state
    dist.all_reduce = sums = TimedSums()
    token, summed = milliseconds(model, ids, sums)
    parts, _ = milliseconds(part, ids)
    fast = sum(isinstance(module, fastlinear.FastLinear) for module in model.modules())
    stories.put(Story(token, summed, parts, fast, answer.flatten().tolist(), str(fastlinear.report(model))))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("ranks", 2, "processes"),
        ("hidden", 1024, "features between layers"),
        ("layers", 4, "blocks"),
        ("heads", 8, "of attention"),
        ("vocabulary", 1024, "tokens that there are"),
        ("tokens", 1, "a call"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--report", action="store_true", help="print the report of rank 0")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        whole = transformers.LlamaModel(config(options)).eval()
        whole.save_pretrained(folder)
        stories = spawn.Queue()
        ranks = [spawn.Process(target=work, args=(rank, folder, options, stories)) for rank in range(options.ranks)]
        for rank in ranks:
            rank.start()
        told = [stories.get(timeout=PATIENCE) for _ in ranks]
        for rank in ranks:
            rank.join()
    with torch.no_grad():
        right = whole(torch.arange(options.tokens)[None] + 3, use_cache=False).last_hidden_state.flatten()
    error = max(float((torch.tensor(story.answer) - right).abs().max()) for story in told)
    slowest = max(told)
    added = slowest.token / (slowest.parts + slowest.sums) - 1
    if options.report:
        print(told[0].report, "\n")
    print(
        f"{options.ranks} ranks, {slowest.fast} layers on the kernels, largest difference to one process: {error:.1e}"
    )
    print(f"a token: {slowest.token:.2f} ms, of which sums {slowest.sums / slowest.token:.0%} ({slowest.sums:.2f} ms)")
    print(
        f"a model of one rank's size, alone: {slowest.parts:.2f} ms; splitting adds {added:+.1%} to that and the sums"
    )


if __name__ == "__main__":
    main()
