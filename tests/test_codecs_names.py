"""Names of codecs through the public API: pairs, and what a wrong one gets to hear."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from decotrain import _core, codecs
from decotrain.cli import _one_line
from decotrain.communicator import join
from decotrain.errors import ConfigError
from decotrain.outer.codec import CodecChoice
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


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [(None, None), (torch.bfloat16, "bf16"), (torch.int8, "int8"), (np.float16, None), (8, None),
     (("e2m1", "int8"), "e2m1+int8"), (["e2m1", torch.int8], "e2m1+int8"), (b"int8", None)],
)  # fmt: skip
def test_what_is_no_name_is_no_codec_either(wrong: Any, meant: str | None) -> None:
    with join("local") as comm:
        for options in ({"codec": wrong}, {"codec": "int8", "result_codec": wrong}):
            if wrong is None and "result_codec" in options:
                continue  # which is to name none
            with pytest.raises(ConfigError, match=r"is no name: .*A codec is one of") as error:
                comm.all_reduce(np.ones(5, np.float32), **options)
            said = str(error.value)
            assert (f"did you mean {meant}?" in said) if meant else True
    with pytest.raises(ConfigError, match="is no name"):
        CodecChoice.named(wrong)


@pytest.mark.parametrize("name", ["topk", "top-k", "TopK", "top_k+int8", "topk64"])
def test_top_k_says_where_it_is(name: str) -> None:
    with pytest.raises(ConfigError, match=r"outer=sparseloco.*A codec is one of f32"):
        codecs.pair(name)


def test_a_codec_without_a_file_is_told_of_as_in_the_api() -> None:
    """`decotrain train codec=topk`: hydra knows files only."""
    hydra = "In 'train': Could not find 'codec/{}'\n\nAvailable options in 'codec':\n\tbf16\n\tint8"
    assert "outer=sparseloco" in _one_line(hydra.format("topk"))
    assert _one_line(hydra.format("in8")).startswith("codec=in8: did you mean int8?")
    assert "Available options" in _one_line(hydra.format("int8+int8")), "a codec, but no file"
