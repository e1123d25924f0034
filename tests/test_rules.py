"""Robust rules through whole rounds: what four peers get, one of whom is far off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from decotrain.communicator import join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import ConfigError
from tests.test_communicator import WAIT_S, together

ELEMENTS = 5000
VALUES = (1.0, 1.0, 2.0, 1000.0)


@pytest.mark.parametrize("codec", ["f32", "int8"])
def test_one_that_is_far_off_does_not_carry_the_mean(codec: str) -> None:
    server = ServerThread(Options(min_peers=len(VALUES)))

    def peer(value: float) -> dict[str, float]:
        found: dict[str, float] = {}
        with join(server.address, insecure=True, listen="127.0.0.1") as comm:
            for rule, parameter in (("median", None), ("trimmed_mean", 0.25), ("norm_clip", 2.0)):
                values = np.full(ELEMENTS, value, np.float32)
                work = comm.all_reduce(values, codec=codec, rule=rule, rule_parameter=parameter)
                assert len(work.wait(WAIT_S).contributors) == len(VALUES)
                assert (values == values[0]).all()
                found[rule] = float(values[0])
        return found

    said = together(*[lambda value=value: peer(value) for value in VALUES])
    server.stop()
    assert said.count(said[0]) == len(VALUES)
    # the median of 1 1 2 1000; the mean of 1 and 2; 1000 shortened to twice the median length
    wanted = {"median": 1.5, "trimmed_mean": 1.5, "norm_clip": (1 + 1 + 2 + 2) / 4}
    assert said[0] == pytest.approx(wanted, rel=1e-6 if codec == "f32" else 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "norm_clip"}, "rule_parameter=None: norm_clip needs the longest length"),
        ({"rule": "norm_clip", "rule_parameter": 0}, "rule_parameter=0: norm_clip needs"),
        ({"rule": "norm_clip", "rule_parameter": -1.0}, "norm_clip needs"),
        ({"rule": "norm_clip", "rule_parameter": 1e-50}, "norm_clip needs"),  # 0 in float32
        ({"rule": "norm_clip", "rule_parameter": True}, "norm_clip needs"),
        ({"rule": "norm_clip", "rule_parameter": float("nan")}, "norm_clip needs"),
        ({"rule": "trimmed_mean"}, "trimmed_mean needs the part cut at each end"),
        ({"rule": "trimmed_mean", "rule_parameter": 0.5}, "from 0 to below 0.5"),
        ({"rule": "median", "rule_parameter": 0.1}, "median has no parameter"),
        ({"rule_parameter": 0.1}, "mean has no parameter"),
        ({"rule": "medain"}, "did you mean median"),
        ({"rule": 3}, "A rule is one of median, trimmed_mean, norm_clip"),
        ({"rule": "median", "op": "sum"}, "leave out op=sum"),
    ],
)
def test_a_parameter_that_its_rule_cannot_use(options: dict[str, Any], message: str) -> None:
    values = np.ones(8, np.float32)
    with join("local") as comm:
        with pytest.raises(ConfigError, match=message):
            comm.all_reduce(values, **options)
        comm.all_reduce(values).wait(WAIT_S)
    assert (values == 1).all()
