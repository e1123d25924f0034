"""Other all-reduces that people would use over the internet: are they here, and what of it?

Named in the results whether they are installed or not, never required. Gloo comes with torch and is
measured by the suites themselves; there is no measurement of another one here yet.
"""

from __future__ import annotations

import importlib.util

from bench.common import Report

MODULES = {"PCCL": "pccl", "hivemind": "hivemind"}  # what is imported


def name_them(report: Report) -> None:
    """A row for each baseline that was not measured, with the reason."""
    for name, module in MODULES.items():
        found = importlib.util.find_spec(module) is not None
        reason = "is installed, but no suite drives it" if found else "is not installed"
        report.skip({"what": name}, f"{name} {reason}")
