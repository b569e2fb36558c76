"""Ray Data: actors that embed a text file, each with the same frozen file mapped, beside actors with stock models.

    python examples/ray_embed.py [--actors 2] [--tokens 32] [--repeat 8] [file of lines]

The model is converted, tuned, frozen and saved once. Each actor maps that file: its packed weights are in memory once
for all actors of a machine, and its plans go with it, so that no actor measures anything. Ray gives an actor as many
threads as CPUs (`num_cpus`), so the plans have to be for that number. Nothing leaves the machine.

USS is the memory that a process has to itself: what one more actor costs. It is told beyond what the process had before
it made its model.
"""

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from minilm import embed
from serve_processes import architecture, converted, memory, start_quietly, stock, tokenizer

import fastlinear
from fastlinear._extras import need

try:
    need("ray", "ray_embed.py")
except ImportError as error:
    raise SystemExit(str(error)) from None
import ray

BATCH = 4  # sentences a call
TEXT = Path(__file__).with_name("sentences.txt")


class Embedder:
    """An actor: makes its model once, and answers batches of lines."""

    def __init__(self, file: str, tokens: int) -> None:
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.encode, empty = tokenizer(tokens), architecture()  # imports what either way will import
        self.encode(["warm"])
        self.before = memory().uss
        self.model = fastlinear.load(file, empty) if file else stock("")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        rows = embed(self.model, self.encode([str(line) for line in batch["item"]]))
        seconds, count = time.perf_counter() - start, len(rows)
        return {
            "item": batch["item"],
            "embedding": rows.numpy(),
            "seconds": [seconds / count] * count,
            "actor": [os.getpid()] * count,
            "mib": [memory().uss - self.before] * count,
            "measured": [_measured(self.model)] * count,
        }


def _measured(model: torch.nn.Module) -> int:
    """Plans that this process had to measure."""
    layers = [module for module in model.modules() if isinstance(module, fastlinear.FastLinear)]
    return sum(plan.source == "tuned" for layer in layers for plan in layer.plans)


def run(file: str, lines: list[str], options: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """Rows of all lines, and lines a second of all actors together, once each has its model."""
    data = ray.data.from_items(lines, override_num_blocks=len(lines) // BATCH).map_batches(
        Embedder,
        fn_constructor_args=(file, options.tokens),
        batch_size=BATCH,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
    )
    rows = data.take_all()
    busy: dict[int, float] = {}
    for row in rows:
        busy[row["actor"]] = busy.get(row["actor"], 0.0) + row["seconds"]
    return rows, len(rows) / max(busy.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=TEXT, help=f"of lines (default {TEXT.name})")
    parser.add_argument("--actors", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a line, padded or cut (default 32)")
    parser.add_argument("--repeat", type=int, default=8, help="times that the file is embedded (default 8)")
    options = parser.parse_args()
    start_quietly()
    lines = [line for line in options.file.read_text().splitlines() if line.strip()] * options.repeat
    each = BATCH * options.actors
    lines = lines[: len(lines) // each * each]  # whole batches, for whose size the plans are
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    here = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        file = str(Path(folder, "minilm.safetensors"))
        model = converted(file)
        weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
        fastlinear.freeze(model)  # before the plans are made: a frozen layer has no nn.Linear to fall back on
        fastlinear.tune(model, tokenizer(options.tokens)(lines[:BATCH]), progress=False)
        fastlinear.save(model, file)
        ray.init(
            num_cpus=options.actors,
            include_dashboard=False,
            _temp_dir=folder,
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}},
        )
        try:
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            ray.data.DataContext.get_current().enable_progress_bars = False
            told = {name: run(path, lines, options) for name, path in (("stock", ""), ("frozen", file))}
        finally:
            ray.shutdown()
    for name, (rows, rate) in told.items():
        actors = {row["actor"]: row["mib"] for row in rows}
        own = ", ".join(f"{mib:.1f} MiB ({mib / weights:.0%} of the weights)" for mib in actors.values())
        print(f"{name:<7} {rate:7.1f} lines/s; {len(actors)} actors of their own: {own}")
    measured = sum(row["measured"] for row in told["frozen"][0])
    print(f"plans that an actor had to measure: {measured}")
    pair = [{str(row["item"]): torch.tensor(row["embedding"]) for row in rows} for rows, _ in told.values()]
    error = max(float((one - pair[1][line]).abs().max()) for line, one in pair[0].items())
    print(f"Largest difference between two numbers of the embeddings, which are unit vectors: {error:.1e}")


if __name__ == "__main__":
    main()
