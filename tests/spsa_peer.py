"""One process of tests/test_spsa_real.py: fine-tunes a small model until a version is reached.

    python -m tests.spsa_peer ADDRESS NAME STEPS FOLDER [OPTIONS as JSON]

Leaves after STEPS steps of its own, or at the version in FOLDER/until once that is there.
Writes "version digest" for every version it holds to FOLDER/NAME.txt, a line at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from decotrain import _core
from decotrain.communicator import join
from decotrain.spsa import SPSA

WAIT_S = 90.0


def make_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Embedding(32, 24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 32))


def main() -> None:
    address, name, steps, folder = sys.argv[1:5]
    options = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
    torch.set_num_threads(1)
    model = make_model()
    tokens = torch.randint(0, 32, (8, 9), generator=torch.Generator().manual_seed(len(name)))
    comm = join(address, name=name, run="test", listen="127.0.0.1", timeout_s=WAIT_S)
    spsa = SPSA(model, comm, log=Path(folder) / f"{name}.seedlog", **options)

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )

    with (Path(folder) / f"{name}.txt").open("w", buffering=1) as out:
        out.write(f"simd {_core.simd()}\n")
        until = Path(folder) / "until"
        for _ in range(int(steps)):
            if until.exists() and spsa.version >= int(until.read_text()):
                break
            spsa.step(loss)
            out.write(f"{spsa.version} {spsa.digest()}\n")
        spsa.finish()
        figures = comm.figures()
        out.write(f"bytes {figures['bytes_out']}\n")
        out.write(f"fetches {figures['fetches']}\nshortcuts {figures['shortcuts']}\n")
    comm.leave()


if __name__ == "__main__":
    main()
