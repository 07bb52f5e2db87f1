"""The command line: bnonly train | study NAME | figures NAME | claims NAME | report NAME | explore | bench.

A command is a function; its parameters are the options and their comments the help (fastcore.script). It imports only
what it needs, so that help comes at once. A mistake is answered by one sentence: a wrong command or option
ends with status 2, as in any program, and a name or a number that nothing can be done with with status 1.
"""
import inspect
import io
import json as jsons
import os
import re
import sys
import warnings
from argparse import ArgumentParser
from functools import partial

from . import __version__
from .processes import stop_on_signals

_DTYPES = "float32", "bfloat16"


class WrongUse(ValueError):
    "A command or an option that does not exist."


# -------- the commands


def train_command(study: str = "scratch",   # the folder under runs/ that keeps the record
                  device: str = "",         # cpu, cuda, cuda:1, mps; default: the accelerator if there is one
                  dtype: str = "",          # of the convolutions: float32 or bfloat16; default: the faster
                  **fields):
    "Train one run."
    from .experiment import Spec, choose
    spec = Spec(**fields)   # what is wrong is said before the slow imports
    import torch
    from .analysis import analyse
    from .distributed import own_share
    from .train import fit
    record = fit(spec, study, device=usable(device) if device else None,
                 dtype=getattr(torch, choose("dtype", dtype, _DTYPES)) if dtype else None)
    if not own_share()[0] and record["status"] == "complete":   # of several processes, the first does the rest
        analyse(spec, study)


def usable(name: str):
    "A device of this machine; `ValueError` with the nearest where it cannot be used."
    import torch
    from .experiment import choose
    best = [torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []
    choose("device", name.partition(":")[0], ["cpu", *best])
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        why, kind = str(e).splitlines()[0], name.partition(":")[0]
        raise ValueError(f"device {name!r} cannot be used here ({why}); the nearest is {kind!r}.") from None


def study_command(name: str,                     # a section of settings.ini, e.g. demo, short, paper
                  workers: int = 0,              # processes; 0 is one for each core
                  only: str = "",                # part of the study, e.g. 'policy=bn arch=resnet56,resnet110'
                  retry_failed: bool = False,    # take up again what failed or diverged
                  engine: str = "processes",     # processes (of this machine) or ray (a cluster, $RAY_ADDRESS)
                  gpus_per_run: float = 0,       # with ray: GPUs for each run, e.g. 0.2
                  hours: float = 0,              # after which to stop; what comes first in the study is trained first
                  dry_run: bool = False):        # list the runs that are missing and train nothing
    "Train what a study still lacks."
    from .analysis import analyse
    from .experiment import choose, preset, results
    from .pace import StatusLine, clock, expected
    from .sweep import ENGINES, missing, own_cores, retry, select, state, sweep
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"study {name} cannot train each run on several processes; "
                         f"name one run: accelerate launch bnonly train --study {name}.")
    line, specs, run = StatusLine(), select(preset(name), only), ENGINES[choose("engine", engine, ENGINES)]
    if retry_failed and not dry_run:
        for s in specs:
            retry(s, name)
    todo = missing(name, specs)
    time = clock(sum(expected(todo, results())) / min(workers or own_cores(), max(1, len(todo))))
    odd = any(state(s, name) in ("failed", "broken") for s in specs)
    line(f"{name}: {len(todo)} of {len(specs)} runs to train, about {time}" if todo else
         f"{name}: every run is complete{' or has failed' if odd else ''}", end=True)
    if dry_run:
        return print("\n".join(s.key for s in todo))
    run = partial(run, gpus=gpus_per_run) if engine == "ray" else run
    failed = sweep(name, specs, workers, after=analyse, say=line, run=run, hours=hours)
    left = [s for s in missing(name, specs) if s.key not in failed]
    if todo:
        trained = len(todo) - len(left) - len(set(failed) & {s.key for s in todo})
        rest = f", {len(left)} left: the time is over, and the same command goes on" if left else ""
        line(f"{name}: {trained} runs trained, {len(failed)} failed{rest}", end=True)
    tell_failures(name, failed, [s.key for s in specs if state(s, name) == "failed" and s.key not in failed])


def tell_failures(study: str, failed: dict, before: list):
    "Print the tracebacks of runs that failed now (key to traceback), name one that failed before, and end with 1."
    for key, trace in failed.items():
        print(f"\n{key}\n{trace}", file=sys.stderr)
    if before:
        print(f"{study}: {len(before)} runs failed before, {before[0]!r} the first; "
              f"bnonly study {study} --retry-failed takes them up again", file=sys.stderr)
    if failed or before:
        sys.exit(1)


def figures_command(name: str):   # a section of settings.ini, e.g. demo, short, paper
    "Draw every figure of a study."
    from .report import figures
    from .pace import StatusLine
    line = StatusLine()
    line(f"{name}: the figures are in {figures(name, line)}", end=True)


def claims_command(name: str,             # a section of settings.ini, e.g. demo, short, paper
                   json: bool = False):   # print a list of records instead of sentences
    "Print the paper's claims beside what a study measured."
    from .claims import tally
    from .report import claims
    found = claims(name)
    if json:
        return print(found.to_json(orient="records", indent=1, force_ascii=False))
    for r in found.to_dict("records"):
        seeds = f" (n = {r['n']})" if r["n"] else ""
        measured = f"{r['measured']}{seeds}: " if r["measured"] else ""
        needs = f" (needs {r['needs']})" if r["needs"] else ""
        print(f"{r['place']}: {r['claim']}: {r['paper']} in the paper; {measured}{r['verdict']}{needs}")
    print(f"\n{tally(found)}")


def report_command(name: str):   # a section of settings.ini, e.g. demo, short, paper
    "Draw a study's figures and write its report."
    from .report import report
    from .pace import StatusLine
    line = StatusLine()
    line(f"{name}: the report is at {report(name, line)}", end=True)


def explore_command(port: int = 8866):   # of the page on this machine
    "Turn a run over in a browser."
    from .analysis import analyse_study
    from .explorer_page import serve_explorer
    from .pace import StatusLine
    try:
        analyse_study("scratch", StatusLine())   # of a study they are analysed; those trained one by one wait for this
    except (OSError, ValueError, RuntimeError) as e:
        print(f"bnonly: not every run of scratch could be analysed: {e}", file=sys.stderr)
    serve_explorer(port)


def bench_command(archs: str = "resnet14,resnet56,wrn14-4,vgg11",   # networks
                  policies: str = "bn,all,random2",   # what trains
                  open_lth: str = "",      # a checkout of the authors' framework, to time it too
                  before: str = "",        # a checkout of another commit of this package, to time it alone beside ours
                  rounds: int = 4,         # turns of each candidate
                  ideas: bool = False,     # time what each idea gives instead
                  kernels: bool = False,   # time each kernel beside PyTorch's operator instead
                  goals: bool = False,     # time the paper's epochs of whole runs instead, on a GPU
                  steps: bool = False,     # time one thread's steps of many networks instead, which price a study
                  json: bool = False):     # print a JSON line for each row
    "Time a training step beside what one would use instead."
    from .bench import bench, bench_before, bench_goals, bench_ideas, bench_kernels, bench_steps, row_in_words
    say = lambda row: print(jsons.dumps(row) if json else row_in_words(row), flush=True)
    if ideas:
        return bench_ideas(rounds=rounds, say=say)
    for asked, other in ((kernels, bench_kernels), (goals, bench_goals), (steps, bench_steps)):
        if asked:
            return other(say=say)
    if before:
        return bench_before(before, archs.split(","), policies.split(","), rounds, say)
    bench(archs.split(","), policies.split(","), open_lth, rounds, say)


COMMANDS = dict(train=train_command, study=study_command, figures=figures_command, claims=claims_command,
                report=report_command, explore=explore_command, bench=bench_command)

# -------- reading them


def takes(command: str) -> list:
    "What gives a command its options: its function, and for train the spec."
    from .experiment import Spec
    return [*([Spec] if command == "train" else []), COMMANDS[command]]


def options(command: str) -> list[str]:
    "The options of a command, with their dashes."
    found = [p for what in takes(command) for p in inspect.signature(what).parameters.values()]
    return [f"--{p.name.replace('_', '-')}" for p in found if p.kind != p.VAR_KEYWORD and p.default is not p.empty]


def parser(command: str) -> ArgumentParser:
    "What reads the arguments of a command."
    from fastcore.script import anno_parser
    parts = [anno_parser(what) for what in takes(command)]
    return ArgumentParser(f"bnonly {command}", description=COMMANDS[command].__doc__, parents=parts, add_help=False,
                          conflict_handler="resolve", allow_abbrev=False)


def parse_arguments(argv: list) -> tuple[str, dict]:
    "The command and its arguments; `WrongUse` where one of the two does not exist."
    from .experiment import nearest
    command, *rest = argv
    for what, value, known in (("command", command, COMMANDS), *(("option", o.partition("=")[0], options(command))
                               for o in rest if o.startswith("--") and command in COMMANDS)):
        if value not in (*known, "--help"):
            raise WrongUse(f"{what} {value!r} is not one of {', '.join(known)}; "
                           f"the nearest is {nearest(value, known)!r}.")
    args = vars(parser(command).parse_args(rest))
    return command, {k: v for k, v in args.items() if k not in ("pdb", "xtra")}   # fastcore's own


BETWEEN = dict(workers=(0, 10_000), gpus_per_run=(0, 1_000), hours=(0, 10_000), rounds=(1, 10_000))   # least, most


def check_arguments(command: str, args: dict):
    "`ValueError` for a name or a number that nothing can be done with."
    name = args.get("name", args.get("study", "scratch"))
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
        like = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "scratch"
        raise ValueError(f"study {name!r} is not a name of letters, digits, '.', '-' and '_'; the nearest is {like!r}.")
    for option, (low, high) in BETWEEN.items():
        if option in args and not low <= args[option] <= high:
            option, value = option.replace("_", "-"), args[option]
            raise ValueError(f"--{option} {value} is not possible; it must be between {low} and {high}.")
    if os.environ.get("BNONLY_MARCH") and command in ("train", "study", "bench"):
        from .native import march
        march()   # once, and not by every run


HELP = "\n".join(["usage: bnonly COMMAND [OPTIONS]", "", "Train BatchNorm and only BatchNorm: a literate study.", "",
                  *(f"  {name:10}{f.__doc__}" for name, f in COMMANDS.items()), "",
                  "bnonly COMMAND --help lists its options; bnonly --version says which version this is."])
FASTAI = r"(Exception occured in `\w+` when calling event `\w+`:\s*)+"   # what it puts before the message of an error
STOPPED = dict(bench="; a benchmark that is cut off keeps no record; its rows are above", explore="")


def main(argv: list|None = None):
    "Run a command; without `argv` that of the command line."
    if argv is None:
        argv = sys.argv[1:]
        stop_on_signals()
    for stream in (sys.stdout, sys.stderr):   # a locale may lack the ± of a table
        if isinstance(stream, io.TextIOWrapper): stream.reconfigure(errors="replace")
    if not argv or argv[0] in ("-h", "--help", "help"):
        return print(HELP)
    if argv[0] == "--version":
        return print(f"bnonly {__version__}")
    warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", FutureWarning)   # by fastai 2.8
    try:
        command, args = parse_arguments(argv)
        check_arguments(command, args)
        COMMANDS[command](**args)
    except WrongUse as e:
        print(f"bnonly: {e}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as e:
        sys.exit(f"bnonly: {re.sub(FASTAI, '', str(e)) or type(e).__name__}")
    except KeyboardInterrupt:
        kept = "; what was finished is kept, and the same command goes on from there"
        sys.exit(f"\nbnonly: stopped{STOPPED.get(argv[0], kept)}")
