"""The command line: `decotrain train`, `finetune`, `run` and others; operate.py has the rest.

Imports neither torch nor hydra before they are needed: help, a coordinator and an error about bad
input are there at once. Whatever the user did wrong is one line on stderr and exit code 2; that
nobody answers at an address is one with exit code 3, since trying again may help.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from decotrain import __version__, operate
from decotrain.errors import ConfigError, Error, RefusedError, UnreachableError
from decotrain.shipped import configs

HELP = """\
decotrain: train one model on machines that share nothing but the internet

  decotrain train [key=value ...]      several peers on this machine train a model on a text
  decotrain finetune base=PATH ...     several peers fine-tune a model, one byte for each sample
  decotrain compare RUN ...            runs or sweeps side by side: a table and a picture
  decotrain plan key=value ...         which outer optimizer keeps peers busy on given links
  decotrain run --join HOST:PORT script.py ...
                                       a script on this machine as one peer of a run
  decotrain coordinator --listen HOST:PORT
                                       the process that decides who is in a run
  decotrain status HOST:PORT           who is in, and how they are
  decotrain leave HOST:PORT PEER       asks a peer to leave in order
  decotrain doctor [HOST:PORT]         what stands in the way, and what to do about it
  decotrain kick HOST:PORT PEER        leaves a peer out
  decotrain token new                  the secret that keeps strangers out of a run
  decotrain replay BASE LOG -o OUT     a base model and a seed log become the tuned model
  decotrain seedlog show LOG           what a seed log holds
  decotrain --version

`decotrain COMMAND --help` says more.
"""

TRAIN_HELP = """\
decotrain train [-m] [key=value ...]

Starts a coordinator and some peers on this machine. Together they train one byte-level language
model, and exchange what they learned only now and then. Any peer may be killed: the others go on.

  decotrain train                                      3 peers, Python's own sources as text
  decotrain train peers=4 outer.sync_every=50          other numbers
  decotrain train data.path=/some/folder               any text file, folder or glob
  decotrain train baseline=true                        compare with one peer alone
  decotrain train name=first resume=auto               go on from the newest checkpoint
  decotrain train join=HOST:29400                      one more peer of a run elsewhere
  decotrain train -m outer.lr=0.4,0.7                  a sweep: one run for each value
  decotrain train --cfg job                            show the configuration and stop

Keys (hydra syntax; groups are chosen by name, e.g. model=tiny, codec=int8):
"""
FINETUNE_HELP = """\
decotrain finetune [-m] base=PATH [key=value ...]

Several peers fine-tune one model with forward passes only, and send one byte for each sample. What
comes out is the base and a seed log of kilobytes. Any peer may be killed: the others go on.

  decotrain finetune base=runs/first data.path=poems.txt     what `decotrain train` made
  decotrain finetune base=runs/first task=classify data.path=reviews.jsonl
  decotrain finetune base=model.safetensors factory=my_model:make context=256 data.path=poems.txt
  decotrain finetune base=runs/first name=poems resume=auto  go on where its longest seed log ends
  decotrain finetune base=runs/first name=poems join=203.0.113.7:29400
                                                             join the run of another machine

Keys (hydra syntax):
"""
FLAGS = {"-m": 0, "--multirun": 0, "--resolve": 0, "--cfg": 1, "-c": 1, "--config-dir": 1, "-cd": 1}
JOBS = {"train": TRAIN_HELP, "finetune": FINETUNE_HELP}
MESSAGE_MAX = 400
UNREACHABLE = 3  # exit code: nobody answers there, or the name does not resolve (yet)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": lambda rest: _by_hydra("train", rest),
        "finetune": lambda rest: _by_hydra("finetune", rest),
        "plan": plan,
        "compare": compare,
        "run": run,
        "coordinator": operate.coordinator,
        "status": operate.status,
        "leave": operate.leave,
        "doctor": doctor,
        "kick": operate.kick,
        "token": operate.token,
        "replay": lambda rest: _seeds(["replay", *rest]),
        "seedlog": lambda rest: _seeds(["seedlog", *rest]),
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        print(f"decotrain {__version__}")
        return 0
    try:
        if words[0] not in commands:
            raise ConfigError(
                f"unknown command {words[0]!r}; there are {', '.join(commands)} (decotrain --help)"
            )
        code = commands[words[0]](words[1:])
        sys.stdout.flush()  # here, where a reader that has gone is no traceback
        return code
    except Error as error:
        return _fail(error, code_of(error))
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor fail at the exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 130


def run(words: list[str]) -> int:
    """A script as one peer of a run."""
    from decotrain.launch.options import parse

    options = parse(words)
    try:
        from decotrain.launch.peer import Peer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed, and `decotrain run` needs it: pip install torch"
        ) from None
    return Peer(options).run()


def _seeds(words: list[str]) -> int:
    from decotrain.spsa import commands  # imports torch

    return commands.main(words)


def code_of(error: Error) -> int:
    """The exit code of an error before anything is started."""
    return UNREACHABLE if isinstance(error, UnreachableError) else 2


def _fail(error: Exception, code: int) -> int:
    print(f"decotrain: {_one_line(str(error))}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    """A message without its second thoughts: hydra's run over many lines."""
    text = re.split(r"\n\s*(?:full_key|Config search path|To append)|\nSee https?://", text)[0]
    text = text.removeprefix("decotrain: ")
    if found := re.match(r"Could not override '(.+)'\.$", text.strip()):
        texts = [path.read_text(encoding="utf-8") for path in configs().glob("*.yaml")]
        keys = re.findall(r"^(\w+):", "\n".join(texts), re.MULTILINE)
        near = [f" (did you mean {key}?)" for key in get_close_matches(found[1], keys, 1)]
        own = found[1].removeprefix("outer.")
        more = f", +outer.own.{own}= is for a function of your own" if own != found[1] else ""
        return f"unknown key {found[1]}{''.join(near)}; --help lists the keys{more}"
    if found := re.match(r"In '\w+': Could not find 'outer/(\w[\w.]*:\w+)'", text.strip()):
        return f"outer={found[1]}: a function of your own is outer.preset={found[1]}"
    if found := re.match(r"Error parsing override '(.+?)'\s+missing EQUAL", text.strip()):
        return f"{found[1]!r} is no KEY=VALUE; --help lists the keys"
    if found := re.match(r"In '\w+': Could not find 'codec/(.+)'", text.strip()):
        from decotrain import codecs

        try:  # a pair that no file in configs/codec has is for hydra to explain
            codecs.pair(found[1])
        except ConfigError as error:
            return str(error)
    line = re.sub(r"\s*\n\s*", "; ", text.strip()).replace(":;", ":")
    return line if len(line) <= MESSAGE_MAX else line[:MESSAGE_MAX] + " ..."


# --- train: by way of hydra


def _by_hydra(command: str, words: list[str]) -> int:
    """hydra composes the configuration; each job of a sweep is a run of its own, in sequence."""
    if any(word in ("-h", "--help") for word in words):
        text = (configs() / f"{command}.yaml").read_text(encoding="utf-8")
        print(JOBS[command] + "\n" + text, end="")
        return 0
    words = _flags_first(words)
    try:
        import hydra
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install decotrain") from error
    codes: list[int] = []

    def job(config: Any) -> None:
        try:
            code = _launch(command, config)
        except Error as error:  # else hydra would wrap it, and go on with the sweep
            wrong = ConfigError | RefusedError | UnreachableError  # as before anything is started
            code = code_of(error) if isinstance(error, wrong) else 1
            raise SystemExit(_fail(error, code)) from None
        codes.append(code)
        if code:
            raise SystemExit(code)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing several lines
    sys.argv = [f"decotrain {command}", *words]
    try:
        hydra.main(version_base="1.3", config_path=str(configs()), config_name=command)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(f"{where}{error.strerror}; choose another folder") from error
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    return max(codes, default=0)


def _flags_first(words: list[str]) -> list[str]:
    """hydra takes `a=1 b=2 -m`, but not `a=1 -m b=2`."""
    flags, rest, left = [], [], iter(words)
    for word in left:
        if not word.startswith("-"):
            rest.append(word)
            continue
        name = word.partition("=")[0]
        if name not in FLAGS:
            raise ConfigError(f"unknown option {word}; there are {', '.join(sorted(FLAGS))}")
        flags.append(word)
        if FLAGS[name] and "=" not in word:
            flags += [value for value in [next(left, None)] if value is not None]
            if flags[-1] == word:
                raise ConfigError(f"{word} needs a value, for example --cfg job")
    if {"-m", "--multirun"} & set(flags) and {"-c", "--cfg"} & {
        flag.partition("=")[0] for flag in flags
    }:
        raise ConfigError("a sweep has one configuration for each job: show one without -m")
    return flags + rest


def _launch(command: str, config: Any) -> int:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from decotrain.train.launcher import Launcher, newest_run

    kind = _job_of(command)
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    composed = {str(key): value for key, value in container.items()}
    made = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)
    try:
        named = {override.partition("=")[0] for override in overrides}
        if composed["join"] and "peers" not in named:
            composed["peers"] = 1  # one machine of several
        job, folder = kind.of(composed, overrides), made
        if job.resume and "name" not in named:
            place = Path(str(composed["folder"])).expanduser().absolute()
            found = newest_run(place, kind.saved_as)
            if found is not None:
                job, folder = kind.of({**composed, "name": found.name}), found
        return Launcher(job, folder, overrides).run()
    finally:
        if made.is_dir() and not any(made.iterdir()):
            made.rmdir()  # hydra made it, for a run that was not to be


def _job_of(command: str) -> Any:
    from decotrain.finetune.job import FinetuneJob
    from decotrain.train.job import TrainJob

    return {job.command: job for job in (TrainJob, FinetuneJob)}[command]


# --- plan, compare


def doctor(words: list[str]) -> int:
    from decotrain.doctor import main

    return main(words)


def plan(words: list[str]) -> int:
    from decotrain.plan import main

    return main(words)


def compare(words: list[str]) -> int:
    from decotrain.train.compare import main  # imports torch for TensorBoard, after the table

    return main(words)


if __name__ == "__main__":
    sys.exit(main())
