"""A peer of several processes: errors reach all of them, the outer parameters too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import decotrain as dt
from decotrain.errors import ConfigError
from tests.tree import ROOT

pytestmark = pytest.mark.timeout(200)  # processes that import torch

SCRIPT = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import decotrain as dt
from decotrain.errors import ConfigError, Error

dist.init_process_group("gloo")
rank = dist.get_rank()

def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))

model = make_model()
model[1].bias.requires_grad_(False)
mesh = init_device_mesh("cpu", (2,))
for part in [*model, model]:
    fully_shard(part, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def whole():
    return [p.full_tensor().detach().clone() for p in model.parameters()]

try:
    dt.outer.LocalGroup("diloco", model, optimizer, speed=1)
except ConfigError as error:
    assert rank == 0 and "no option speed" in str(error), error
except Error as error:
    assert rank == 1 and "process 0 of this peer: ConfigError: diloco has no option" in str(error)
else:
    raise SystemExit("no error")

first = whole()
assert all(a.equal(b) for a, b in zip(first, make_model().parameters()))
outer = dt.outer.LocalGroup("diloco", model, optimizer, sync_every=2, lr=0.5, momentum=0.0)
assert (outer.outer is None) == (rank == 1)
assert outer.outer is None or len(outer.outer.fragments[0].parameters) == 3

def inner_step():
    torch.manual_seed(outer.global_step)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

inner_step()
assert not outer.step(tokens=rank + 1)
assert outer.global_step == 1
moved = whole()
with outer.swapped():
    assert all(a.equal(b) for a, b in zip(whole(), first)), "outer parameters are the first ones"
assert all(a.equal(b) for a, b in zip(whole(), moved)), "and the local ones are back"

inner_step()
before = whole()
if rank == 0:
    assert outer.outer.fragments[0].tokens == 3, "tokens of both processes"
assert outer.step(tokens=0), "a round, and both know it"
assert outer.global_step == 2
# one peer: theta - 0.5 (theta - w)
for a, b, c in zip(first, before, whole()):
    torch.testing.assert_close(c, a - 0.5 * (a - b))
outer.leave()
print("well", flush=True)
dist.destroy_process_group()
"""


def test_sharded_parameters_errors_and_tokens(run_dir: Path) -> None:
    (run_dir / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "script.py"],
        cwd=run_dir, capture_output=True, text=True, check=False, timeout=180,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DECOTRAIN_JOIN": "local"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("well") == 2


def test_without_a_process_group_the_error_says_how() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        dt.outer.LocalGroup("diloco", nn.Linear(1, 1), None)  # type: ignore[arg-type]
