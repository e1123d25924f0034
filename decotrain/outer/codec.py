"""How pseudo-gradients travel: which codec each way, and whether the sender keeps what was lost.

The codecs themselves are in the core; this only names them and owns the residual's place.
"""

from __future__ import annotations

from dataclasses import dataclass

from decotrain.errors import ConfigError

CODECS = ("f32", "bf16", "f16", "int8", "e2m1", "e3m0", "int2")


@dataclass(frozen=True)
class CodecChoice:
    """The second of the four choices."""

    contribution: str = "f32"
    result: str = "f32"
    error_feedback: bool = False  # the sender adds what the codec lost to its next contribution

    @staticmethod
    def named(name: str, error_feedback: bool = False) -> CodecChoice:
        """From "int8" (both ways) or "e2m1+int8" (contributions + results)."""
        contribution, _, result = name.partition("+")
        choice = CodecChoice(contribution, result or contribution, error_feedback)
        for codec in (choice.contribution, choice.result):
            if codec not in CODECS:
                raise ConfigError(f"codec {codec!r} is unknown; there are {', '.join(CODECS)}")
        return choice
