"""What README, docs and comments say is so: code runs, links and paths lead somewhere, lists are whole."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastlinear
import fastlinear._reasons as _reasons
import fastlinear._weights as _weights
from fastlinear.graph import backend

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# What samples import that requirements-dev.txt lacks: what their recipes answer is tested in tests/doors.
BEYOND = ("timm", "diffusers", "torchao")
# Where the words stand that tell why a layer was skipped, or a call went round the kernels.
FOLDERS = "fastlinear|include|csrc|tests|docs|benchmarks|examples"
REASONS = (
    "layer/attention.py", "layer/elsewhere.py", "layer/experts.py", "layer/experts_takeover.py", "layer/fitness.py",
    "layer/linear.py", "layer/mixture.py", "layer/packs.py", "layer/takeover.py", "model/selection.py",
    "spec/foreign.py", "spec/precision.py", "spec/schemes.py",
)  # fmt: skip


def samples() -> Iterator[tuple[str, str]]:
    """(page and line, code) of every ```python block."""
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield f"{page.name}:{text.count(chr(10), 0, block.start()) + 1}", block[1]


def surroundings() -> dict[str, Any]:
    """What the samples may take for granted."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    x = torch.randn(4, 768)
    example = torch.randint(64, (2, 4))
    return {
        "torch": torch, "fastlinear": fastlinear, "config": config, "x": x,
        "model": transformers.AutoModel.from_config(config).eval(), "example": example, "batches": [example],
        "lm": transformers.AutoModelForCausalLM.from_config(config).eval(), "linear": nn.Linear(768, 3072),
        "layer": fastlinear.FastLinear(768, 3072).eval(), "fast": fastlinear.convert(nn.Sequential(nn.Linear(768, 8))),
        "inputs": {"input_ids": example},
    }  # fmt: skip


def test_what_samples_take_for_granted_is_told() -> None:
    """The page on which readers start names all that samples use and do not make."""
    told = {*re.findall(r"`(\w+)`", (ROOT / "docs/start.md").read_text()), "torch", "fastlinear"}
    assert {*surroundings()} <= told


@pytest.mark.filterwarnings("ignore:exclude='lm_head' matches no linear layer")
@pytest.mark.parametrize(("where", "code"), list(samples()), ids=[where for where, _ in samples()])
def test_samples_run(where: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python sample runs as it stands, the first of the README without anything around it."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE):
        if name in BEYOND:
            pytest.importorskip(name, exc_type=(ImportError, RuntimeError), reason=f"{name} cannot be imported here")
    if "fastlinear" not in torch._dynamo.list_backends(exclude_tags=()):  # an installation brings the entry point
        torch._dynamo.register_backend(backend, "fastlinear")
    first = where == next(samples_of("README.md"))
    exec(compile(code, where, "exec"), {} if first else surroundings())


def samples_of(page: str) -> Iterator[str]:
    return (where for where, _ in samples() if where.startswith(f"{page}:"))


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """A relative link names a file of the tree, and a heading that this has."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in (link for link in links if "://" not in link):
        path, _, wanted = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if wanted:
            assert wanted in map(anchor, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), link


def named_paths() -> Iterator[tuple[str, str]]:
    """(where, path) of every file of a room that pages, comments or docstrings name from the root."""
    sources = [path for folder in ("fastlinear", "include", "csrc") for path in sorted((ROOT / folder).rglob("*"))]
    readable = [path for path in sources if path.suffix in {".py", ".pyx", ".pxd", ".pxi", ".hpp"}]
    for path in (*PAGES, *readable):
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for name in re.findall(rf"(?<![\w/.<>])((?:{FOLDERS})/[\w/]+\.\w+)", text):
            yield path.relative_to(ROOT).as_posix(), name


def test_named_files_exist() -> None:
    """No page and no comment sends its reader to a file that moved."""
    named = list(named_paths())
    assert len(named) > 20
    assert [pair for pair in named if not any((root / pair[1]).exists() for root in (ROOT, ROOT / "include"))] == []


def reasons() -> set[str]:
    """The texts that functions which tell why can return, with "..." for what is put in."""
    trees = [ast.parse((ROOT / "fastlinear" / name).read_text()) for name in REASONS]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    telling = [f for f in functions if re.match(r"_?why|reason$|odd_|_obstacle|_theirs|foreign$|found$", f.name)]
    nodes = [node for function in telling for node in ast.walk(function)]
    values = [node.value for node in nodes if isinstance(node, (ast.Return, ast.Assign)) and node.value is not None]
    return {text for value in values for text in texts(value)}


def texts(value: ast.expr) -> Iterator[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in value.values)
    elif isinstance(value, ast.IfExp):
        yield from itertools.chain(texts(value.body), texts(value.orelse))
    elif isinstance(value, ast.BoolOp):
        yield from itertools.chain.from_iterable(map(texts, value.values))


def test_every_reason_is_explained() -> None:
    """docs/troubleshooting.md has a row for each reason that report and log can give."""
    page = " ".join((ROOT / "docs/troubleshooting.md").read_text().split())
    known = {text for text in reasons() if " " in text or text.isupper() or "." in text or text == "training"}
    assert len(known) > 20
    assert sorted(text for text in known if text not in page) == []


def test_the_reference_is_whole() -> None:
    """docs/api.md has every public name, and the site's contents every page."""
    reference = (ROOT / "docs/api.md").read_text()
    assert [name for name in fastlinear.__all__ if not re.search(rf":: {name}$", reference, re.MULTILINE)] == []
    listed = set(re.findall(r"^([\w-]+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE))
    assert listed == {page.stem for page in ROOT.glob("docs/*.md")} - {"index"}


def test_every_exit_is_explained() -> None:
    """docs/architecture.md has a row for each reason for which the engine leaves a call to its module."""
    exits = {name for name, value in vars(_reasons).items() if name.isupper() and value == name.lower()}
    assert len(exits) >= 7
    rows = re.findall(r"^\| `([A-Z]+)` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert set(rows) == exits


def panels_of(w: torch.Tensor, nr: int, kr: int) -> torch.Tensor:
    """[panels, groups, nr, kr] of a weight [n, k], filled up with zeros."""
    n, k = w.shape
    padded = nn.functional.pad(w, (0, -k % kr, 0, -n % nr))
    return padded.view(-1, nr, padded.shape[1] // kr, kr).permute(0, 2, 1, 3)


def test_worked_bytes() -> None:
    """The sum that docs/architecture.md does finds every element of a weight in the bytes of its pack."""
    text = (ROOT / "docs/architecture.md").read_text()
    (layout,) = re.findall(r"in the layout `(\w+/\w+)`", text)
    n, k = map(int, re.search(r"a weight of (\d+) x (\d+)", text).groups())
    (formula,) = re.findall(r"^ +byte\(n, k\) = (.*)$", text, re.MULTILINE)
    examples = re.findall(r"W\[(\d+), (\d+)\] (?:lies|is) at byte (\d+)", " ".join(text.split()))
    assert len(examples) >= 2

    weight = torch.arange(n * k, dtype=torch.int16).view(n, k)  # bit patterns, all different
    packed = _weights.Packed(weight.view(torch.bfloat16), layout)
    values = packed.data.numpy().view("int16")
    at = {(i, j): eval(formula, {"n": i, "k": j}) for i in range(n) for j in range(k)}
    assert all(values[place // 2] == weight[i, j] for (i, j), place in at.items())
    assert packed.nbytes == int(re.search(r"(\d+) bytes in all", text)[1])
    assert all(at[int(i), int(j)] == int(place) for i, j, place in examples)
    padding = set(range(packed.nbytes // 2)) - {place // 2 for place in at.values()}
    assert padding and all(values[i] == 0 for i in padding)
