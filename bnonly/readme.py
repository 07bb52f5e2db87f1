"""The parts of the README and the index that follow from other files: `python -m bnonly.readme` writes them.

A part stands between two comments of Markdown that bear its name. The notebooks' table comes from their titles;
results, what the papers say, and speed come from the records in `runs/`, so that no number there is written by hand.
"""
import json
import re
from collections.abc import Callable
from pathlib import Path

from .experiment import parse_arch, root, runs_dir

__all__ = ["README_PARTS", "filled", "readme", "lesson_lines"]

SHOWN_POLICIES = "bn", "bn+output", "output", "random2", "all-affine", "all"
STUDIES = "short", "paper"   # of CIFAR-10
SENTENCES = dict(paper="r14-bn-acc disabled-third clamp01-bn silent-bn",
                 short="deeper wider random2-gap bn-over-output output-little disabled-third silent-bn",
                 mlp="mlp784-over-90 mlp784-95 mlp784-random lenet-bn")   # study to the ids of claims.toml
TIMED_ARCHS = "resnet14", "resnet56"   # whose steps are timed beside others'
TUNED_PEERS = "tuned torch", "compiled torch"   # peers, and what they are called in bfloat16


def table(head: list, rows: list) -> str:
    "A table of Markdown."
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"]*len(head), *rows))


def lesson_lines(folder: Path) -> dict[str, str]:
    "The numbered notebooks of a folder in reading order, name to the line below the title; `ValueError` without one."
    found = {}
    for file in sorted(Path(folder).glob("[0-9][0-9]_*.ipynb")):
        opening = "".join(json.loads(file.read_text("utf-8"))["cells"][0]["source"])
        line = re.match(r"# .+\n+> (.+)", opening)
        if not line: raise ValueError(f"{file.name} does not open with '# title' and a line '> what it is about'.")
        found[file.stem] = line[1].strip()
    return found


def lessons(project: Path, at: str = "nbs/") -> str:   # at: where the links lead
    "The notebooks with what each is about."
    rows = [(f"[{name}]({at}{name}.ipynb)", line) for name, line in lesson_lines(project / "nbs").items()]
    return table(["notebook", "what it is about"], rows)


def results_table(project: Path) -> str:
    "Accuracy of each network and policy of CIFAR-10, by epochs, beside the paper's text."
    import pandas as pd
    from .accuracy import shown
    from .experiment import results, summary
    from .recipes import paper_value, single_recipe
    points = summary(pd.concat([single_recipe(results(study)) for study in STUDIES]))
    points = points[points.bn_init == "uniform"]
    images = {age: " and ".join(sorted(set(rows.images))) for age, rows in points.groupby("epochs")}
    networks = sorted(set(points.arch), key=lambda arch: (parse_arch(arch).width, parse_arch(arch).depth))
    rows = []
    for arch in networks:
        for policy in [p for p in SHOWN_POLICIES if p in set(points[points.arch == arch].policy)]:
            own = points[(points.arch == arch) & (points.policy == policy)]
            cells = {r["epochs"]: shown(r["mean"], r["sd"], r["n"]) for r in own.to_dict("records")}
            said = paper_value(own.iloc[0].to_dict())
            rows.append([arch, policy, *(cells.get(age, "") for age in images), "" if said is None else f"{said:g}"])
    head = ["network", "what trains", *(f"{name}, {age} epochs" for age, name in images.items()),
            "the paper, 160 epochs"]
    return ("Test accuracy (%) at the last epoch, mean ± standard deviation (n), from the records in "
            f"{' and '.join(f'[runs/{s}](runs/{s})' for s in STUDIES)}.\n\n{table(head, rows)}")


def what_papers_say(project: Path) -> str:
    "What the papers say of accuracy, gammas and ReLUs, and what the records say to it."
    from .claims import PAPERS, gather, ledger
    claims, rows = {c.id: c for paper in PAPERS.values() for c in paper}, []
    for study, ids in SENTENCES.items():
        for row in ledger(gather(study), [claims[i] for i in ids.split()]).to_dict("records"):
            rows.append([row["claim"], row["paper"], row["measured"], row["n"], row["verdict"]])
    return table(["what the papers say", "their number", "ours", "n", "verdict"], rows)


def speed_table(project: Path) -> str:
    "Images a second of a training step on a CPU, beside what others reach on the same machine."
    rows = []
    for file in sorted((runs_dir() / "bench").glob("cpu,*.json")):
        record = json.loads(file.read_text("utf-8"))
        machine = record.get("machine", {})
        name = file.stem.split(",")[1].upper().replace("AVX512", "AVX-512").replace("_FP16", ", float16")
        for row in record.get("rows", ()):
            if "peers" not in row or row["arch"] not in TIMED_ARCHS or row["policy"] not in ("bn", "all"): continue
            ratios = {peer: found["ratio"] for peer, found in row["peers"].items()}
            tuned = min((r for peer, r in ratios.items() if peer.startswith(TUNED_PEERS)), default=None)
            others = [f"{r:.1f}" if r else "" for r in (*map(ratios.get, ("open_lth", "fastai", "torch")), tuned)]
            rate = f"{row['images_per_second']:,.0f}"
            rows.append([row["arch"], row["policy"], f"{machine['processor']}, {name}", rate, *others])
    rows.sort(key=lambda row: (parse_arch(row[0]).depth, row[1] != "bn", row[2]))
    head = ["network", "what trains", "processor, instruction set", "images/s", "open_lth", "fastai", "PyTorch, plain",
            "PyTorch, tuned"]
    return table(head, rows)


README_PARTS = {"notebooks": lessons, "results": results_table, "what the papers say": what_papers_say,
                "speed": speed_table}


def marks(name: str) -> tuple:
    "The two comments around a part."
    return f"<!-- {name}, written by python -m bnonly.readme -->", f"<!-- end of {name} -->"


def filled(text: str, name: str, part: str, file: str) -> str:   # file: its name, for the error
    "A text with a part between its two marks; `ValueError` where it has not exactly one pair of them."
    begin, end = marks(name)
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found or begin in rest: raise ValueError(f"{file} needs the lines {begin!r} and {end!r}, once each.")
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"


def readme(project: Path, parts: dict[str, Callable] = README_PARTS) -> dict[Path, str]:
    "The README and the index of a project as they should be: file to text."
    file, index = project / "README.md", project / "nbs/index.ipynb"
    text, notebook = file.read_text("utf-8"), json.loads(index.read_text("utf-8"))
    for name, part in parts.items(): text = filled(text, name, part(project), file.name)
    for cell in notebook["cells"]:
        if marks("notebooks")[0] in (source := "".join(cell["source"])):
            cell["source"] = filled(source, "notebooks", lessons(project, ""), index.name).splitlines(True)
    return {file: text, index: json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"}


if __name__ == "__main__":
    for file, text in readme(root()).items(): file.write_text(text, "utf-8")
