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
    evaluation, recipe, where = run["evaluation"], run["recipe"], run["environment"]
    clusters = " / ".join(f"{100 * evaluation['clustering'][key]:.1f}" for key in ("nmi", "acc", "ari"))
    cells = [
        f"[{path.stem}]({path.name}): {recipe['method']['name']}, {recipe['encoder']['name']}, "
        f"{run['images']:,} images, {passes(run)}, batch {recipe['batch_size']}, seed {recipe['seed']}",
        f"{100 * run['curve'][0]['knn']:.1f}",
        f"{100 * evaluation['knn']['top1']:.1f} (k {evaluation['knn']['k']})",
        f"{100 * evaluation['linear']['top1']:.1f}",
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
        evaluations = [run["evaluation"] for run in runs]
        cells = [spread([100 * one[protocol]["top1"] for one in evaluations]) for protocol in ("knn", "linear")]
        cells += [spread([100 * one["clustering"][key] for one in evaluations]) for key in ("nmi", "acc", "ari")]
        if "head" in evaluations[0]:
            cells.append(" / ".join(spread([100 * one["head"][key] for one in evaluations]) for key in ("nmi", "acc")))
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


def method_page(page: Path) -> str:
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


def comparison_table(results: dict[str, Any], question: str) -> str:
    """Return every entry of a question with its difference from the baseline, at equal seeds."""
    lines = [
        "| | k-NN | against without, same seeds | linear | NMI | group identified (chance) |",
        "| --- |" + " --- |" * 5,
    ]
    names, first = list(results[question]), {baseline(question, name) for name in results[question]}
    outside = [(q, name) for q, name in sorted(first) if q != question]
    for q, name in [*outside, *((question, name) for name in names)]:
        plain, runs = results[baseline(question, name)[0]][baseline(question, name)[1]], results[q][name]["runs"]
        knn = [100 * run["evaluation"]["knn"]["top1"] for run in runs]
        own = [100 * run["evaluation"]["knn"]["top1"] for run in plain["runs"]]
        measured_leaks = [run["leak"] for run in runs if run.get("leak")]
        cells = [
            spread(knn),
            "" if plain is results[q][name] else spread([a - b for a, b in zip(knn, own, strict=True)]),
            spread([100 * run["evaluation"]["linear"]["top1"] for run in runs]),
            spread([100 * run["evaluation"]["clustering"]["nmi"] for run in runs]),
            f"{100 * mean(x['leak'] for x in measured_leaks):.0f} ({100 * measured_leaks[0]['leak_chance']:.0f})"
            if measured_leaks
            else "",
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def cost_table(results: dict[str, Any]) -> str:
    """Return the cost of plug-ins from a file that benchmarks/context.py wrote, for one size of the images."""
    lines = ["| | ms a step | ratio | MB | ratio | |", "| --- |" + " --- |" * 5]
    (rows,) = results["sizes"].values()
    plain = rows["simclr"]
    for name, row in rows.items():
        key = "peak_bytes" if "peak_bytes" in row else "kept_bytes"
        c = row.get("curate")
        note = f"{100 * c['violating_before']:.0f} % violate, {c['redrawn']:.2f} redraws a sample" if c else ""
        cells = [f"{1e3 * row['seconds']:,.0f}", f"{row['ratio']:.2f}", f"{row[key] / 1e6:,.0f}"]
        lines.append(f"| {' | '.join([name, *cells, f'{row[key] / plain[key]:.2f}', note])} |")
    return "\n".join(lines) + "\n"


def leak_table(results: dict[str, Any]) -> str:
    """Return how often one embedding identifies its context group, before and after training."""
    lines = ["| | before training | after an epoch | chance |", "| --- | --- | --- | --- |"]
    for name, runs in results["entries"].items():
        cells = [spread([100 * run[when]["leak"] for run in runs]) for when in ("before", "after")]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * runs[0]['after']['leak_chance']:.1f} |")
    return "\n".join(lines) + "\n"


def fusion_table(results: dict[str, Any]) -> str:
    """Return a table of variants of batch fusion."""
    lines = ["| settings | k-NN | against the second line, same seeds | linear |", "| --- | --- | --- | --- |"]
    base = [run["knn"] for run in results["entries"]["fuse.name=conv"]["runs"]]
    for name, entry in results["entries"].items():
        knn, linear = ([100 * run[key] for run in entry["runs"]] for key in ("knn", "linear"))
        against = spread([a - 100 * b for a, b in zip(knn, base, strict=True)]) if name != "fuse.name=conv" else ""
        lines.append(f"| `{name}` | {spread(knn)} | {against} | {spread(linear)} |")
    return "\n".join(lines) + "\n"


def mixing_table(results: dict[str, Any]) -> str:
    """Return k-NN and linear accuracy for each rule of mixing, and the differences at the same seeds."""
    lines = ["| | k-NN | against without, same seeds | linear | against without | processor seconds |"]
    lines.append("| --- |" + " --- |" * 5)
    plain = results["entries"]["off"]["runs"]
    for name, entry in results["entries"].items():
        cells = []
        for key in ("knn", "linear"):
            own, base = ([100 * run[key] for run in runs] for runs in (entry["runs"], plain))
            against = spread([a - b for a, b in zip(own, base, strict=True)]) if entry["runs"] is not plain else ""
            cells += [spread(own), against]
        cells.append(f"{mean(run['cpu_seconds'] for run in entry['runs']):.0f}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plugin_page(page: Path) -> str:
    """Return a page of docs/context with new tables between its markers, such as <!-- cifar fusion -->."""
    text = page.read_text()
    for file in sorted(HERE.glob("context-cost-*.json")):
        text = replace_block(text, file.stem, cost_table(json.loads(file.read_text())))
    for name, make in (("fusion-defaults", fusion_table), ("leak", leak_table), ("mixing-digits", mixing_table)):
        text = replace_block(text, name, make(json.loads((HERE / f"{name}.json").read_text())))
    for file in sorted((HERE / "plugins").glob("*.json")):
        results = json.loads(file.read_text())
        for question in (q for q in results if q != "untrained encoder"):
            text = replace_block(text, f"{file.stem} {question}", comparison_table(results, question))
        knn = spread([100 * run["evaluation"]["knn"]["top1"] for run in results["untrained encoder"]["runs"]])
        text = re.sub(rf"(<!-- {file.stem} untrained -->).*?(<!-- end -->)", rf"\g<1>{knn}\2", text)
    return text


def load_benchmark() -> ModuleType:
    """Return the module benchmarks/losses.py, which formats the rows of its tables."""
    spec = importlib.util.spec_from_file_location("losses", HERE.parent / "benchmarks" / "losses.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loss_tables(results: dict[str, Any]) -> dict[str, str]:
    """Return parts of a page from a file of benchmarks/losses.py: machine, NT-Xent by library, summary of losses."""
    words, env = load_benchmark(), results["environment"]
    best = max(results["ceilings"], key=lambda one: one["gflops"])
    every = {(loss, int(n)): block for loss, blocks in results["losses"].items() for n, block in blocks.items()}
    detailed = [cells for (loss, n), b in every.items() if loss == "nt_xent" for cells in words.details(n, b)]
    short = [words.summary(loss, n, block) for (loss, n), block in every.items()]
    libraries = [(who, results["versions"].get(who, {}).get(who)) for who in words.PEERS]
    libraries = [("torch", env["versions"]["torch"]), *libraries]
    versions = ", ".join(f"{name} {number}" for name, number in libraries if number)
    commands = ", ".join(f"`{command}`" for command in results["commands"])
    reached = f"torch's own reach {best['plain']:,.0f}, oneDNN's {best['onednn']:,.0f}"
    where = (
        f"{env['processor']}, {env['threads']} of {env['cores']} cores, {versions}. Ceiling: {best['gflops']:,.0f} "
        f"GFLOP/s of float32 products ({reached}). {commands}\n"
    )

    def lines(heads: tuple[str, ...], rows: list[Any]) -> str:
        table = [heads, ["---"] * len(heads), *rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in table)

    return {"where": where, "nt_xent": lines(words.DETAILS, detailed), "all": lines(words.SUMMARY, short)}


def replace_block(text: str, name: str, new: str) -> str:
    """Return a page with new text between <!-- name --> and <!-- end -->."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda match: match[1] + new + match[2], text, flags=re.S)


def loss_page(page: Path) -> str:
    """Return a page with the cost of losses between its markers, such as <!-- losses-1thread nt_xent -->."""
    text = page.read_text()
    for file in sorted(HERE.glob("losses-*thread*.json")):
        for name, new in loss_tables(json.loads(file.read_text())).items():
            text = replace_block(text, f"{file.stem} {name}", new)
    return text


def memory_table(results: dict[str, Any]) -> str:
    """Return the largest context per card, as computed by benchmarks/context_memory.py."""
    names = [f"{card} GB" for card in results["cards"]]
    lines = [f"| | MB a sample | GB fixed | {' | '.join(names)} |", "| --- |" + " --- |" * (2 + len(names))]
    for name, row in results["entries"].items():
        cells = [f"{row['per_sample'] / 1e6:,.1f}", f"{(row['fixed'] + row['rows']) / 1e9:.2f}"]
        cells += [f"{min(row['contexts'][str(card)], results['batch']):,}" for card in results["cards"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def large_batch_tables(results: dict[str, Any]) -> dict[str, str]:
    """Return the tables of benchmarks/large_batch.py: steps of one large batch, and the cost of groups."""
    one = results["steps"]
    lines = ["| step | loss | literal | seconds |", "| --- | --- | --- | --- |"]
    for i, s in enumerate(one["steps"]):
        lines.append(f"| {i + 1} | {s['loss']:.6f} | {s['literal']:.6f} | {s['seconds']:.0f} |")
    most = f"\nMost memory of the process, Python and the images included: {one['peak_process_bytes'] / 1e9:.2f} GB.\n"
    cost = ["| | images/s, one group | images/s, groups | times the time |", "| --- | --- | --- | --- |"]
    for method, entry in results["cost"].items():
        cells = [f"{entry[key]:.1f}" for key in ("images_per_second", "images_per_second_in_groups")]
        name = f"{method}, {entry['groups']} groups of {entry['context']}"
        cost.append(f"| {name} | {' | '.join(cells)} | {entry['ratio']:.2f} |")
    return {"large-batch steps": "\n".join(lines) + "\n" + most, "large-batch cost": "\n".join(cost) + "\n"}


def scaling_tables(results: dict[str, Any]) -> dict[str, str]:
    """Return the tables of benchmarks/scaling.py: many ranks computed, few measured."""
    heads = ["encoder", "ranks", "batch", "encoder s", "loss s", "sent MB: gathered", "own rows"]
    heads += ["network s: gathered", "own rows", "rows MB: gathered", "own rows", "state MB: whole", "`--shard`"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for s in results["paper"]:
        cells = [s["encoder"], f"{s['ranks']:,}", f"{s['batch']:,}"]
        cells += [f"{s[key]:.2g}" for key in ("encoder_seconds", "loss_seconds")]
        cells += [f"{(s[key] + s['gradient_bytes']) / 1e6:,.0f}" for key in ("gathered_bytes", "own_bytes")]
        cells += [f"{s[key]:.2g}" for key in ("gathered_network_seconds", "own_network_seconds")]
        held = ("gathered_held_bytes", "own_held_bytes", "state_bytes", "sharded_state_bytes")
        cells += [f"{x:,.0f}" if (x := s[key] / 1e6) >= 10 else f"{x:.2g}" for key in held]
        lines.append(f"| {' | '.join(cells)} |")
    cases = ["| rows | ranks | ms | times faster | added over ranks, MB | on paper |", "| --- |" + " --- |" * 5]
    for c in results["cases"]:
        cells = [f"{c['rows']:,}", str(c["ranks"]), f"{1e3 * c['seconds']:.0f}", f"{c['times_faster']:.2f}"]
        cells += [f"{c[key] / 1e6:.2f}" for key in ("added_bytes", "added_on_paper")]
        cases.append(f"| {' | '.join(cells)} |")
    even = [f"{n / 1e6:.1f} million rows with {name.replace(',', ' at')}" for name, n in results["even_rows"].items()]
    sentence = f"They cost the same at {' and '.join(even)}.\n"
    return {
        "scaling paper": "\n".join(lines) + "\n",
        "scaling cases": "\n".join(cases) + "\n",
        "scaling even": sentence,
    }


def ring_tables(results: dict[str, Any]) -> dict[str, str]:
    """Return the tables of benchmarks/ring.py: gathered rows and own rows that pass from rank to rank."""
    ways = ("gathered", "own rows")
    heads = ["ranks", "rows", "way", "processor ms of a rank", "extra MB", "sent MB", "on paper"]
    cases = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for c in (results["memory"], results["time"], *results["volume"]):
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
    for s in results["paper"]:
        cells = [f"{s[way]['sent_bytes'] / 1e6:,.0f} | {s[way]['rows']:,.0f}" for way in ways]
        lines.append(f"| {s['ranks']:,} | {s['rows']:,} | {' | '.join(cells)} |")
    ratio = results["ratios"]
    most = (
        f"Extra memory of own rows over that of gathered ones: {ratio['memory']:.2f} "
        f"({results['memory']['ranks']} ranks, {results['memory']['rows']:,} rows). Elapsed time of "
        f"{results['time']['ranks']} ranks over that of one process, {results['time']['rows']:,} rows, in turn in the "
        "same processes: "
        f"{ratio['seconds, own rows']:.2f} (gathered {ratio['seconds, gathered']:.2f}); of as much work for each "
        f"process that exchanges nothing: {ratio['seconds, separate']:.2f}. Processor time of a rank over that of one "
        f"process: {ratio['processor, own rows']:.2f} (gathered {ratio['processor, gathered']:.2f}, separate "
        f"{ratio['processor, separate']:.2f}). "
        f"Load of the machine during these two: {results['load']['memory'][0]:.0f} and "
        f"{results['load']['time'][0]:.0f}.\n"
    )
    return {"ring cases": "\n".join(cases) + "\n", "ring paper": "\n".join(lines) + "\n", "ring ratios": most}


def scaling_page(page: Path) -> str:
    """Return a page with these tables between their markers, such as <!-- context-memory -->."""
    text = page.read_text()
    renderers = {
        "context-memory": lambda results: {"context-memory": memory_table(results)},
        "large-batch": large_batch_tables,
        "scaling": scaling_tables,
        "ring": ring_tables,
    }
    for file, tables in renderers.items():
        for name, new in tables(json.loads((HERE / f"{file}.json").read_text())).items():
            text = replace_block(text, name, new)
    return text


def benchmark_page(page: Path) -> str:
    """Return a page with the results of `inbatch bench`, benchmarks/training.py and profile_step.py."""
    from inbatch.apps.bench.report import texts

    text = page.read_text()
    for file in sorted(HERE.glob("*.json")):
        for name, new in texts(file.stem, json.loads(file.read_text())).items():
            text = replace_block(text, name, new)
    return replace_block(text, "profile", profile_table(json.loads((HERE / "profile.json").read_text())))


def profile_table(results: dict[str, Any]) -> str:
    """Return the table of benchmarks/profile_step.py: time of a step by part, in percent."""
    parts = dict.fromkeys(part for case in results["cases"].values() for part in case["parts"])
    names = [part for part in parts if part != "framework"]
    lines = [f"| | ms a step | {' | '.join(names)} | framework |", "| --- |" + " --- |" * (len(names) + 2)]
    for name, case in results["cases"].items():
        shares = [case["parts"].get(part, 0.0) / case["seconds"] for part in (*names, "framework")]
        cells = [f"{1e3 * case['seconds']:,.0f}", *(f"{share:.1%}" if share else "" for share in shares)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n`{results['command']}`, medians of {case['steps']} steps.\n"


def million_page(page: Path) -> str:
    """Return a page with the results of benchmarks/million.py between <!-- million --> and <!-- end -->."""
    results = json.loads((HERE / "million.json").read_text())
    env, epoch = results["environment"], results["epoch"]
    lines = [f"| {results['images']:,} files | seconds | MB held | MB at most |", "| --- |" + " --- |" * 3]
    for name, words in (("scan", "scanned"), ("from_cache", "scanned again, from the cache")):
        row = results[name]
        cells = [f"{row['seconds']:.1f}", f"{row['held_bytes'] / 1e6:.0f}", f"{row['peak_bytes'] / 1e6:.0f}"]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    for name, seconds in results["first_step_seconds"].items():
        lines.append(f"| from `inbatch pretrain` to the end of the first step, {name} | {seconds:.0f} | | |")
    lines += ["", "| images streamed | MB of its own, each worker | MB in proportion |", "| --- | --- | --- |"]
    points = epoch["points"]
    for images, *memory in (points[round(i * (len(points) - 1) / 4)] for i in range(5)):
        cells = [", ".join(f"{size / 1e6:.1f}" for size in sizes) for sizes in memory]
        lines.append(f"| {images:,} | {' | '.join(cells)} |")
    slopes = " and ".join(f"{slope / 1e6:.2f}" for slope in epoch["bytes_per_million_images"])
    rate = f"{epoch['images']:,} were streamed, at {epoch['images'] / epoch['seconds']:,.0f} images/s"
    lines += ["", f"From a tenth of the epoch on the workers grow by {slopes} MB in a million images ({rate})."]
    lines += [f"{env['processor']}, {env['cores']} cores, kept busy by others."]
    return replace_block(page.read_text(), "million", "\n".join(lines) + "\n")


def shards_page(page: Path) -> str:
    """Return a page with the results of benchmarks/shards.py between <!-- shards --> and <!-- end -->."""
    results = json.loads((HERE / "shards.json").read_text())
    env, (low, high) = results["environment"], results["sizes"]
    lines = ["| read | images of an epoch | different ones | images/s | MB more per 100,000 images, each worker |"]
    lines += ["| --- |" + " --- |" * 4]
    for way in ("sequential", "random"):
        row = results[way]
        growth = ", ".join(f"{slope:.2f}" for slope in row["workers_mb_per_100000_images"])
        cells = (way, f"{row['images']:,}", f"{row['different_images']:,}", f"{row['images_per_second']:,.0f}", growth)
        lines.append(f"| {' | '.join(cells)} |")
    used = [size for points in results["points"] for size in points[-1]["sequential"]]
    lines += [
        "",
        f"{results['images']:,} JPEG files of 32x32 pixels in {results['shards']} tar files of {low:,} to {high:,} "
        f"images, in the page cache; {results['ranks']} ranks (gloo, torchrun) with {results['workers']} workers each, "
        f"the two ways in turn. A worker that reads sequentially has {min(used) / 1e6:.0f} to {max(used) / 1e6:.0f} MB "
        f"of its own at the end; growth is measured from a tenth of the epoch on. {env['processor']}, {env['cores']} "
        f"cores, load {results['load']:.0f}. `python benchmarks/shards.py`.",
    ]
    return replace_block(page.read_text(), "shards", "\n".join(lines) + "\n")


def pairs_page(page: Path) -> str:
    """Return a page with the table of benchmarks/pairs.py between its markers, <!-- pairs -->."""
    results = json.loads((HERE / "pairs.json").read_text())
    heads = ("", "rows", "ms", "processor ms", "of the ceiling", "MB", "times the processor time of the first")
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * 6]
    for workload, blocks in results["workloads"].items():
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
    env, loads = results["environment"], results["loads"]
    machine = f"{env['processor']} ({env['instructions']}), {env['cores']} cores, {env['threads']} thread"
    lines += ["", f"{machine}, torch {env['versions']['torch']}, load {min(loads):.0f} to {max(loads):.0f}."]
    lines += ["Least of the rounds, by " + ", ".join(f"`{command}`" for command in results["commands"]) + "."]
    return replace_block(page.read_text(), "pairs", "\n".join(lines) + "\n")


LARGE = HERE.parent / "docs" / "large-batches.md"
SCALING = HERE.parent / "docs" / "scaling.md"
DATA = HERE.parent / "docs" / "data.md"
SPEED = HERE.parent / "docs" / "speed.md"

if __name__ == "__main__":
    LARGE.write_text(loss_page(LARGE))
    LARGE.write_text(scaling_page(LARGE))
    SCALING.write_text(scaling_page(SCALING))
    SIGMOID = INDEX.parent / "sigmoid.md"
    SIGMOID.write_text(pairs_page(SIGMOID))
    SPEED.write_text(benchmark_page(SPEED))
    DATA.write_text(million_page(DATA))
    DATA.write_text(shards_page(DATA))
    (HERE / "README.md").write_text(page())
    for page_of_plugin in PLUGINS.glob("*.md"):
        page_of_plugin.write_text(plugin_page(page_of_plugin))
    for page_of_method in INDEX.parent.glob("*.md"):
        page_of_method.write_text(method_page(page_of_method))
