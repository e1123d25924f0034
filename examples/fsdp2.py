"""FSDP2 inside a peer: its processes share one model, and are one peer to the others.

decotrain run --join HOST:29400 --nproc 2 examples/fsdp2.py model.safetensors
"""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import decotrain as dt  # decotrain

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
for part in [*model, model]:
    fully_shard(part, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
outer = dt.outer.LocalGroup("diloco", model, optimizer, sync_every=20)  # decotrain
torch.seed()  # other samples in every process
for _ in range(100):
    x = 6 * torch.rand(256, 1) - 3
    loss = nn.functional.mse_loss(model(x), torch.sin(x))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    outer.step(tokens=len(x))  # decotrain
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if dist.get_rank() == 0:
    print(f"loss {loss.item():.4f}")
    save_file(whole, sys.argv[1])
outer.leave()  # decotrain
dist.destroy_process_group()
