"""A plain PyTorch loop; the marked lines are what decotrain adds.

decotrain run --join HOST:29400 examples/plain.py model.safetensors
"""

import sys

import torch
from safetensors.torch import save_file
from torch import nn

import decotrain as dt  # decotrain

comm = dt.join()  # decotrain
model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
outer = dt.outer.make("diloco", model, optimizer, comm, sync_every=20)  # decotrain
torch.seed()  # other samples on every peer
for _ in range(100):
    x = 6 * torch.rand(256, 1) - 3
    loss = nn.functional.mse_loss(model(x), torch.sin(x))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    outer.step(tokens=len(x))  # decotrain
print(f"loss {loss.item():.4f}")
save_file(model.state_dict(), sys.argv[1])
comm.leave()  # decotrain
