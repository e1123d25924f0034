"""Functions of the user's own by name, as `module:function`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decotrain.errors import ConfigError


def function(key: str, name: str) -> Callable[..., Any]:
    """From the working directory or what is installed; ConfigError says why there is none."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{key}={name}: write module:function")
    if os.getcwd() not in sys.path:  # a console script has its own folder there instead
        sys.path.insert(0, os.getcwd())
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}={name} cannot be had: {error}") from error
    except Exception as error:  # a module may raise anything when it is imported
        raise ConfigError(f"{key}={name} cannot be had: {said(error)}") from error
    if not callable(found):
        raise ConfigError(f"{key}={name} cannot be had: it is no function")
    return found


def said(error: Exception) -> str:
    """One line about an error in somebody's own code: what, and where."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
