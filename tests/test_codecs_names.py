"""Names of codecs through the public API: pairs, and what a wrong one gets to hear."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from decotrain import _core, codecs
from decotrain.communicator import join
from decotrain.errors import ConfigError
from tests.test_communicator import WAIT_S


def test_a_pair_is_one_word_of_the_api() -> None:
    with join("local") as comm:
        values = np.linspace(-1, 1, 500, dtype=np.float32)
        expected = values.copy()
        for codec in ("e2m1", "int8"):  # what a round of one does to its values
            data = np.empty(_core.codec_bytes(codec, 500), np.uint8)
            assert _core.codec_encode(codec, expected, data)
            assert _core.codec_decode(codec, data, expected)
        both: list[dict[str, Any]] = [
            {"codec": "e2m1+int8"},
            {"codec": "e2m1", "result_codec": "int8"},
        ]
        for given in both:
            mine = values.copy()
            comm.all_reduce(mine, op="mean", weight=17, **given).wait(WAIT_S)
            assert np.array_equal(mine, expected)
        with pytest.raises(ConfigError, match="result_codec=bf16"):
            comm.all_reduce(values, codec="e2m1+int8", result_codec="bf16")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("int4", "int8"), ("e2m1+in8", "e2m1+int8"), ("fp16", "f16"), ("INT8", "int8"),
     ("e2m1/int8", "e2m1+int8"), ("bfloat16", "bf16"), ("?", None), ("int8+int8+int8", None)],
)  # fmt: skip
def test_a_wrong_name_says_what_was_meant(wrong: str, meant: str | None) -> None:
    with pytest.raises(ConfigError, match="A codec is one of f32, bf16") as error:
        codecs.pair(wrong)
    said = str(error.value)
    assert said.startswith(f"codec={wrong}: ")
    assert (f"did you mean {meant}?" in said) if meant else ("did you mean" not in said)
