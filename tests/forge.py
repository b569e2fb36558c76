"""Files that `fastlinear.save` would not write: a good one with something else in its header or metadata."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlinear.file import manifest
from fastlinear.file.safetensors import LENGTH

Edit = Callable[[dict[str, Any]], object]


class Small(nn.Module):
    """All that a file can hold, in few bytes: a fused layer, one tied to an embedding, plain tensors, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.fc, self.act = nn.Linear(8, 16), nn.GELU()
        self.norm, self.back = nn.LayerNorm(16), nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("positions", torch.arange(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.back(self.norm(self.act(self.fc(self.embed(ids + self.positions * 0))))))


def on_meta(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make().eval()


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a file, its metadata parsed too, and the bytes of its tensors."""
    raw = path.read_bytes()
    begin = LENGTH + int.from_bytes(raw[:LENGTH], "little")
    header = json.loads(raw[LENGTH:begin])
    header["__metadata__"][manifest.KEY] = json.loads(header["__metadata__"][manifest.KEY])
    return header, raw[begin:]


def join(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    """Writes a file of such a header, or of the text of one; pages stay pages, if there is room."""
    if isinstance(header, dict):
        metadata = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in header["__metadata__"].items()
        }
        header = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":"))
    text = header.encode()
    text += b" " * (-(LENGTH + len(text)) % 4096)
    path.write_bytes(len(text).to_bytes(LENGTH, "little") + text + data)


def forge(path: Path, edit: Edit) -> None:
    """Edits the header of a file, metadata included."""
    header, data = split(path)
    edit(header)
    join(path, header, data)


def forge_metadata(path: Path, edit: Edit) -> None:
    """Edits what the file says of its model."""
    forge(path, lambda header: edit(header["__metadata__"][manifest.KEY]))
