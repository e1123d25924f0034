"""The configuration: complete, typed, in range; and one line about what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from decotrain.errors import ConfigError
from decotrain.outer.presets import PRESETS, options_of
from decotrain.shipped import configs
from decotrain.train.job import TrainJob
from decotrain.train.settings import OWN_CODEC, parse, to_mapping


def composed() -> dict[str, Any]:
    """configs/train.yaml with its default groups, without hydra."""
    base = OmegaConf.load(configs() / "train.yaml")
    assert OmegaConf.is_dict(base)
    for default in base.pop("defaults"):
        for group, name in dict(default).items() if OmegaConf.is_dict(default) else []:
            if not str(group).startswith("override"):
                base[group] = OmegaConf.load(configs() / str(group) / f"{name}.yaml")
    base.pop("hydra")
    base["name"] = "test"
    out = OmegaConf.to_container(base)
    assert isinstance(out, dict)
    return {str(key): value for key, value in out.items()}


def change(key: str, value: Any) -> dict[str, Any]:
    config = composed()
    place = config
    *path, last = key.split(".")
    for part in path:
        place = place[part]
    place[last] = value
    return config


def test_the_shipped_configuration_is_valid() -> None:
    settings = parse(composed())
    assert settings.peers == 3
    assert settings.rounds * settings.outer.sync_every == settings.steps
    assert parse(to_mapping(settings)) == settings


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peers", 0, r"peers=0 is out of range; it lies between 1 and 64"),
        ("peers", 65, r"peers=65 is out of range"),
        ("peers", "many", r"peers='many' must be a whole number"),
        ("peers", True, r"peers=True must be a whole number"),
        ("peers", None, r"peers=None must be"),
        ("peerz", 3, r"unknown key peerz"),
        ("outer.beta", 3, r"unknown key outer.beta"),
        ("outer", 3, r"outer must have keys"),
        ("outer.lr", "nan", r"outer.lr='nan' must be a number"),
        ("outer.lr", float("nan"), r"outer.lr=nan is out of range"),
        ("resume", "maybe", r"resume=maybe: one of never, auto"),
        ("steps", 31, r"steps=31 is not a multiple of outer.sync_every=30"),
        ("model.width", 97, r"model.width=97 is not a multiple"),
        ("model.kv_heads", 3, r"model.heads=4 is not a multiple of model.kv_heads=3"),
        ("inner.betas", [0.9], r"inner.betas=\[0.9\] must be"),
        ("prompt", "", r"prompt is empty"),
        ("codec.name", "int7", r"codec=int7: did you mean int8"),
        ("codec.residual", "f16", r"codec.residual=f16: one of f32, bf16"),
        ("codec.owner_feedback", True, r"results in f32 lose nothing"),
        ("codec.stochastic", True, r"stochastic rounding is for .*, not for f32"),
    ],
)
def test_what_is_wrong_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(change(key, value))
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    config = composed()
    del config["outer"]["preset"]
    with pytest.raises(ConfigError, match=r"outer\.preset is missing"):
        parse(config)


def test_presets_that_take_no_codec_are_known() -> None:
    assert {name for name in PRESETS if "codec" not in options_of(name)} == set(OWN_CODEC)


@pytest.mark.parametrize(
    ("preset", "named", "told"),
    [
        ("sparseloco", ["outer=sparseloco", "codec=e2m1+int8"], ["codec=e2m1+int8"]),
        ("sparseloco", ["codec.residual=bf16", "+codec.name=f16"],
         ["codec.residual=bf16", "+codec.name=f16"]),
        ("sparseloco", ["outer=sparseloco", "name=codec"], []),  # what nobody asked for
        ("diloco", ["codec=e2m1+int8"], []),
    ],
)  # fmt: skip
def test_a_codec_that_the_preset_does_not_use_is_named(
    preset: str, named: list[str], told: list[str], run_dir: Path
) -> None:
    """No error: a sweep over presets and codecs comes to such pairs."""
    (run_dir / "text.txt").write_bytes(b"some words, and some more of them; " * 4000)
    config = change("outer", {"preset": preset, "sync_every": 30})
    config["data"]["path"] = str(run_dir / "text.txt")
    job = TrainJob.of(config, named)
    job.prepare()
    notes = [line.partition(" ")[2] for line in job.board({}).events]
    unused = [f"{word} is not used: outer={preset} has a codec of its own" for word in told]
    assert notes[1:] == unused
