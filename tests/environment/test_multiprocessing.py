"""Frozen models in other processes: as arguments, through queues, in DataLoader workers, in shared memory."""

import copy
import io
import os
import pickle
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing
from models import OFF
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastlinear
from fastlinear.layer import frozen, linear

X = torch.linspace(-2, 2, 9 * 64).reshape(9, 64)


def stock() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 40), nn.Tanh(), nn.Linear(40, 8)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return model


def _static(**options: Any) -> fastlinear.Int8Static:
    return fastlinear.Int8Static(fastlinear.calibrate(stock(), [X], **options))


KINDS: dict[str, Any] = {
    "fp32": dict,
    "bf16": lambda: {"dtype": torch.bfloat16},
    "Int8Dynamic": lambda: {"quantize": fastlinear.Int8Dynamic()},
    "Int8WeightOnly": lambda: {"quantize": fastlinear.Int8WeightOnly()},
    "Int4WeightOnly": lambda: {"quantize": fastlinear.Int4WeightOnly(table="nf4")},
    "Int8Static": lambda: {"quantize": _static()},
    "Int8Static, smoothed": lambda: {"quantize": _static(smooth=0.5)},
}


def frozen_models() -> dict[str, nn.Module]:
    return {name: OFF(stock(), freeze=True, **options()) for name, options in KINDS.items()}


def bits(models: dict[str, nn.Module]) -> dict[str, bytes]:
    """What each of the models answers; on one thread, since two may add in another order."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        return {name: model(X).numpy().tobytes() for name, model in models.items()}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return frozen_models()


@pytest.fixture(scope="module")
def expected(models: dict[str, nn.Module]) -> dict[str, bytes]:
    return bits(models)


@pytest.fixture(autouse=True)
def unmoved(models: dict[str, nn.Module], expected: dict[str, bytes]) -> Iterator[None]:
    """Whatever a test does with a model, it answers as before, bit for bit."""
    yield
    assert bits(models) == expected


def _serve(models: dict[str, nn.Module], inbox: Any, outbox: Any) -> None:
    outbox.put(bits(models))
    received = inbox.get(timeout=60)
    outbox.put(bits(received))
    outbox.put(received)  # and back
    inbox.get(timeout=60)  # torch's queues want the sender alive until all is received


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.exhaustive), "forkserver"])
def test_a_started_process_answers_alike(method: str, models: dict[str, nn.Module], expected: dict[str, bytes]) -> None:
    """As arguments of a process, through a queue, and back from it: every kind of pack has the bits of the parent."""
    context: Any = torch.multiprocessing.get_context(method)
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=_serve, args=(models, inbox, outbox))
    process.start()
    try:
        assert outbox.get(timeout=60) == expected
        inbox.put(models)
        assert outbox.get(timeout=60) == expected
        assert bits(outbox.get(timeout=60)) == expected
        inbox.put(None)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()


class Answers(Dataset[Tensor]):
    """Runs the models where the items are asked for."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        self.models = models

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return torch.stack([model(X).float().sum() for model in self.models.values()])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method: str, models: dict[str, nn.Module]) -> None:
    """In workers that last for two epochs, each kind of model gives the same numbers as here."""
    loader = DataLoader(Answers(models), 2, num_workers=1, persistent_workers=True, multiprocessing_context=method)
    wanted = Answers(models)[0]
    for _ in range(2):
        assert all(torch.equal(item, wanted) for batch in loader for item in batch)
    del loader


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent_moves_nothing(kind: str, models: dict[str, nn.Module], expected: dict[str, bytes]) -> None:
    """Pickled for another process again and again, shared, exported by DLPack and copied: the bits stay, and so do
    those of the copies, whose memory is their own."""
    model = models[kind]
    for _ in range(3):
        ForkingPickler.dumps(model)
    for layer in [layer for layer in model.modules() if linear.is_fast(layer)]:
        weight: Any = layer.weight
        before = weight.clone()
        exported, array = torch.utils.dlpack.from_dlpack(weight), weight.numpy()
        weight.share_memory_()  # writing to it would thaw the layer
        assert torch.equal(layer.weight, before)  # type: ignore[arg-type]
        del exported, array
        record: Any = layer._frozen
        record.panels.share_memory_()  # what compiled graphs hold
        for tensor in (record.packed.data, record.packed.scale, record.packed.zero):
            if tensor is not None:
                tensor.share_memory_().zero_()
    again = {
        "shared": copy.deepcopy(model).share_memory(),
        "copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "pickled by protocol 2": pickle.loads(pickle.dumps(model, protocol=2)),
    }
    assert set(bits(again).values()) == {expected[kind]}


def test_torch_save_keeps_its_form(models: dict[str, nn.Module], expected: dict[str, bytes]) -> None:
    """torch.save has weights as tensors, the way it always had, and reads them back."""
    file = io.BytesIO()
    torch.save(models, file)
    file.seek(0)
    assert bits(torch.load(file, weights_only=False)) == expected
    layer: Any = next(models["fp32"].children())
    function, arguments = layer._frozen.__reduce_ex__(2)
    assert function is frozen._packed_again and torch.equal(arguments[1], layer.weight)


def test_a_shared_model_follows_its_parameters() -> None:
    """share_memory() before and after freezing; what is not packed is shared, and a write to it counts."""
    for early in (True, False):
        model = stock().share_memory() if early else stock()
        fast = OFF(model)
        fastlinear.freeze(fast[0])
        fast.share_memory()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with torch.no_grad():
                    fast[4].weight.zero_()  # type: ignore[operator]
                    fast[0].bias.zero_()  # type: ignore[operator]
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        with torch.no_grad():
            wanted = stock()
            wanted[4].weight.zero_()  # type: ignore[operator]
            wanted[0].bias.zero_()  # type: ignore[operator]
            assert torch.allclose(fast(X), wanted(X), atol=1e-5)
