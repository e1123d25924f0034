"""Names of codecs, for people: pairs such as "e2m1+int8", and what was probably meant.

The core knows the codecs themselves (docs/codecs.md); nothing here encodes.
"""

from __future__ import annotations

import difflib
import math
import numbers

import numpy as np

from decotrain import _core
from decotrain.errors import ConfigError

NAMES = ("f32", "bf16", "f16", "int8", "e2m1", "e3m0", "int2")
RULES = ("median", "trimmed_mean", "norm_clip")  # instead of the mean
PARAMETERS = {  # of rules: from, below, what it is
    "trimmed_mean": (0.0, 0.5, "the part cut at each end, from 0 to below 0.5"),
    "norm_clip": (0.0, 1e30, "the longest length allowed, in median lengths, such as 2.0"),
}
STOCHASTIC = ("int8", "e2m1", "e3m0")  # those that have stochastic rounding


def pair(name: str, result: str | None = None) -> tuple[str, str]:
    """(contributions, results) of "int8" (both) or "e2m1+int8"; `result` names the second apart."""
    for given in (name, name if result is None else result):
        if not isinstance(given, str):  # None, a dtype, a tuple: what was meant has a name
            parts = given if isinstance(given, (list, tuple)) else [given]
            words = "+".join(str(part).removeprefix("torch.") for part in parts)
            raise ConfigError(f"codec={given!r} is no name: {_meant(words)}")
    if result is not None and "+" in name:
        raise ConfigError(
            f"codec={name} names the codec of results already; leave out result_codec={result}"
        )
    whole = name if result is None else f"{name}+{result}"
    try:
        return _core.codec_pair(whole)
    except ValueError:
        raise ConfigError(f"codec={whole}: {_meant(whole)}") from None


def check_stochastic(contribution: str, feedback: bool) -> None:
    """ConfigError unless contributions of this codec can be rounded by chance."""
    if contribution in STOCHASTIC and not feedback:
        return
    raise ConfigError(
        f"stochastic rounding is for contributions in {', '.join(STOCHASTIC)} without error"
        f" feedback, not for {contribution}"
        f"{' with it (codec.error_feedback=false)' if feedback else ''}"
    )


def check_rule(rule: str | None, op: str, parameter: float | None) -> float:
    """The rule's parameter as the core takes it; ConfigError for one that is none, or no rule."""
    if rule is not None and rule not in RULES:
        near = difflib.get_close_matches(rule, RULES, 1, 0.4) if isinstance(rule, str) else []
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"rule={rule!r}: {hint}A rule is one of {', '.join(RULES)}")
    if rule is not None and op != "mean":
        raise ConfigError(f"rule={rule} takes the place of the mean: leave out op={op}")
    name = rule or op
    if name not in PARAMETERS:
        if parameter is not None:
            raise ConfigError(f"rule_parameter={parameter}: {name} has no parameter")
        return 0.0
    least, most, meaning = PARAMETERS[name]
    number = isinstance(parameter, numbers.Real) and not isinstance(parameter, bool)
    value = float(np.float32(parameter)) if number else math.nan  # as the core takes it
    if not least <= value < most or (name == "norm_clip" and value == 0):
        raise ConfigError(f"rule_parameter={parameter}: {name} needs {meaning}")
    return value


def check_owner_feedback(result: str) -> None:
    """ConfigError where results lose nothing that an owner could keep."""
    if result == "f32":
        raise ConfigError(
            "owner feedback keeps what results lose, and results in f32 lose nothing: name another"
            " codec for them, or leave it out (codec.owner_feedback=false)"
        )


def _meant(whole: str) -> str:
    parts = [part.strip().lower() for part in whole.replace("/", "+").replace(",", "+").split("+")]
    if any(part.replace("-", "").replace("_", "").startswith("topk") for part in parts):
        return (
            "top-k is not for rounds that combine: it comes with outer=sparseloco, which takes no"
            f" codec. A codec is one of {', '.join(NAMES)}"
        )
    near = [difflib.get_close_matches(part, NAMES, 1, 0.4) for part in parts]
    if len(parts) <= 2 and all(near):
        hint = f"did you mean {'+'.join(one[0] for one in near)}? "
    else:
        hint = ""
    return (
        f"{hint}A codec is one of {', '.join(NAMES)}, or two of them joined by +:"
        " contributions + results"
    )
