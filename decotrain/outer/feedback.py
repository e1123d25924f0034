"""Error feedback: what a codec lost of one contribution is added to the sender's next.

    e <- x + e - decode(encode(x + e))

One residual for each fragment (tag). It is private: it never travels, differs between peers, and a
view change does not touch it; a peer that leaves takes its own with it. It belongs in the peer's
own checkpoint, not in the shared state. The arithmetic is the core's, fused with encoding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from decotrain import _core
from decotrain.errors import ConfigError, NotFiniteError, StateError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class ErrorFeedback:
    """Residuals by tag. bf16 halves the memory and forgets a 256th of each residual."""

    def __init__(self, elements: Mapping[int, int], dtype: str = "f32") -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"a residual is f32 or bf16, not {dtype!r}")
        self.residuals = {tag: torch.zeros(n, dtype=DTYPES[dtype]) for tag, n in elements.items()}

    def encode(
        self,
        tag: int,
        values: torch.Tensor,  # flat float32 on the CPU
        codec: str,
    ) -> torch.Tensor:
        """The encoded contribution (uint8), after which the residual is what it lost."""
        residual = self.residuals[tag]
        out = torch.empty(_core.codec_bytes(codec, values.numel()), dtype=torch.uint8)
        held = residual.view(torch.uint16) if residual.dtype == torch.bfloat16 else residual
        if not _core.codec_encode_with_feedback(codec, values.numpy(), held.numpy(), out.numpy()):
            raise NotFiniteError(
                f"fragment {tag}: a value is NaN or infinite; nothing was encoded, the residual is "
                "as before. Look at the loss and the learning rate."
            )
        return out

    def clear(self, tag: int) -> None:
        """Forget: the fragment's state was fetched, and what we had lost is beside the point."""
        self.residuals[tag].zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The residuals themselves, not copies."""
        return {f"{tag}.residual": residual for tag, residual in self.residuals.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over values; every residual must be there, with its length."""
        for name, residual in self.state_dict().items():
            if name not in state or state[name].shape != residual.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise StateError(
                    f"{name}: {tuple(residual.shape)} expected, {found} found; the checkpoint "
                    "belongs to another model or schedule"
                )
            residual.copy_(state[name])
