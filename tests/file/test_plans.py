"""Plans that ship with an application: measured on several machines, kept in one file, believed where they may run."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import mlp

import fastlinear
from fastlinear.plan import decide, measuring


@pytest.fixture
def fast() -> Iterator[torch.nn.Module]:
    """A model whose layers were measured."""
    decide.cache().clear()
    model = fastlinear.convert(mlp(24, 40, 16).eval())
    with measuring.process.thorough(), torch.no_grad():
        model(torch.randn(5, 24))
    yield model
    decide.cache().clear()


def test_plans_come_back(fast: torch.nn.Module, tmp_path: Path) -> None:
    """What was saved is found in another process, for equal layers, and is not measured again."""
    path = tmp_path / "plans.json"
    assert fastlinear.save_plans(fast, path) == 2
    chosen = [layer.plans[0] for layer in (fast[0], fast[2])]
    decide.cache().clear()
    assert fastlinear.load_plans(path) == 2
    again = fastlinear.convert(mlp(24, 40, 16).eval())
    with torch.no_grad():
        again(torch.randn(5, 24))
    found = [layer.plans[0] for layer in (again[0], again[2])]
    assert [plan.source for plan in found] == ["cache", "cache"]
    assert [(p.name, p.plan_threads, p.table) for p in found] == [(p.name, p.plan_threads, p.table) for p in chosen]


def test_one_file_holds_several_machines(
    fast: torch.nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another machine's plans stay when this one adds its own, and are not taken here; the log tells what differs."""
    path = tmp_path / "plans.json"
    fastlinear.save_plans(fast, path)
    said = json.loads(path.read_text())
    said["machines"][0]["machine"]["cpu"] = "another"
    path.write_text(json.dumps(said))
    with caplog.at_level(logging.INFO, "fastlinear"):
        assert fastlinear.load_plans(path) == 0
    assert "plans of 1 machines, none like this one: the nearest differs in cpu" in caplog.text
    assert fastlinear.save_plans(fast, path) == 2
    assert json.loads(path.read_text())["machines"][0]["machine"]["cpu"] == "another"
    assert fastlinear.load_plans(path) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["plans.json"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no file of plans"),
        (b"\xff", "no file of plans"),
        (b"[]", "no file of plans"),
        (b'{"format": "fastlinear plans", "version": 2}', "version 2, not 1"),
        (b'{"format": "fastlinear plans", "version": 1, "machines": [1]}', "another form"),
    ],
)
def test_other_files_are_refused(fast: torch.nn.Module, content: bytes, told: str, tmp_path: Path) -> None:
    """In one sentence that names the file, when loaded and before it is written over."""
    path = tmp_path / "plans.json"
    path.write_bytes(content)
    for act in (lambda: fastlinear.load_plans(path), lambda: fastlinear.save_plans(fast, path)):
        with pytest.raises(fastlinear.FormatError, match=told) as raised:
            act()
        assert str(path) in str(raised.value)
    assert path.read_bytes() == content


def test_poisoned_plans_are_not_taken(fast: torch.nn.Module, tmp_path: Path) -> None:
    """Entry by entry, as in the tuning cache."""
    path = tmp_path / "plans.json"
    fastlinear.save_plans(fast, path)
    said = json.loads(path.read_text())
    next(iter(said["machines"][0]["entries"].values()))["name"] = "../../etc/passwd"
    path.write_text(json.dumps(said))
    decide.cache().clear()
    assert fastlinear.load_plans(path) == 1


def test_cleared_and_tuned_again(fast: torch.nn.Module) -> None:
    """clear_cache forgets; tune(again=True) measures anew what layers have plans for, and once for equal layers."""
    fastlinear.clear_cache()
    assert len(decide.cache()) == 0 and fast[0].plans
    fastlinear.tune(fast, torch.randn(5, 24))
    assert len(decide.cache()) == 0
    before = fast[0].plans[0].table
    fastlinear.tune(fast, torch.randn(5, 24), again=True)
    assert {plan.source for i in (0, 2) for plan in fast[i].plans} == {"tuned"}
    assert fast[0].plans[0].table != before
