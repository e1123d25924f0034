"""Does SPSA learn? A model pre-trained on Python sources by `decotrain train` meets another text.

Runs: 4 peers that send bytes, the same with float32 scalars in place of the bytes, and 1 peer, each
for the same number of steps; 4 peers and 1 each at several rates, of which the best for a seed
counts when they are compared. All peers of a run hold the same parameters, so one process plays
them all: it measures slot after slot, encodes, and applies the record. (The exchange itself is in
tests/test_spsa_real.py, tests/test_finetune.py and the suite `wan-spsa`.) `z` is the mean fall of
the held-out loss over windows of text, in standard errors. Two runs at a time.

Options (`--set`): steps=2000, samples=4 (of a peer), lr=6e-3 (4 peers), lr_more=3e-3 (4 peers,
bytes only), lr_alone=1.5e-3;3e-3 (1 peer), epsilon=1e-3, batch=4, seeds=2, text=PATH (default: a
made-up language), base=PATH (a run of `decotrain train`; default: one is made, with pretrain=1500
steps), windows=256 (held out), processes=2, keep=FOLDER (what is there of runs with the same
options is not run again: a long suite in pieces).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.common import ROOT, Report, Settings, log
from decotrain.data import Batches, SampleOrder, open_corpus
from decotrain.finetune import base as bases
from decotrain.model import ModelConfig, Transformer, loss_of
from decotrain.spsa import SPSA, code, seedlog
from decotrain.spsa.recipe import Recipe, Term, Update
from decotrain.spsa.record import Record

Kind = tuple[int, str, float, int]  # peers, scalars, rate, seed
CURVE_POINTS = 20
LOG_STEPS = 20_000
DEFAULTS = {
    "steps": "2000", "samples": "4", "lr": "6e-3", "lr_more": "3e-3",
    "lr_alone": "1.5e-3;3e-3", "epsilon": "1e-3", "batch": "4", "seeds": "2",
    "windows": "256", "pretrain": "1500", "processes": "2",
}  # fmt: skip
QUICK = {
    "steps": "4",
    "seeds": "1",
    "pretrain": "30",
    "windows": "4",
    "batch": "2",
    "lr_alone": "3e-3",
    "lr_more": "",
}


def run(settings: Settings) -> Report:
    report = Report("spsa_learning", "What SPSA learns", settings)
    chosen = {**DEFAULTS, **(QUICK if settings.quick else {}), **settings.options}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        chosen.setdefault("text", str(_made_up(place / "text.txt", settings.seed)))
        if "base" not in chosen:
            log("pre-training on Python sources")
            chosen["base"] = str(_pretrain(place, int(chosen["pretrain"])))
        seeds = range(settings.seed, settings.seed + int(chosen["seeds"]))
        rates = [float(rate) for rate in chosen.pop("lr_alone").split(";")]
        more = [float(rate) for rate in chosen.pop("lr_more").split(";") if rate]
        lr = float(chosen.pop("lr"))
        cases = [(4, kind, lr, seed) for seed in seeds for kind in ("byte", "float32")]
        cases += [(4, "byte", rate, seed) for seed in seeds for rate in more]
        cases += [(1, "byte", rate, seed) for seed in seeds for rate in rates]
        with ThreadPoolExecutor(int(chosen["processes"])) as pool:
            done = list(pool.map(lambda case: _in_process(case, chosen), cases))
    for (peers, scalars, rate, seed), result in zip(cases, done, strict=True):
        case = {"peers": peers, "scalars": scalars, "lr": rate, "seed": seed}
        report.add(
            {"what": "run", **case},
            before_nats=result["before"],
            after_nats=result["after"],
            z=result["z"],
            cpu_s=result["cpu_s"],
        )
        for step, loss in result["curve"]:
            line = f"{peers} peers, {scalars}, {rate:g}, seed {seed}"
            report.add({"what": "curve", "step": step, "run": line}, held_out_nats=loss)
    _together(report, cases, done)
    _log_size(report)
    _describe(report, chosen)
    return report


def _together(report: Report, cases: list[Kind], done: list[Any]) -> None:
    """What the runs say side by side: the goals of the suite."""
    after = {case: float(result["after"]) for case, result in zip(cases, done, strict=True)}
    wide = {(rate, seed): nats for (_, kind, rate, seed), nats in after.items() if kind != "byte"}
    same = {(rate, seed): after[4, "byte", rate, seed] for rate, seed in wide}
    seeds = sorted({seed for *_, seed in cases})

    def best(peers: int, seed: int) -> float:
        return min(
            n for (p, kind, _, s), n in after.items() if (p, kind, s) == (peers, "byte", seed)
        )

    report.add(
        {"what": "together"},
        four_below_one_nats=[best(1, seed) - best(4, seed) for seed in seeds],
        byte_above_float32_nats=[same[key] - wide[key] for key in wide],
        between_seeds_nats=max(same.values()) - min(same.values()),
    )


def _log_size(report: Report) -> None:
    """20,000 steps of 4 peers with 4 samples, as they are written."""
    dice = random.Random(1)
    model = Transformer(ModelConfig())
    space = SPSA(model, samples=4)
    header = seedlog.Header(space.recipe, space.space.layout, space.digest())
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.seedlog"
        writer = seedlog.Writer(path, header, sync_every=LOG_STEPS)
        for step in range(LOG_STEPS):
            writer.append(Record(step, {slot: dice.randbytes(4) for slot in range(4)}))
        writer.close()
        size = path.stat().st_size
    case = {"what": "log", "steps": LOG_STEPS, "samples_of_a_step": 16}
    report.add(case, kilobytes=size / 1e3)


def _describe(report: Report, chosen: dict[str, str]) -> None:
    figures = ["before_nats", "after_nats", "z", "cpu_s"]
    report.table("runs", figures, where={"what": "run"}, title="Held-out loss, nats for each byte")
    names = ["four_below_one_nats", "byte_above_float32_nats", "between_seeds_nats"]
    report.table("together", names, where={"what": "together"}, title="Side by side")
    report.table("log", ["kilobytes"], where={"what": "log"}, title="The seed log")
    report.plot("curves", "step", "held_out_nats", lines="run", where={"what": "curve"},
                title="Held-out loss while fine-tuning")  # fmt: skip
    told = {key: value for key, value in chosen.items() if key not in ("text", "base", "keep")}
    report.note((__doc__ or "").split("\n\n")[1].replace("\n", " "))
    report.note(", ".join(f"{key} {value}" for key, value in sorted(told.items())) + ".")


def _made_up(path: Path, seed: int) -> Path:
    """A language nobody speaks: 400 words of syllables, each followed by few others."""
    dice = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(dice.choices(syllables, k=dice.randrange(1, 4))) for _ in range(400)]
    after = {word: dice.sample(words, 6) for word in words}
    text, word = [], words[0]
    for _ in range(150_000):
        word = dice.choice(after[word])
        text.append(word + dice.choices([" ", ", ", ".\n"], [12, 2, 1])[0])
    path.write_text("".join(text))
    return path


def _pretrain(place: Path, steps: int) -> Path:
    words = [f"folder={place / 'runs'}", "name=base", "model=tiny", "peers=2", f"steps={steps}",
             "outer.sync_every=30"]  # fmt: skip
    command = [sys.executable, "-m", "decotrain.cli", "train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pre-training failed:\n{done.stdout}{done.stderr}")
    return place / "runs" / "base"


def _in_process(case: Kind, chosen: dict[str, str]) -> dict[str, Any]:
    unlike = ("seeds", "processes", "keep")  # what a run by itself does not depend on
    text = json.dumps([*case, {k: v for k, v in sorted(chosen.items()) if k not in unlike}])
    kept = Path(chosen["keep"]) / f"{_name(text)}.json" if "keep" in chosen else None
    if kept is not None and kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    command = [sys.executable, "-c", f"import bench.spsa_learning as b; b.one({text!r})"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    log(f"{case} done")
    result: dict[str, Any] = json.loads(done.stdout)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout)
    return result


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- one run, in a process of its own


def one(text: str) -> None:
    """Prints what came of a run as JSON."""
    peers, scalars, rate, seed, chosen = json.loads(text)
    torch.set_num_threads(1)
    base = bases.find(chosen["base"])
    assert base.shapes is not None
    model = Transformer(ModelConfig(**base.shapes)).eval()
    bases.load(model, base.file)
    context, batch, steps = model.config.context, int(chosen["batch"]), int(chosen["steps"])
    corpus = open_corpus(chosen["text"], context)
    order = SampleOrder(len(corpus.train), context, seed)
    batches = Batches(corpus, order, context, batch)
    held_out = torch.from_numpy(corpus.held_out_windows(int(chosen["windows"]), context))
    recipe = Recipe(
        lr=rate, epsilon=float(chosen["epsilon"]), samples=int(chosen["samples"]),
        seed=seed,
    )  # fmt: skip
    spsa = SPSA(model, recipe=recipe)
    before = _by_window(model, held_out)
    curve = [(0, float(before.mean()))]
    every = max(1, steps // CURVE_POINTS)
    for step in range(steps):
        measured = {}
        for slot in range(peers):
            windows = torch.from_numpy(batches.at(step, slot))
            _, measured[slot] = spsa.measure(step, lambda w=windows: loss_of(model, w), slot)
        spsa.apply([_update(recipe, step, measured, scalars)], step)
        if (step + 1) % every == 0:
            curve.append((step + 1, float(_by_window(model, held_out).mean())))
    fall = before - _by_window(model, held_out)
    result = {
        "before": float(before.mean()),
        "after": float((before - fall).mean()),
        "z": float(fall.mean() / fall.std() * math.sqrt(len(fall))),
        "curve": curve,
        "cpu_s": sum(os.times()[:2]),
    }
    print(json.dumps(result))


def _update(recipe: Recipe, step: int, measured: dict[int, list[float]], scalars: str) -> Update:
    """The record of a step; or the same with every scalar as it was measured."""
    update = recipe.update(step, {slot: code.encode(values) for slot, values in measured.items()})
    if scalars == "byte":
        return update
    by_words = {
        code.stream(step, slot, sample): value
        for slot, values in measured.items()
        for sample, value in enumerate(values)
    }
    terms = tuple(Term(term.c2, term.c3, by_words[term.c2, term.c3]) for term in update.terms)
    return Update(terms, update.rate, update.decay, update.counted)


@torch.no_grad()
def _by_window(model: Transformer, windows: torch.Tensor) -> torch.Tensor:
    """Nats for each byte, window by window."""
    scores = model(windows[:, :-1])
    losses = F.cross_entropy(scores.transpose(1, 2), windows[:, 1:], reduction="none")
    return losses.mean(1)
