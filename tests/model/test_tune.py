"""tune: one run of the model that leaves a plan with every fast layer."""

import sys
import types
from typing import Any

import pytest
import torch
from models import OFF, inputs, mlp
from torch import Tensor, nn

import fastlinear


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc(x) * scale


@pytest.mark.parametrize("example", [(inputs(), torch.ones(1)), {"x": inputs(), "scale": torch.ones(1)}])
def test_tune_runs_every_kind_of_example(example: Any) -> None:
    """A tuple is arguments, a mapping keyword arguments; afterwards the layer has a plan for that batch size."""
    fast = fastlinear.convert(Keywords().eval())
    assert fastlinear.tune(fast, example, progress=False) is fast
    assert [chosen.bucket for chosen in fast.fc.plans] == [5]
    assert not fast.fc._forward_hooks


def test_tune_now() -> None:
    """tune="now" leaves every layer with a plan for the batch size of the example, before any call."""
    fast = fastlinear.convert(mlp(8, 8, 8).eval(), tune="now", example_inputs=torch.randn(3, 8))
    assert [[chosen.bucket for chosen in fast[i].plans] for i in (0, 2)] == [[3], [3]]


def test_tune_warns_where_it_is_in_vain() -> None:
    """A model without fast layers, or in training mode, warns instead of silently tuning nothing."""
    with pytest.warns(UserWarning, match="nothing to tune: Linear has no fast layer"):
        fastlinear.tune(nn.Linear(8, 8), inputs())
    with pytest.warns(UserWarning, match="Sequential is in training mode"):
        fastlinear.tune(fastlinear.convert(mlp(8, 8).train()), inputs())
    with pytest.raises(TypeError, match="the example must be"):
        fastlinear.tune(OFF(mlp(8, 8)), [inputs()])


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar counts each layer once, however often it runs; without tqdm it is refused only when asked for."""
    steps, totals = [], []

    class Bar:
        def __init__(self, total: int, **_: Any) -> None:
            totals.append(total)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def update(self) -> None:
            steps.append(1)

    layer = nn.Linear(8, 8)
    fast = OFF(nn.Sequential(layer, layer, nn.Linear(8, 8)).eval())
    fake = types.ModuleType("tqdm")
    fake.tqdm = Bar  # type: ignore[attr-defined]
    fake.__spec__ = type(sys.__spec__)("tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm", fake)
    fastlinear.tune(fast, inputs(), progress=True)
    assert totals == [2] and len(steps) == 2
    fastlinear.tune(fast, inputs(), progress=False)
    assert totals == [2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fastlinear.tune(fast, inputs())
    with pytest.raises(ImportError, match="needs tqdm, which is not installed: pip install"):
        fastlinear.tune(fast, inputs(), progress=True)


def test_tuning_leaves_the_random_numbers_alone() -> None:
    """A first call that measures draws nothing from torch's generator, and works under another default dtype."""
    layer, x = fastlinear.FastLinear(29, 43).eval().requires_grad_(False), torch.ones(3, 29)
    before = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    (chosen,) = layer.plans
    assert "tuned" in chosen.source
    assert any(name.startswith("fp32/") for name, _ in chosen.table)
