"""Rivals that live in processes and an environment of their own (rival.py), asked one at a time to take their turn."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from apart import Apart
from peers import as_stored, sample, why_refused
from timing import settle
from torch import Tensor, nn

HERE = Path(__file__).parent
FOLDER = HERE.parent / ".venv-peers"
PINS = HERE / "rivals.txt"
_FOUR_BITS = ("onnxruntime_int4", "openvino_int4", "llama_cpp")
RIVALS = {  # by format
    "int8": ("onnxruntime", "openvino"),
    "w8f": ("openvino_fp32",),
    "int4": _FOUR_BITS,
    "int4g128": _FOUR_BITS,
    "int4wo": ("openvino_int4_fp32",),
}


def environment() -> Path:
    """The interpreter of .venv-peers, which is made here if it is not what rivals.txt asks for."""
    python, made_of = FOLDER / "bin" / "python", FOLDER / PINS.name
    if not made_of.exists() or made_of.read_bytes() != PINS.read_bytes():
        print(f"making {FOLDER}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", PINS], check=True)
        made_of.write_bytes(PINS.read_bytes())
    return python


def versions(python: Path) -> dict[str, str]:
    """Of what is pinned."""
    frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    installed = dict(line.split("==") for line in frozen.splitlines() if "==" in line)
    return {name: installed[name] for name in ("onnxruntime", "openvino", "xllamacpp")}


class Remote(Apart):
    """One rival: what peers.Candidate is for a call of this process."""

    def __init__(self, command: Sequence[str | Path], name: str, threads: int, form: str) -> None:
        super().__init__([*command, name, str(threads)], name)
        self._form = form
        self._folder = tempfile.TemporaryDirectory()

    def close(self) -> None:
        super().close()
        self._folder.cleanup()

    def layers(self, layer: nn.Linear, copies: int) -> None:
        """Hands over the layer, its weight quantized as FastLinear's is, to be built so many times."""
        self._copies = copies
        weight, scale = as_stored(layer, self._form)
        self._write(weight=weight, scale=scale, bias=layer.bias.float())
        self.ask("layers", self._folder.name, copies)

    def bind(self, x: Tensor, n: int) -> Remote:
        """Hands over the x of the next cell."""
        self._write(x=x.float(), y=torch.zeros(len(x), n))
        self.ask("answer", self._folder.name)
        return self

    def answer(self) -> Tensor:
        """Of the last of the layers."""
        return torch.from_numpy(np.load(Path(self._folder.name, "y.npy")))

    def rotation(self, hot: bool) -> Remote:
        self.cost = float(self.ask("rotate", 1 if hot else self._copies))
        return self

    def sample(self) -> float:
        """Seconds a call, once the threads of this process have gone to sleep."""
        settle()
        return float(self.ask("sample"))

    def _write(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            np.save(Path(self._folder.name, f"{name}.npy"), tensor.detach().numpy())


def willing(python: Path | None, form: str) -> dict[str, str | None]:
    """The rivals of a format, with what is to be said of each that computes something else (ONNX Runtime's sums of int8
    saturate without VNNI), and of all without an interpreter to run them."""
    names = RIVALS.get(form, ())
    if python is None:
        return dict.fromkeys(names, "--peers asks for it")
    layer, x = sample(form)

    def bound(rival: Remote) -> Remote:
        rival.layers(layer, copies=1)
        return rival.bind(x, layer.out_features)

    with remotes(python, names, form, 1) as rivals:
        return {
            rival.name: why_refused(rival.name, functools.partial(bound, rival), form, layer, x) for rival in rivals
        }


@contextlib.contextmanager
def remotes(python: Path | None, names: Iterable[str], form: str, threads: int) -> Iterator[list[Remote]]:
    """These rivals, with pools of so many threads; none without an interpreter to run them."""
    with contextlib.ExitStack() as stack:
        started = []
        for name in names if python is not None else ():
            started.append(Remote([str(python), HERE / "rival.py"], name, threads, form))
            stack.callback(started[-1].close)
        yield started
