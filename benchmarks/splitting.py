"""What tensor parallelism costs beside products and sums: stock and fast layers, in a rank whose sums cost nothing.

    python benchmarks/splitting.py [--hidden 1024] [--tokens 1]

One process plays rank 0 of two, in torch's fake process group, which leaves every sum as it was: no other process is
waited for, and two on one machine do not disturb each other. The answers mean nothing; the times are those of a rank's
own work. Beside it runs a plain model of the size of the rank's parts. What the split one takes more is torch's and
transformers' hooks, in both, and what fast layers add to that.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import DistributedConfig

import fastlinear
from fastlinear.model import agreement, convert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from tensor_parallel import config

RANKS = 2


@contextlib.contextmanager
def alone(model: object, of: str) -> Iterator[dict[str, str]]:
    """Stands for `agreed`: there is nobody to agree with."""
    yield {}


@torch.no_grad()
def lower_quartiles(models: dict[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds a call of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids, use_cache=False)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(taken)[rounds // 4] for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"hidden": 1024, "layers": 4, "heads": 8, "vocabulary": 1024, "tokens": 1, "rounds": 30}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(RANKS))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    agreement.agreed = convert.agreed = alone
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaModel(config(options)).save_pretrained(folder)
        split = DistributedConfig(tp_size=RANKS, tp_plan="auto")
        models = {
            f"{kind} {what}": model.eval()
            for kind in ("stock", "fast")
            for what, model in (
                ("split", transformers.AutoModel.from_pretrained(folder, distributed_config=split)),
                ("parts", transformers.LlamaModel(config(options, RANKS))),
            )
        }
    ids = torch.arange(options.tokens)[None] + 3
    for name in ("fast split", "fast parts"):
        fastlinear.convert(models[name], inplace=True, freeze=True)
        fastlinear.tune(models[name], {"input_ids": ids, "use_cache": False}, progress=False)
    told = lower_quartiles(models, ids, options.rounds)
    added = {kind: told[f"{kind} split"] - told[f"{kind} parts"] for kind in ("stock", "fast")}
    print(f"{options.hidden} features, {options.layers} blocks, {options.tokens} tokens, one thread, ms a call")
    for kind, more in added.items():
        print(f"{kind:<6} split {told[f'{kind} split']:7.2f}, parts {told[f'{kind} parts']:7.2f}: {more:.2f} more")
    print(
        f"fast layers add {(added['fast'] - added['stock']) / told['fast split']:+.1%} of a call to that of stock ones"
    )


if __name__ == "__main__":
    main()
