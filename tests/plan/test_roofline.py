"""The roofline: what was reached is the roof, nothing is believed on a busy machine, and products stand below it."""

import math

import pytest

from fastlinear.plan import roofline
from fastlinear.plan.candidates import Chosen
from fastlinear.spec.formats import DTYPES, PRODUCTS


class Waiting:
    """A `waits.Waits` of threads that wait all the time, or never."""

    share = 0.0

    def __init__(self, *_: object) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1e3 * self.share * self.calls

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory, and nothing known from before."""
    for name, value in {"_MANY": 8, "BEYOND": 1 << 14, "_CACHED": 1 << 12, "_LEAST_BYTES": 1 << 16}.items():
        monkeypatch.setattr(roofline, name, value)
    monkeypatch.setattr(roofline, "_known", {})
    monkeypatch.setattr(roofline, "Waits", Waiting)


@pytest.mark.parametrize("packed", [*DTYPES, *PRODUCTS])
def test_every_format_has_a_roof(packed: str) -> None:
    """Its numbers are positive, it is measured once, and formats that are only widened are under that of fp32."""
    x = packed if packed in DTYPES else "fp32"
    roof = roofline.measure(x, packed, 1)
    assert (
        roof is not None and min(roof.operations, roof.cached, roof.shared, roof.memory) > 0 and roof.packed == packed
    )
    assert roofline.measure(x, packed, 1) is roof
    assert roofline.measure("fp32", "w8f", 1) == roofline.measure("fp32", "fp32", 1)


def test_a_busy_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where threads waited for others nothing is known, and the next call asks again."""
    monkeypatch.setattr(Waiting, "share", 1.0)
    assert roofline.measure("fp32", "fp32", 1) is None
    monkeypatch.setattr(Waiting, "share", 0.0)
    assert roofline.measure("fp32", "fp32", 1) is not None


def test_products_stand_below_it() -> None:
    """Arithmetic bounds many rows and bandwidth few; a call as fast as the roof has a share of 1."""
    roof = roofline.Roofline("fp32", 1, operations=1e11, cached=5e10, shared=2e10, memory=1e10)
    assert roof.seconds(1000, 100, 100, 4e4) == pytest.approx(2e7 / 1e11)
    assert roof.seconds(1, 1000, 1000, 4e6) == pytest.approx((4e6 + 8e3) / 1e10)
    assert roof.seconds(1, 1000, 1000, 4e6, 4096) == pytest.approx((4e6 + 8e3) / 5e10)
    plan = Chosen(1000, 1, "fp32", "fp32/avx512/6x64", 1, 1, "tuned", measured=(1000, 100))
    least = math.sqrt(roof.seconds(1000, 100, 100, 4e4) * roof.seconds(1000, 100, 100, 4e4, 4e4))
    spot = roof.spot(plan, 100, 1e3 * least, 4e4)
    assert spot.share == pytest.approx(1) and spot.operations == pytest.approx(2e7 / least)
    assert spot.intensity == pytest.approx(2e7 / (4e4 + 4 * 1000 * 200))
