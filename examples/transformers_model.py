"""A Hugging Face model, made from a configuration: nothing is downloaded.

decotrain run --join HOST:29400 examples/transformers_model.py folder
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import decotrain as dt  # decotrain

comm = dt.join()  # decotrain
text = torch.tensor(list(Path(__file__).read_bytes()))  # bytes are tokens, this file is the text
config = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
outer = dt.outer.make("diloco", model, optimizer, comm, sync_every=5)  # decotrain
torch.seed()  # other samples on every peer
for _ in range(20):
    starts = torch.randint(0, len(text) - 64, (4, 1))
    tokens = text[starts + torch.arange(64)]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    outer.step(tokens=tokens.numel())  # decotrain
print(f"loss {loss.item():.4f}")
model.save_pretrained(sys.argv[1])
comm.leave()  # decotrain
