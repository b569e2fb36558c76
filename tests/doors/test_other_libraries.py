"""The recipes of docs/integrations.md for libraries that need no more: they answer as stock models do.

None of the libraries is in requirements-dev.txt. PyPI's torchvision, which timm imports, is of CUDA: beside torch's CPU
build it lacks its operators, of which timm needs none.
"""

from typing import Any

import pytest
import torch
from models import OFF, fast_names
from torch import Tensor, nn

import fastlinear
from fastlinear.layer.frozen import is_frozen


def library(name: str) -> Any:
    return pytest.importorskip(
        name, exc_type=(ImportError, RuntimeError), reason=f"{name} or what it needs is not installed for torch on CPUs"
    )


@torch.no_grad()
def test_timm() -> None:
    """All layers of a vision transformer are fast, and its activations absorbed."""
    for name in ("nms", "qnms"):  # which torchvision describes to torch when it is imported
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    vit = library("timm").create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    fast = OFF(vit)
    assert len(fast_names(fast)) == 9
    assert type(fast.blocks[0].mlp.act).__name__ == "Absorbed"
    torch.testing.assert_close(fast(x), vit(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("freeze", [False, True])
def test_diffusers(freeze: bool) -> None:
    """A pipeline with a fast component makes the same image."""
    diffusers = library("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = diffusers.DDPMPipeline(unet.eval(), diffusers.DDPMScheduler(num_train_timesteps=10))
    pipe.set_progress_bar_config(disable=True)

    def image() -> Tensor:
        chance = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(num_inference_steps=2, generator=chance, output_type="np").images)

    want = image()
    pipe.unet = OFF(pipe.unet, freeze=freeze)
    assert len(fast_names(pipe.unet)) == 26
    torch.testing.assert_close(image(), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_torchao() -> None:
    """A handler of quantize_ makes layers fast as convert does."""
    library("torchao")
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import quantize_
    from torchao.quantization.transform_module import register_quantize_module_handler

    class Config(AOBaseConfig):  # type: ignore[misc]
        pass

    @register_quantize_module_handler(Config)  # type: ignore[untyped-decorator]
    def fast(module: nn.Module, _: Config) -> nn.Module:
        return OFF(module, quantize=fastlinear.Int8WeightOnly(), freeze=True, inplace=True)

    model, x = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)).eval(), torch.randn(3, 32)
    want = OFF(model, quantize=fastlinear.Int8WeightOnly(), fuse=False)(x)
    quantize_(model, Config())
    assert fast_names(model) == {"0", "2"} and all(is_frozen(model[i]) for i in (0, 2))
    torch.testing.assert_close(model(x), want)
