"""The command line does what it says, and tells in one sentence what it cannot do."""

import itertools
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from library import ROOT
from torch import Tensor

import fastlinear
import fastlinear._kernels as _kernels
from fastlinear.cli import bench, check, info, limits
from fastlinear.cli import commands as cli
from fastlinear.plan import roofline

MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU()).eval(), torch.zeros(3, 24)

def no_model():
    return torch.zeros(3), None

def broken():
    raise OSError("no weights here")

def misfit():
    return make()[0], torch.zeros(3, 25)

def list_for_example():
    return make()[0], [1]

def no_layers():
    return nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)
"""


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a user works in, with a module of theirs."""
    (tmp_path / "users_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "users_model", raising=False)
    return tmp_path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed for arguments that cannot be served; exit code 2, whoever found it."""
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_module_and_script_are_the_same_command() -> None:
    """`python -m fastlinear` runs main(), and pyproject.toml points the script at it; `info | head -1` has no
    traceback."""
    info = f"{sys.executable} -m fastlinear info"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {info} | head -1"], capture_output=True, text=True)
    assert done.stdout.startswith("fastlinear:") and done.stderr == "" and done.returncode == 0
    project = ROOT / "pyproject.toml"
    assert 'fastlinear = "fastlinear.cli.commands:main"' in project.read_text()


def test_info_is_a_block_for_an_issue(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, CPU, every kernel with what runs, the cache and the overrides in force."""
    monkeypatch.setenv("FASTLINEAR_VERBOSE", "0")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and fastlinear.cpu_info()["model"] in text
    assert re.search(r"tuning cache: .*\.json, \d+ entries", text) and "FASTLINEAR_VERBOSE=0" in text
    for row in fastlinear.kernels():
        family, _, tile = row["name"].rpartition("/")
        assert re.search(rf"^{family}/ .*\b{tile} .* {'yes' if row['runnable'] else 'no'}$", text, re.MULTILINE)
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__ and facts["overrides"]["FASTLINEAR_VERBOSE"] == "0"
    assert facts["isas"] == {key: fastlinear.cpu_info()[of] for key, of in (("used", "isas"), ("refused", "refused"))}
    assert [row["name"] for row in facts["kernels"]] == [row["name"] for row in fastlinear.kernels()]


@pytest.mark.parametrize("version", [1, 2])
def test_quotas_of_a_container(version: int, tmp_path: Path) -> None:
    """The least quota of the group and of those above it counts, in either version of cgroups; none is none."""
    said = "5:memory:/a/b\n4:cpu,cpuacct:/a/b\n" if version == 1 else "0::/a/b\n"
    cpu, memory = (tmp_path / "sys/fs/cgroup" / ("cpu,cpuacct", "memory")[i] if version == 1
                   else tmp_path / "sys/fs/cgroup" for i in range(2))  # fmt: skip
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(said)
    assert limits.cpu_quota(tmp_path) is limits.memory_limit(tmp_path) is None
    for group, quota, limit in (("a/b", 300000, 2**63 - 4096), ("a", 150000, 2**31), (".", -1, None)):
        for mount in (cpu, memory):
            (mount / group).mkdir(parents=True, exist_ok=True)
        if version == 1:
            (cpu / group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (cpu / group / "cpu.cfs_period_us").write_text("100000\n")
            (memory / group / "memory.limit_in_bytes").write_text(f"{limit or 2**63 - 4096}\n")
        else:
            (cpu / group / "cpu.max").write_text(f"{quota if quota > 0 else 'max'} 100000\n")
            (memory / group / "memory.max").write_text(f"{limit or 'max'}\n")
    assert limits.cpu_quota(tmp_path) == 1.5 and limits.memory_limit(tmp_path) == 2**31


def test_too_many_threads_are_told() -> None:
    """A quota or an affinity below the number of threads is said with what to do; enough of both is not."""
    threads = {"used": 8, "affinity": 8, "quota": 2.5}
    assert "torch.set_num_threads(2)" in " ".join(info.warnings(threads))
    assert "4 CPUs" in " ".join(info.warnings({**threads, "affinity": 4, "quota": None}))
    assert info.warnings({**threads, "quota": 8.0}) == info.warnings({**threads, "quota": None}) == []


@pytest.mark.parametrize(
    "activation", ["leaky_relu", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("none", "relu"))]
)
def test_bench_prints_a_row_for_each_shape(activation: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both times, their ratio and what runs; torch's number of threads is left as it was."""
    assert cli.main(["bench", "--shapes", "1x16x24,3x8x8", "--threads", "2", "--activation", activation]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.removesuffix(" !").split() for line in lines if re.match(r"\d+x\d+x\d+ ", line)]
    assert [row[0] for row in rows] == ["1x16x24", "3x8x8"]
    for _, threads, before, after, ratio, *_, name in rows:
        assert threads == "2"
        assert float(ratio.rstrip("x")) == pytest.approx(float(before) / float(after), rel=0.1)
        assert "/" in name
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("isa", "form"),
    [
        ("scalar", "float32"),
        pytest.param("avx2", "float32", marks=pytest.mark.exhaustive),
        ("amx", "bfloat16"),
    ],
)
def test_bench_of_one_isa(isa: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only its kernels run; the figures are in the JSON, shares of the roofline too, and with tiles of what is
    calculated."""
    if isa not in fastlinear.cpu_info()["isas"]:
        pytest.skip(f"no {isa}")
    file = tmp_path / "figures.json"
    arguments = ["--shapes", "5x64x70,33x8x8", "--threads", "1,2", "--dtype", form, "--json", str(file)]
    assert cli.main(["bench", "--isa", isa, *arguments]) == 0
    document = json.loads(file.read_text())
    figures, about = document["results"], document["about"]
    assert about["cpu"] == fastlinear.cpu_info() and about["versions"].keys() == {"fastlinear", "python", "torch"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert [(f["m"], f["threads"]) for f in figures] == [(5, 1), (33, 1), (5, 2), (33, 2)]
    for figure in figures:
        assert figure["runs_on"].split("/")[1] == isa
        assert figure["gflops"] == pytest.approx(2e-3 * figure["m"] * figure["k"] * figure["n"] / figure["us"])
        assert all(figure[name] > 0 for name in ("roofline", "peak_gflops", "peak_read_gbs", "read_gbs"))
        assert ("calculated" in figure) == (isa == "amx")
    assert ("calculated" in capsys.readouterr().out) == (isa == "amx")


def test_bench_like_a_model(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--like measures the shapes of a run, --against adds a column each, --cold says so, --plot draws, in JSON too."""
    files = ["--json", "figures.json", "--plot", "figures.png"]
    assert cli.main(["bench", "--like", "users_model:make", "--cold", "--against", "torch,mkl,onednn", *files]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^3x24x40 ", text, re.MULTILINE) and "weights from memory" in text and " onednn " in text
    (result,) = json.loads(Path("figures.json").read_text())["results"]
    assert set(result["against_us"]) == {"torch", "mkl", "onednn"} and result["against_us"]["torch"] > 0
    assert Path("figures.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("cold", [False, True])
def test_the_read_rate_is_of_where_the_weights_lie(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that come from memory are held against what memory gives, as benchmarks/bench.py does; each time, where
    others disturb and it is measured again."""
    read: list[tuple[int, bool]] = []

    def read_rate(memory: torch.Tensor, threads: int, cold: bool, ahead: object) -> float:
        read.append((memory.nbytes, cold))
        return 1e10

    monkeypatch.setattr(roofline, "read_rate", read_rate)
    assert cli.main(["bench", "--shapes", "1x64x64", *["--cold"] * cold]) == 0
    ((nbytes, from_memory),) = set(read)
    assert from_memory is cold and (nbytes >= roofline.BEYOND) is cold


@pytest.mark.parametrize("seconds", [0.0, 100.0])
def test_bench_marks_what_a_busy_machine_gave(
    seconds: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose threads waited for a CPU stands apart, and the last line says why."""

    class Waits(bench.Waits):
        looks = 0

        def __call__(self) -> float:
            Waits.looks += 1
            return seconds * Waits.looks

    monkeypatch.setattr(bench, "Waits", Waits)
    assert cli.main(["bench", "--shapes", "1x8x8"]) == 0
    text = capsys.readouterr().out
    assert (re.search(r"^1x8x8 .* !$", text, re.MULTILINE) is not None) == (seconds > 0)
    assert ("others had the CPUs" in text) == (seconds > 0)


def test_bench_counts_only_rounds_that_nobody_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rounds of five take ten times as long, as threads wait for a CPU: the fifth is what a call takes."""

    class Machine:
        now = waited = 0.0
        looks, busy = 0, False

        def call(self, x: object) -> None:
            self.now += 1e-2 if self.busy else 1e-3
            self.waited += 9e-3 if self.busy else 0.0

        def waiting(self) -> float:  # asked before and after a round
            self.busy = self.looks % 10 != 0
            self.looks += 1
            return self.waited

    machine = Machine()
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: machine.now))
    times, waited = bench._alternate([machine.call], torch.zeros(1, device="cpu"), machine.waiting)
    assert times == [pytest.approx(1000)] and waited == 0


@pytest.mark.parametrize(("disturbed", "tries"), [(0, 1), (2, 3), (9, bench._TRIES)])
def test_bench_measures_its_ceilings_again_while_others_disturb(disturbed: int, tries: int) -> None:
    """And tells, as of times, where they do not stop."""
    waited, tried = 0.0, 0

    def measure() -> Any:
        nonlocal waited, tried
        tried += 1
        waited += 1e3 if tried <= disturbed else 0.0
        return tried

    found, share = bench._undisturbed(measure, lambda: waited)
    assert tried == tries and (share > bench._STOLEN) is (disturbed >= tries)
    assert disturbed >= tries or found == tries


def test_an_interrupted_bench_keeps_what_is_done(
    user_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends it with the rows so far, in the file too, and no traceback."""
    measure, done = bench._measure, []

    def once(*arguments: object) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return measure(*arguments)

    monkeypatch.setattr(bench, "_measure", once)
    assert cli.main(["bench", "--shapes", "1x8x8,2x8x8", "--json", "figures.json"]) == 130
    assert "interrupted: 1 of 2 are done" in capsys.readouterr().out
    assert len(json.loads(Path("figures.json").read_text())["results"]) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bench_in_16_bits(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--dtype is that of weights and inputs, and the head of the table says so; what runs reads such weights."""
    assert cli.main(["bench", "--shapes", "3x8x8", "--dtype", dtype]) == 0
    text = capsys.readouterr().out
    found = re.search(r"^3x8x8 .* (\S+/\S+)", text, re.MULTILINE)
    weight = {"bfloat16": "bf16/", "float16": "fp16/"}[dtype]
    readers = {k["name"] for k in _kernels.kernels() if any(layout.startswith(weight) for layout in k["reads"])}
    assert f" {dtype}, activation relu" in text
    assert found and (found[1] in readers or found[1].startswith("torch/"))


@pytest.mark.parametrize("scheme", ["int8", "w8f"])
def test_bench_and_tune_in_int8(scheme: str, user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--quantize packs the weights in 8 bits, on which kernels of theirs run."""
    assert cli.main(["bench", "--shapes", "3x8x8", "--dtype", "bfloat16", "--quantize", scheme]) == 0
    text = capsys.readouterr().out
    assert f" bfloat16 as {scheme}, " in text and re.search(rf"^3x8x8 .* ({scheme}|fp32)/", text, re.MULTILINE)
    assert cli.main(["tune", "users_model:make", "--quantize", scheme]) == 0
    assert re.search(rf"24x40 +fp32 as {scheme} .* {scheme}/", capsys.readouterr().out)


def test_tune_reports_the_users_model(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """module:function is found in the working folder, converted and tuned."""
    assert cli.main(["tune", "users_model:make"]) == 0
    report = capsys.readouterr().out
    assert "24x40" in report and "relu" in report and "untuned" not in report


def test_tune_for_batches_into_a_file(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--batch repeats the example's rows, --out writes plans, --html a page; --show lists, --clear forgets."""
    files = ["--out", "plans.json", "--html", "report.html"]
    assert cli.main(["tune", "users_model:make", "--clear", "--batch", "1,6", *files, "--show"]) == 0
    text = capsys.readouterr().out
    assert re.search(r" 24x40 .* relu +1 ", text) and re.search(r"^ +6 fp32 ", text, re.MULTILINE)
    assert re.search(r"^\d plans in plans.json$", text, re.MULTILINE)
    assert re.search(r"/n40/k24/bias/relu/t1/m1$", text, re.MULTILINE)
    assert fastlinear.load_plans("plans.json") >= 1 and "users_model" not in Path("report.html").read_text()
    assert cli.main(["tune", "--clear", "--show"]) == 0
    assert re.search(r"^0 plans in ", capsys.readouterr().out, re.MULTILINE)


def test_check_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Every runnable kernel on all that it reads, and every function of an epilogue on its ISA, listed and within its
    bound."""
    assert cli.main(["check"]) == 0
    text = capsys.readouterr().out
    runnable = [row for row in fastlinear.kernels() if row["runnable"]]
    for row in runnable:
        assert len(re.findall(rf"^{row['name']} +sums", text, re.MULTILINE)) == len(row["reads"])
    floats = {row["isa"] for row in runnable if row["format"] in ("fp32", "bf16", "fp16")}
    for isa, name in itertools.product(floats, _kernels.functions().keys() - {"identity"}):
        assert len(re.findall(rf"^{isa} +{name} ", text, re.MULTILINE)) == 1, (isa, name)


SHARE = {"fp16": 0.1, "fp32": 1e-4, "int32": 1e-6}  # of a result, that sums in this format may not be off by


DAMAGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "scaled": lambda y, share: y * (1 + share),
    "reordered": lambda y, _: y.flip(0),
    "missing": lambda y, _: y * torch.nan,
}


@pytest.mark.parametrize(
    "damages", [[*DAMAGES], *(pytest.param([name], marks=pytest.mark.exhaustive) for name in DAMAGES)], ids="-".join
)
def test_check_sees_a_wrong_kernel(
    damages: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled, reordered and missing results fail it, with exit code 1; of several kinds each kernel has one."""
    right, names = check._run, [row["name"] for row in fastlinear.kernels()]

    def wrong(row: dict[str, Any], *arguments: object, **options: object) -> Tensor:
        damage = DAMAGES[damages[names.index(row["name"]) % len(damages)]]
        return damage(right(row, *arguments, **options), SHARE[row["accumulate"]])

    monkeypatch.setattr(check, "_run", wrong)
    assert cli.main(["check"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    exact = [row for row in fastlinear.kernels() if row["runnable"] and row["accumulate"] != "fp16"]
    for kernel in [row["name"] for row in exact]:  # sums in fp16 may be off by more than a ten-thousandth
        assert any(line.startswith(f"{kernel} ") for line in failed)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench", "--shapes", "2x3"], "'2x3'"),
        (["bench", "--against", "torch,numpy"], "'numpy' is none of torch, mkl, onednn, inductor"),
        (["bench", "--like", "users_model:no_model"], "users_model:no_model"),
        (["bench", "--shapes", "2x3x0"], "'0'"),
        (["bench", "--shapes", "2x99999999x99999999"], "2x99999999x99999999 takes 74,"),
        (["bench", "--threads", "none"], "'none'"),
        (["bench", "--threads", "1,999999"], "999999 threads are more than the "),
        (["tune", "users_model:make", "--threads", "999999"], "999999 threads are more than the "),
        (["bench", "--plot", "picture.foo"], "picture.foo would be a picture of kind 'foo'; there are "),
        (["bench", "--activation", "swish"], "'swish'"),
        (["bench", "--dtype", "float64"], "'float64'"),
        (["bench", "--quantize", "int3"], "'int3'"),
        (["bench", "--isa", "avx10"], "'avx10' does not run here; what does: "),
        (["bench", "--isa", "avx2", "--shapes", "1x8x8", "--json", "no/such/folder"], "no/such/folder"),
        (["tune", "users_model"], "'users_model'"),
        (["tune"], "--show or --clear"),
        (["tune", "users_model:make", "--batch", "1,x"], "'x'"),
        (["tune", "users_model:make", "--out", "no/such/folder"], "no/such/folder"),
        (["tune", "no_such_module:make"], "'no_such_module'"),
        (["tune", "users_model:mke"], "'mke'"),
        (["tune", "fastlinear:nosuch"], "module 'fastlinear' has no function 'nosuch'"),
        (["tune", "users_model:no_model"], "users_model:no_model"),
        (["tune", "users_model:broken"], "users_model:broken raised OSError at "),
        (["bench", "--like", "users_model:misfit"], "users_model:misfit raised RuntimeError: "),
        (["tune", "users_model:misfit"], "(3, 25)"),
        (["tune", "users_model:list_for_example"], "is of type list"),
        (["tune", "users_model:no_layers"], "no linear layer"),
        (["tune", "users_model:make", "--html", "no/such/page.html"], "--html: no/such/page.html"),
        (["bench", "--plot", "no/such/plot.png"], "--plot: no/such/plot.png"),
        (["inspect", "no_such_file"], "no_such_file cannot be read: No such file"),
        (["inspect", "."], ". cannot be read"),
        (["polish"], "'polish'"),
        ([], "command"),
    ],
)
def test_what_cannot_be_done_is_named(
    arguments: list[str], named: str, user_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line with the value that was given, no usage and no traceback."""
    assert named in refusal(arguments, capsys)


def test_an_unknown_override_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_KERNEL with a typing error stops bench before it measures anything."""
    monkeypatch.setenv("FASTLINEAR_KERNEL", "fp32/avx512/9x99")
    message = refusal(["bench", "--shapes", "1x8x8"], capsys)
    assert "FASTLINEAR_KERNEL" in message and "'fp32/avx512/9x99', which is no kernel" in message and len(message) < 300


def test_dtypes_have_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    """bf16 is bfloat16, as in the names of kernels."""
    assert cli.main(["bench", "--shapes", "1x8x8", "--dtype", "bf16"]) == 0
    assert " bfloat16, " in capsys.readouterr().out
