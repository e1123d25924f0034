"""Peers on different SIMD levels are in one round: all hold the same bits, whatever the codec.

What one machine can do is compared here; tests/test_codecs.py compares each level's functions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from decotrain import _core
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 100.0
PAIRS = [
    "f32", "bf16", "f16", "int8", "e2m1", "e3m0", "int2", "e2m1+int8", "e3m0+f32", "int2+bf16",
]  # fmt: skip


def test_peers_on_different_levels_hold_the_same_bits() -> None:
    levels = ["scalar", "avx2", _core.simd()]
    server = ServerThread(Options(run="test", min_peers=len(levels)))
    try:
        peers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.simd_peer", server.address, f"peer-{i}", *PAIRS],
                cwd=ROOT, stdout=subprocess.PIPE,
                env={**os.environ, "DECOTRAIN_SIMD": level, "OMP_NUM_THREADS": "1"},
            )
            for i, level in enumerate(levels)
        ]  # fmt: skip
        said = [json.loads(peer.communicate(timeout=WAIT_S)[0]) for peer in peers]
    finally:
        server.stop()
    assert said[0]["simd"] == "scalar"
    assert _core.simd() == "scalar" or said[2]["simd"] != "scalar", "there is a level to compare"
    for pair in PAIRS:
        assert len({one["held"][pair] for one in said}) == 1, pair
