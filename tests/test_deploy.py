"""examples/deploy: files that the programs they are for accept, with options that decotrain has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from decotrain import cli, operate
from decotrain.errors import ConfigError, UnreachableError
from decotrain.launch import options
from tests.tree import ROOT

DEPLOY = ROOT / "examples" / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
MANIFEST = DEPLOY / "kubernetes.yaml"
SLURM = DEPLOY / "slurm.sh"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every call of decotrain in the folder, also those that comments tell people to type."""
    for path in sorted(DEPLOY.iterdir()):
        text = re.sub(r"\\\n#?\s*", "", path.read_text())
        if path.suffix == ".yaml":
            for one in yaml.safe_load_all(text):
                pods = one.get("spec", {}).get("template", {}).get("spec", {})
                for container in pods.get("containers", []):
                    yield path.name, container["command"]
        for line in text.splitlines():
            found = re.search(r"(?:^|/|\s)(decotrain (?:token|run|coordinator) .*)", line)
            if (found and path.suffix != ".yaml") or (found and line.startswith("#")):
                yield path.name, shlex.split(found[1].partition(" &")[0], comments=False)


CALLS = list(commands())


@pytest.mark.parametrize(("place", "words"), CALLS, ids=[f"{p}-{w[1]}" for p, w in CALLS])
def test_decotrain_has_these_options(
    place: str, words: list[str], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call gets as far as being carried out."""
    assert words[0] == "decotrain"
    if words[1] == "run":
        for name in ("train.py", "file.py"):
            Path(name).write_text("")
        rest = ["train.py" if word in ("/train/train.py", "$@") else word for word in words[2:]]
        asked = options.parse(rest)
        assert asked.join
        assert asked.token_file
        assert asked.run == "home"
        return
    monkeypatch.setattr("decotrain.control.token.read", lambda path: None)
    reached: list[Any] = []
    monkeypatch.setattr("decotrain.control.server.serve", lambda *a, **k: reached.append(a) or 0)
    monkeypatch.setattr("decotrain.control.token.write", lambda *a: reached.append(a))
    command = {"coordinator": operate.coordinator, "token": operate.token}[words[1]]
    assert command(words[2:]) == 0
    assert reached


def test_every_file_calls_decotrain() -> None:
    assert {place for place, _ in CALLS} == {path.name for path in DEPLOY.iterdir()}
    assert sum(words[1] == "run" for _, words in CALLS) >= 3


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    """With a program in place of decotrain, which is not installed where systemd looks."""
    text = unit.read_text().replace("/usr/local/bin/decotrain", "/bin/true")
    (tmp_path / unit.name).write_text(text.replace("User=decotrain", "User=root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not complaints
    assert "[Service]" in text


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_the_steps_of_the_units_work_in_their_order(unit: Path, run_dir: Path) -> None:
    """Each file lands in a folder that is there by then, readable by the service and nobody else.
    Users and systemd are left out; folders of the system are below a new one."""
    steps = []
    for line in unit.read_text().splitlines():
        if (found := re.match(r"#   sudo (.*)", line)) and not re.match(
            "useradd|systemctl", found[1]
        ):
            step = re.sub(r" -o decotrain -g decotrain|^-u decotrain ", "", found[1])
            step = step.replace("/usr/local/bin/decotrain", f"{sys.executable} -m decotrain.cli")
            steps.append(re.sub(r" /(var|srv|etc)/", rf" {run_dir}/\1/", step))
    (run_dir / "etc" / "systemd" / "system").mkdir(parents=True)
    for name in (unit.name, "train.py", "run.token"):
        (run_dir / name).touch()
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(steps)], cwd=run_dir, capture_output=True, text=True,
        check=False, timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    named = re.search(r"--token-file (\S+)", unit.read_text())
    assert named is not None
    token = run_dir / named[1].lstrip("/")
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700


def test_exit_codes_of_the_units_are_those_of_the_launcher() -> None:
    peer = (DEPLOY / "decotrain-peer.service").read_text()
    assert re.findall(r"^RestartPreventExitStatus=(.*)", peer, re.MULTILINE) == ["2"]
    assert cli.code_of(ConfigError("wrong")) == 2
    assert cli.code_of(UnreachableError("away for a while")) not in (0, 2)
    assert f"SuccessExitStatus={128 + signal.SIGTERM}" in peer
    stop_s = int(re.search(r"TimeoutStopSec=(\d+)", peer)[1])  # type: ignore[index]
    assert stop_s > 30  # that long the launcher waits for its script
    pods = [one for one in yaml.safe_load_all(MANIFEST.read_text()) if one["kind"] == "Deployment"]
    grace_s = pods[0]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > 30


def test_the_manifest_is_whole() -> None:
    """What kinds need, and that names within it fit each other."""
    found = {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text())}
    assert set(found) == {"Service", "StatefulSet", "Deployment"}
    assert all(one["apiVersion"] and one["metadata"]["name"] for one in found.values())
    service, state = found["Service"], found["StatefulSet"]
    assert state["spec"]["serviceName"] == service["metadata"]["name"]
    assert state["spec"]["replicas"] == 1
    for one in (state, found["Deployment"]):
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"] == labels
        pod = one["spec"]["template"]["spec"]
        claims = one["spec"].get("volumeClaimTemplates", [])
        volumes = {v["name"] for v in pod["volumes"]} | {c["metadata"]["name"] for c in claims}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert service["spec"]["selector"] == state["spec"]["template"]["metadata"]["labels"]


def test_slurm_takes_the_script() -> None:
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-n", str(SLURM)], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = SLURM.read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    asked = [line for line in lines if line.startswith("#SBATCH ")]
    assert len(asked) >= 5
    assert all(line in lines[:first] for line in asked)  # sbatch reads no further
