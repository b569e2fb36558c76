"""`python -m fastlinear inspect FILE`: what a frozen file holds, from its header alone."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import Small, forge_metadata
from models import OFF, Model, mlp
from torch import nn

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear import __main__ as cli
from fastlinear.layer import linear
from fastlinear.layer.frozen import Frozen
from fastlinear.plan import table

FP32 = _tensors.FORMATS[torch.float32]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def printed(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["inspect", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_it_tells(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A layer's shape, formats, layout, activation and size; the other tensors, the ties, the version."""
    model = nn.ModuleDict({"body": mlp(8, 16, 16, 16), "wide": nn.Linear(8, 300), "small": Small()}).eval()
    fastlinear.save(OFF(model, dtype=torch.bfloat16, include=["body.0", "wide", "small"]), path)
    text = printed(path, capsys)
    layout = table.layout("bf16")
    mib = _weights.packed_nbytes(layout, 300, 8) / 2**20
    assert re.search(rf"^wide +1 +8x300 fp32 as bf16 {layout} +{mib:.2f} mapped$", text, re.MULTILINE)
    assert re.search(rf"^body\.0 +1 +8x16 +fp32 as bf16 {layout} +relu +0\.00 mapped$", text, re.MULTILINE)
    assert re.search(r"^small\.fc +1 +8x16 .* gelu ", text, re.MULTILINE)
    assert re.search(r"^fast layers: 5, of which this CPU maps 5 and repacks 0$", text, re.MULTILINE)
    assert re.search(r"^other tensors: 13 in 0\.0 MiB \(1 int64, 11 float32, 1 bool\)$", text, re.MULTILINE)
    assert "tied: small.head.weight is small.embed.weight" in text
    assert f"written by fastlinear {fastlinear.__version__}" in text and "plans:" not in text


def test_layers_alike_share_a_row(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the report: repeated blocks are one row with a number."""
    fastlinear.save(OFF(Model(12).eval()), path)
    rows = printed(path, capsys).splitlines()
    assert [row.split()[:2] for row in rows[2:5]] == [["layers.*.fc1", "12"], ["layers.*.fc2", "12"], ["head", "1"]]


def test_what_will_be_repacked(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A layout that this machine does not run is told, as load will treat it."""
    other = next(
        row["layout"] for row in _kernels.kernels() if row["format"] == FP32 and row["layout"] != table.layout(FP32)
    )
    model: Any = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 5)).eval()
    linear.adopt(model[0], over=Frozen(_weights.Packed(model[0].weight.detach(), other), torch.float32))
    linear.adopt(model[1])
    fastlinear.save(model, path)
    text = printed(path, capsys)
    assert re.search(rf"^0 .* {other} .* repacked$", text, re.MULTILINE)
    assert re.search(r"^1 .* mapped$", text, re.MULTILINE) and "maps 1 and repacks 1" in text


def test_whose_plans_they_are(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The machine that tuned them, and whether they count here."""
    model = fastlinear.convert(mlp(8, 16).eval())
    with torch.inference_mode():
        model(torch.randn(3, 8))
    key, chosen = next(iter(model[0]._plans.items()))
    model[0]._plans[key] = chosen._replace(name=_kernels.kernels()[0]["name"])  # torch's own would stay behind
    fastlinear.save(model, path)
    text = printed(path, capsys)
    assert f"plans: 1, tuned with cpu {_kernels.cpu_info()['model']}" in text and "as here" in text
    forge_metadata(path, lambda said: said["machine"].update(cpu="Z80"))
    text = printed(path, capsys)
    assert "cpu Z80" in text and "not as here: they go unused" in text


def test_the_tensors_go_unread(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints the same for a file whose tensors are a hole, and maps nothing."""
    fastlinear.save(OFF(Small().eval()), path)
    text, size = printed(path, capsys), path.stat().st_size
    os.truncate(path, 4096)
    os.truncate(path, size)
    monkeypatch.setattr("mmap.mmap", None)
    assert printed(path, capsys) == text


def test_a_file_cannot_steer_the_terminal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters that names or versions hold are printed as their escapes."""
    fastlinear.save(OFF(nn.Sequential(nn.Linear(8, 4)).eval()), path)

    def poison(said: dict[str, Any]) -> None:
        said["layers"][0].update(name="\x1b[2J", bias=None)
        said.update(library="\x1b]0;title\x07", ties={"a\nb": "0.bias"}, machine={"cpu": "\x9b31m"}, plans={"k": None})

    forge_metadata(path, poison)
    text = printed(path, capsys)
    assert re.fullmatch(r"[ -~\n]*", text) and r"'\x1b[2J'" in text


def test_what_cannot_be_inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, no traceback, exit code 2."""
    assert "No such file" in refusal(path, capsys)
    path.write_bytes(b"{}")
    assert "cannot be loaded: it ends after 2 bytes" in refusal(path, capsys)
    assert "Is a directory" in refusal(path.parent, capsys)
    fastlinear.save(OFF(mlp(8, 4).eval()), path)
    forge_metadata(path, lambda said: said.update(schema=9))
    assert "schema 9" in refusal(path, capsys)
