"""Write results/README.md and the tables in docs from the JSON files of runs, so that no figure is typed by hand.

python scripts/render_results.py
"""

import importlib.util
import json
import re
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parents[1] / "results"
INDEX = HERE.parent / "docs" / "methods" / "README.md"
PLUGINS = HERE.parent / "docs" / "context"
HEAD = """# Results

One file per run, as written by `inbatch` (`result.json` of the run directory): command, recipe,
versions, hardware, commit, curve, figures with their protocol, speed and memory. Poor results are
kept, too. `python scripts/render_results.py` writes this page, and a test compares it with the files.

CIFAR-10 is a JPEG copy, re-encoded at a quality of about 75, so accuracies are slightly lower than
those on the original files.

| run | k-NN untrained | k-NN | linear | NMI / ACC / ARI | images/s | training min | all min | peak GB | on |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(path: Path) -> str:
    """Return the line of a run: figures in percent, k-NN with its k."""
    run = json.loads(path.read_text())
    found, recipe, where = run["evaluation"], run["recipe"], run["environment"]
    clusters = " / ".join(f"{100 * found['clustering'][key]:.1f}" for key in ("nmi", "acc", "ari"))
    cells = [
        f"[{path.stem}]({path.name}): {recipe['method']['name']}, {recipe['encoder']['name']}, "
        f"{run['images']:,} images, {passes(run)}, batch {recipe['batch_size']}, seed {recipe['seed']}",
        f"{100 * run['curve'][0]['knn']:.1f}",
        f"{100 * found['knn']['top1']:.1f} (k {found['knn']['k']})",
        f"{100 * found['linear']['top1']:.1f}",
        clusters,
        f"{run['images_per_second']:,.0f}",
        f"{run['training_seconds'] / 60:.1f}",
        f"{run['wall_seconds'] / 60:.1f}" if "wall_seconds" in run else "",
        f"{run['peak_memory_bytes'] / 1e9:.1f}",
        f"{where['threads']} threads, {where['processor']}" if where["device"] == "cpu" else where["device"],
    ]
    return f"| {' | '.join(cells)} |"


def passes(run: dict[str, Any]) -> str:
    """Return the number of passes over the images; with a budget it follows from the steps, not from the epochs."""
    recipe = run["recipe"]
    if recipe.get("budget") is None:
        return f"{recipe['epochs']} epochs"
    return f"{run['steps'] * recipe['batch_size'] / run['images']:.1f} passes"


def page() -> str:
    """Return the whole page; the table contains results of runs only."""
    runs = [path for path in sorted(HERE.glob("*.json")) if "curve" in json.loads(path.read_text())]
    return HEAD + "\n".join(row(path) for path in runs) + "\n"


def spread(values: list[float], digits: int = 1) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(entries: dict[str, Any]) -> str:
    """Return mean and spread over the seeds of every entry, in percent, seconds of training and gigabytes."""
    lines = [
        "| method | k-NN | linear | NMI | ACC | ARI | head's NMI / ACC | training s, fastest seed | peak GB |",
        "| --- |" + " --- |" * 8,
    ]
    for name, entry in entries.items():
        runs: list[dict[str, Any]] = entry["runs"]
        found = [run["evaluation"] for run in runs]
        cells = [spread([100 * one[protocol]["top1"] for one in found]) for protocol in ("knn", "linear")]
        cells += [spread([100 * one["clustering"][key] for one in found]) for key in ("nmi", "acc", "ari")]
        if "head" in found[0]:
            cells.append(" / ".join(spread([100 * one["head"][key] for one in found]) for key in ("nmi", "acc")))
        else:
            cells.append("")
        if "training_seconds" in runs[0]:
            cells.append(f"{min(run['training_seconds'] for run in runs):.0f}")  # other work only makes it longer
            cells.append(spread([run["peak_memory_bytes"] / 1e9 for run in runs], 2))
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def rows(file: Path, method: str | None = None) -> str:
    """Return the table of a file that measure_methods.py wrote: all methods, or one and the untrained encoder."""
    entries = json.loads(file.read_text())
    chosen = {
        name: entry for name, entry in entries.items()
        if method is None or "recipe" not in entry or entry["recipe"]["method"]["name"] == method
    }  # fmt: skip
    return table(chosen)


def written(page: Path) -> str:
    """Return a page of docs/methods with new tables between its markers: of all methods, or of one."""
    text = page.read_text()
    for file in sorted((HERE / "methods").glob("*.json")):
        new = rows(file, None if page == INDEX else page.stem)
        pattern = rf"(<!-- {file.stem} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, new=new: match[1] + new + match[2], text, flags=re.S)
    return text


def baseline(question: str, name: str) -> tuple[str, str]:
    """Return the question and the name of the entry without the plug-in."""
    return {
        "fusion": ("fusion", f"{name.partition(',')[0]}, off"),
        "defaults": ("fusion", "simclr, conv"),
        "crops": ("crops", "default"),
        "curation": ("crops", "default"),
        "attention": ("attention", "none"),
    }[question]


def compared(found: dict[str, Any], question: str) -> str:
    """Return every entry of a question with its difference from the baseline, at equal seeds."""
    lines = [
        "| | k-NN | against without, same seeds | linear | NMI | group identified (chance) |",
        "| --- |" + " --- |" * 5,
    ]
    names, first = list(found[question]), {baseline(question, name) for name in found[question]}
    outside = [(q, name) for q, name in sorted(first) if q != question]
    for q, name in [*outside, *((question, name) for name in names)]:
        plain, runs = found[baseline(question, name)[0]][baseline(question, name)[1]], found[q][name]["runs"]
        knn = [100 * run["evaluation"]["knn"]["top1"] for run in runs]
        own = [100 * run["evaluation"]["knn"]["top1"] for run in plain["runs"]]
        leaks = [run["leak"] for run in runs if run.get("leak")]
        cells = [
            spread(knn),
            "" if plain is found[q][name] else spread([a - b for a, b in zip(knn, own, strict=True)]),
            spread([100 * run["evaluation"]["linear"]["top1"] for run in runs]),
            spread([100 * run["evaluation"]["clustering"]["nmi"] for run in runs]),
            f"{100 * mean(x['leak'] for x in leaks):.0f} ({100 * leaks[0]['leak_chance']:.0f})" if leaks else "",
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def costs(found: dict[str, Any]) -> str:
    """Return the cost of plug-ins from a file that benchmarks/context.py wrote, for one size of the images."""
    lines = ["| | ms a step | ratio | MB | ratio | |", "| --- |" + " --- |" * 5]
    (rows,) = found["sizes"].values()
    plain = rows["simclr"]
    for name, row in rows.items():
        key = "peak_bytes" if "peak_bytes" in row else "kept_bytes"
        c = row.get("curate")
        note = f"{100 * c['violating_before']:.0f} % violate, {c['redrawn']:.2f} redraws a sample" if c else ""
        cells = [f"{1e3 * row['seconds']:,.0f}", f"{row['ratio']:.2f}", f"{row[key] / 1e6:,.0f}"]
        lines.append(f"| {' | '.join([name, *cells, f'{row[key] / plain[key]:.2f}', note])} |")
    return "\n".join(lines) + "\n"


def leaks(found: dict[str, Any]) -> str:
    """Return how often one embedding identifies its context group, before and after training."""
    lines = ["| | before training | after an epoch | chance |", "| --- | --- | --- | --- |"]
    for name, runs in found["entries"].items():
        cells = [spread([100 * run[when]["leak"] for run in runs]) for when in ("before", "after")]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * runs[0]['after']['leak_chance']:.1f} |")
    return "\n".join(lines) + "\n"


def defaults(found: dict[str, Any]) -> str:
    """Return a table of variants of batch fusion."""
    lines = ["| settings | k-NN | against the second line, same seeds | linear |", "| --- | --- | --- | --- |"]
    base = [run["knn"] for run in found["entries"]["fuse.name=conv"]["runs"]]
    for name, entry in found["entries"].items():
        knn, linear = ([100 * run[key] for run in entry["runs"]] for key in ("knn", "linear"))
        against = spread([a - 100 * b for a, b in zip(knn, base, strict=True)]) if name != "fuse.name=conv" else ""
        lines.append(f"| `{name}` | {spread(knn)} | {against} | {spread(linear)} |")
    return "\n".join(lines) + "\n"


def mixing(found: dict[str, Any]) -> str:
    """Return k-NN and linear accuracy for each rule of mixing, and the differences at the same seeds."""
    lines = ["| | k-NN | against without, same seeds | linear | against without | processor seconds |"]
    lines.append("| --- |" + " --- |" * 5)
    plain = found["entries"]["off"]["runs"]
    for name, entry in found["entries"].items():
        cells = []
        for key in ("knn", "linear"):
            own, base = ([100 * run[key] for run in runs] for runs in (entry["runs"], plain))
            against = spread([a - b for a, b in zip(own, base, strict=True)]) if entry["runs"] is not plain else ""
            cells += [spread(own), against]
        cells.append(f"{mean(run['cpu_seconds'] for run in entry['runs']):.0f}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def answered(page: Path) -> str:
    """Return a page of docs/context with new tables between its markers, such as <!-- cifar fusion -->."""
    text = page.read_text()
    for file in sorted(HERE.glob("context-cost-*.json")):
        text = filled(text, file.stem, costs(json.loads(file.read_text())))
    for name, make in (("fusion-defaults", defaults), ("leak", leaks), ("mixing-digits", mixing)):
        text = filled(text, name, make(json.loads((HERE / f"{name}.json").read_text())))
    for file in sorted((HERE / "plugins").glob("*.json")):
        found = json.loads(file.read_text())
        for question in (q for q in found if q != "untrained encoder"):
            text = filled(text, f"{file.stem} {question}", compared(found, question))
        knn = spread([100 * run["evaluation"]["knn"]["top1"] for run in found["untrained encoder"]["runs"]])
        text = re.sub(rf"(<!-- {file.stem} untrained -->).*?(<!-- end -->)", rf"\g<1>{knn}\2", text)
    return text


def benchmark() -> ModuleType:
    """Return the module benchmarks/losses.py, which formats the rows of its tables."""
    spec = importlib.util.spec_from_file_location("losses", HERE.parent / "benchmarks" / "losses.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(found: dict[str, Any]) -> dict[str, str]:
    """Return parts of a page from a file of benchmarks/losses.py: machine, NT-Xent by library, summary of losses."""
    words, env = benchmark(), found["environment"]
    best = max(found["ceilings"], key=lambda one: one["gflops"])
    every = {(loss, int(n)): block for loss, blocks in found["losses"].items() for n, block in blocks.items()}
    detailed = [cells for (loss, n), b in every.items() if loss == "nt_xent" for cells in words.details(n, b)]
    short = [words.summary(loss, n, block) for (loss, n), block in every.items()]
    libraries = [(who, found["versions"].get(who, {}).get(who)) for who in words.PEERS]
    libraries = [("torch", env["versions"]["torch"]), *libraries]
    versions = ", ".join(f"{name} {number}" for name, number in libraries if number)
    commands = ", ".join(f"`{command}`" for command in found["commands"])
    reached = f"torch's own reach {best['plain']:,.0f}, oneDNN's {best['onednn']:,.0f}"
    where = (
        f"{env['processor']}, {env['threads']} of {env['cores']} cores, {versions}. Ceiling: {best['gflops']:,.0f} "
        f"GFLOP/s of float32 products ({reached}). {commands}\n"
    )

    def lines(heads: tuple[str, ...], rows: list[Any]) -> str:
        table = [heads, ["---"] * len(heads), *rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in table)

    return {"where": where, "nt_xent": lines(words.DETAILS, detailed), "all": lines(words.SUMMARY, short)}


def filled(text: str, name: str, new: str) -> str:
    """Return a page with new text between <!-- name --> and <!-- end -->."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda match: match[1] + new + match[2], text, flags=re.S)


def timed(page: Path) -> str:
    """Return a page with the cost of losses between its markers, such as <!-- losses-1thread nt_xent -->."""
    text = page.read_text()
    for file in sorted(HERE.glob("losses-*thread*.json")):
        for name, new in losses(json.loads(file.read_text())).items():
            text = filled(text, f"{file.stem} {name}", new)
    return text


def cards(found: dict[str, Any]) -> str:
    """Return the largest context per card, as computed by benchmarks/context_memory.py."""
    names = [f"{card} GB" for card in found["cards"]]
    lines = [f"| | MB a sample | GB fixed | {' | '.join(names)} |", "| --- |" + " --- |" * (2 + len(names))]
    for name, row in found["entries"].items():
        cells = [f"{row['per_sample'] / 1e6:,.1f}", f"{(row['fixed'] + row['rows']) / 1e9:.2f}"]
        cells += [f"{min(row['contexts'][str(card)], found['batch']):,}" for card in found["cards"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def grouped(found: dict[str, Any]) -> dict[str, str]:
    """Return the tables of benchmarks/large_batch.py: steps of one large batch, and the cost of groups."""
    one = found["steps"]
    lines = ["| step | loss | literal | seconds |", "| --- | --- | --- | --- |"]
    for i, s in enumerate(one["steps"]):
        lines.append(f"| {i + 1} | {s['loss']:.6f} | {s['literal']:.6f} | {s['seconds']:.0f} |")
    most = f"\nMost memory of the process, Python and the images included: {one['peak_process_bytes'] / 1e9:.2f} GB.\n"
    cost = ["| | images/s, one group | images/s, groups | times the time |", "| --- | --- | --- | --- |"]
    for method, told in found["cost"].items():
        cells = [f"{told[key]:.1f}" for key in ("images_per_second", "images_per_second_in_groups")]
        name = f"{method}, {told['groups']} groups of {told['context']}"
        cost.append(f"| {name} | {' | '.join(cells)} | {told['ratio']:.2f} |")
    return {"large-batch steps": "\n".join(lines) + "\n" + most, "large-batch cost": "\n".join(cost) + "\n"}


def scaled(found: dict[str, Any]) -> dict[str, str]:
    """Return the tables of benchmarks/scaling.py: many ranks computed, few measured."""
    heads = ["encoder", "ranks", "batch", "encoder s", "loss s", "sent MB: gathered", "own rows"]
    heads += ["network s: gathered", "own rows", "rows MB: gathered", "own rows", "state MB: whole", "`--shard`"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for s in found["paper"]:
        cells = [s["encoder"], f"{s['ranks']:,}", f"{s['batch']:,}"]
        cells += [f"{s[key]:.2g}" for key in ("encoder_seconds", "loss_seconds")]
        cells += [f"{(s[key] + s['gradient_bytes']) / 1e6:,.0f}" for key in ("gathered_bytes", "own_bytes")]
        cells += [f"{s[key]:.2g}" for key in ("gathered_network_seconds", "own_network_seconds")]
        held = ("gathered_held_bytes", "own_held_bytes", "state_bytes", "sharded_state_bytes")
        cells += [f"{x:,.0f}" if (x := s[key] / 1e6) >= 10 else f"{x:.2g}" for key in held]
        lines.append(f"| {' | '.join(cells)} |")
    cases = ["| rows | ranks | ms | times faster | added over ranks, MB | on paper |", "| --- |" + " --- |" * 5]
    for c in found["cases"]:
        cells = [f"{c['rows']:,}", str(c["ranks"]), f"{1e3 * c['seconds']:.0f}", f"{c['times_faster']:.2f}"]
        cells += [f"{c[key] / 1e6:.2f}" for key in ("added_bytes", "added_on_paper")]
        cases.append(f"| {' | '.join(cells)} |")
    even = [f"{n / 1e6:.1f} million rows with {name.replace(',', ' at')}" for name, n in found["even_rows"].items()]
    said = f"They cost the same at {' and '.join(even)}.\n"
    return {"scaling paper": "\n".join(lines) + "\n", "scaling cases": "\n".join(cases) + "\n", "scaling even": said}


def passed(found: dict[str, Any]) -> dict[str, str]:
    """Return the tables of benchmarks/ring.py: gathered rows and own rows that pass from rank to rank."""
    ways = ("gathered", "own rows")
    heads = ["ranks", "rows", "way", "processor ms of a rank", "extra MB", "sent MB", "on paper"]
    cases = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for c in (found["memory"], found["time"], *found["volume"]):
        for way in ways:
            one = c[way]
            cells = [str(c["ranks"]), f"{c['rows']:,}", way, f"{1e3 * one['processor']:,.0f}",
                     *(f"{one[key] / 1e6:.{digits}f}" for key, digits in
                       (("bytes", 0), ("sent", 2), ("sent_on_paper", 2)))]  # fmt: skip
            cases.append(f"| {' | '.join(cells)} |")
    lines = [
        "| ranks | rows | gathered: MB sent | rows held | own rows: MB sent | rows held |",
        "| --- |" + " --- |" * 5,
    ]
    for s in found["paper"]:
        cells = [f"{s[way]['sent_bytes'] / 1e6:,.0f} | {s[way]['rows']:,.0f}" for way in ways]
        lines.append(f"| {s['ranks']:,} | {s['rows']:,} | {' | '.join(cells)} |")
    ratio = found["ratios"]
    most = (
        f"Extra memory of own rows over that of gathered ones: {ratio['memory']:.2f} "
        f"({found['memory']['ranks']} ranks, {found['memory']['rows']:,} rows). Elapsed time of "
        f"{found['time']['ranks']} ranks over that of one process, {found['time']['rows']:,} rows, in turn in the same "
        "processes: "
        f"{ratio['seconds, own rows']:.2f} (gathered {ratio['seconds, gathered']:.2f}); of as much work for each "
        f"process that exchanges nothing: {ratio['seconds, separate']:.2f}. Processor time of a rank over that of one "
        f"process: {ratio['processor, own rows']:.2f} (gathered {ratio['processor, gathered']:.2f}, separate "
        f"{ratio['processor, separate']:.2f}). "
        f"Load of the machine during these two: {found['load']['memory'][0]:.0f} and {found['load']['time'][0]:.0f}.\n"
    )
    return {"ring cases": "\n".join(cases) + "\n", "ring paper": "\n".join(lines) + "\n", "ring ratios": most}


def fitted(page: Path) -> str:
    """Return a page with these tables between their markers, such as <!-- context-memory -->."""
    text = page.read_text()
    made = {
        "context-memory": lambda found: {"context-memory": cards(found)},
        "large-batch": grouped,
        "scaling": scaled,
        "ring": passed,
    }
    for file, tables in made.items():
        for name, new in tables(json.loads((HERE / f"{file}.json").read_text())).items():
            text = filled(text, name, new)
    return text


def measured(page: Path) -> str:
    """Return a page with the results of `inbatch bench`, benchmarks/training.py and profile_step.py."""
    from inbatch.apps.bench.report import texts

    text = page.read_text()
    for file in sorted(HERE.glob("*.json")):
        for name, new in texts(file.stem, json.loads(file.read_text())).items():
            text = filled(text, name, new)
    return filled(text, "profile", profiled(json.loads((HERE / "profile.json").read_text())))


def profiled(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/profile_step.py: time of a step by part, in percent."""
    parts = dict.fromkeys(part for case in found["cases"].values() for part in case["parts"])
    names = [part for part in parts if part != "framework"]
    lines = [f"| | ms a step | {' | '.join(names)} | framework |", "| --- |" + " --- |" * (len(names) + 2)]
    for name, case in found["cases"].items():
        shares = [case["parts"].get(part, 0.0) / case["seconds"] for part in (*names, "framework")]
        cells = [f"{1e3 * case['seconds']:,.0f}", *(f"{share:.1%}" if share else "" for share in shares)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n`{found['command']}`, medians of {case['steps']} steps.\n"


def million(page: Path) -> str:
    """Return a page with the results of benchmarks/million.py between <!-- million --> and <!-- end -->."""
    found = json.loads((HERE / "million.json").read_text())
    env, epoch = found["environment"], found["epoch"]
    lines = [f"| {found['images']:,} files | seconds | MB held | MB at most |", "| --- |" + " --- |" * 3]
    for name, words in (("scan", "scanned"), ("from_cache", "scanned again, from the cache")):
        row = found[name]
        cells = [f"{row['seconds']:.1f}", f"{row['held_bytes'] / 1e6:.0f}", f"{row['peak_bytes'] / 1e6:.0f}"]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    for name, seconds in found["first_step_seconds"].items():
        lines.append(f"| from `inbatch pretrain` to the end of the first step, {name} | {seconds:.0f} | | |")
    lines += ["", "| images streamed | MB of its own, each worker | MB in proportion |", "| --- | --- | --- |"]
    some = epoch["points"]
    for images, *memory in (some[round(i * (len(some) - 1) / 4)] for i in range(5)):
        cells = [", ".join(f"{size / 1e6:.1f}" for size in sizes) for sizes in memory]
        lines.append(f"| {images:,} | {' | '.join(cells)} |")
    slopes = " and ".join(f"{slope / 1e6:.2f}" for slope in epoch["bytes_per_million_images"])
    rate = f"{epoch['images']:,} were streamed, at {epoch['images'] / epoch['seconds']:,.0f} images/s"
    lines += ["", f"From a tenth of the epoch on the workers grow by {slopes} MB in a million images ({rate})."]
    lines += [f"{env['processor']}, {env['cores']} cores, kept busy by others."]
    return filled(page.read_text(), "million", "\n".join(lines) + "\n")


def sharded(page: Path) -> str:
    """Return a page with the results of benchmarks/shards.py between <!-- shards --> and <!-- end -->."""
    found = json.loads((HERE / "shards.json").read_text())
    env, (low, high) = found["environment"], found["sizes"]
    lines = ["| read | images of an epoch | different ones | images/s | MB more per 100,000 images, each worker |"]
    lines += ["| --- |" + " --- |" * 4]
    for way in ("sequential", "random"):
        row = found[way]
        growth = ", ".join(f"{slope:.2f}" for slope in row["workers_mb_per_100000_images"])
        cells = (way, f"{row['images']:,}", f"{row['different_images']:,}", f"{row['images_per_second']:,.0f}", growth)
        lines.append(f"| {' | '.join(cells)} |")
    used = [size for points in found["points"] for size in points[-1]["sequential"]]
    lines += [
        "",
        f"{found['images']:,} JPEG files of 32x32 pixels in {found['shards']} tar files of {low:,} to {high:,} "
        f"images, in the page cache; {found['ranks']} ranks (gloo, torchrun) with {found['workers']} workers each, the "
        f"two ways in turn. A worker that reads sequentially has {min(used) / 1e6:.0f} to {max(used) / 1e6:.0f} MB of "
        f"its own at the end; growth is measured from a tenth of the epoch on. {env['processor']}, {env['cores']} "
        f"cores, load {found['load']:.0f}. `python benchmarks/shards.py`.",
    ]
    return filled(page.read_text(), "shards", "\n".join(lines) + "\n")


def pairwise(page: Path) -> str:
    """Return a page with the table of benchmarks/pairs.py between its markers, <!-- pairs -->."""
    found = json.loads((HERE / "pairs.json").read_text())
    heads = ("", "rows", "ms", "processor ms", "of the ceiling", "MB", "times the processor time of the first")
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * 6]
    for workload, blocks in found["workloads"].items():
        for rows, block in blocks.items():
            first, *_ = timings = {who: row for who, row in block.items() if isinstance(row, dict)}
            for who, row in timings.items():
                ratio = row["processor_seconds"] / timings[first]["processor_seconds"]
                cells = [f"{workload}, {who}", f"{int(rows):,}"]
                cells += [
                    f"{1e3 * row[key]:,.{1 if row[key] < 0.1 else 0}f}" for key in ("seconds", "processor_seconds")
                ]
                held = f"{row['memory_bytes'] / 1e6:,.0f}" if int(rows) > 1024 else ""
                cells += [f"{row['share']:.0%}", held, f"{ratio:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    env, loads = found["environment"], found["loads"]
    machine = f"{env['processor']} ({env['instructions']}), {env['cores']} cores, {env['threads']} thread"
    lines += ["", f"{machine}, torch {env['versions']['torch']}, load {min(loads):.0f} to {max(loads):.0f}."]
    lines += ["Least of the rounds, by " + ", ".join(f"`{command}`" for command in found["commands"]) + "."]
    return filled(page.read_text(), "pairs", "\n".join(lines) + "\n")


LARGE = HERE.parent / "docs" / "large-batches.md"
SCALING = HERE.parent / "docs" / "scaling.md"
DATA = HERE.parent / "docs" / "data.md"
SPEED = HERE.parent / "docs" / "speed.md"

if __name__ == "__main__":
    LARGE.write_text(timed(LARGE))
    LARGE.write_text(fitted(LARGE))
    SCALING.write_text(fitted(SCALING))
    SIGMOID = INDEX.parent / "sigmoid.md"
    SIGMOID.write_text(pairwise(SIGMOID))
    SPEED.write_text(measured(SPEED))
    DATA.write_text(million(DATA))
    DATA.write_text(sharded(DATA))
    (HERE / "README.md").write_text(page())
    for page_of_plugin in PLUGINS.glob("*.md"):
        page_of_plugin.write_text(answered(page_of_plugin))
    for page_of_method in INDEX.parent.glob("*.md"):
        page_of_method.write_text(written(page_of_method))
