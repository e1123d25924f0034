"""DDP inside a peer: its processes average gradients every step, the peers what they learned.

decotrain run --join HOST:29400 --nproc 2 examples/ddp.py model.safetensors
"""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import decotrain as dt  # decotrain

dist.init_process_group("gloo")
model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
parallel = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-3)
outer = dt.outer.LocalGroup("diloco", parallel, optimizer, sync_every=20)  # decotrain
torch.seed()  # other samples in every process
for _ in range(100):
    x = 6 * torch.rand(256, 1) - 3
    loss = nn.functional.mse_loss(parallel(x), torch.sin(x))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    outer.step(tokens=len(x))  # decotrain
if dist.get_rank() == 0:
    print(f"loss {loss.item():.4f}")
    save_file(model.state_dict(), sys.argv[1])
outer.leave()  # decotrain
dist.destroy_process_group()
