"""Programs that two processes run together, joined by gloo; see zygote.py for where they come from."""

import textwrap

import zygote

_IMPORTED = "fastlinear,torch.distributed.device_mesh,torch.distributed.tensor.parallel"
_AHEAD = """
import datetime, os, tempfile, traceback, warnings
import torch, torch.distributed as dist, fastlinear
from torch import nn
folder = tempfile.mkdtemp()
{ahead}
second = os.fork()
rank = int(second == 0)
code = 1
try:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=100)
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (2,))
"""
_BEHIND = """
    code = 0
except BaseException:
    traceback.print_exc()
finally:
    if rank:
        os._exit(code)
    other = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    os._exit(code or other)
"""


def run(program: str, ahead: str = "") -> None:
    """Runs the program in two processes at once, as `rank` 0 and 1 of `mesh`; AssertionError, with what they wrote,
    where one fails. `ahead` is run once, before there are two: imports of what both of them need."""
    whole = _AHEAD.replace("{ahead}", ahead) + textwrap.indent(textwrap.dedent(program), "    ") + _BEHIND
    done = zygote.run(whole, imported=_IMPORTED)
    assert done.returncode == 0, done.stdout + done.stderr
