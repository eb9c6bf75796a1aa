"""Fault injection for an hour, compared with an undisturbed run: python benchmarks/soak.py [--minutes 60]

Both runs train MoCo (queue, target network, fusion, curation) by the command line on the embedded digits, written as a
folder of PNG and JPEG files and streamed through a worker, on one thread each. One of them is killed, stopped by a
signal, paused or has its files damaged every 40 seconds on average, all drawn from --seed, and is restarted with
`--resume auto`. At the end both must have the same checkpoints, log, figures and encoder, bit for bit, in memory that
does not grow. Writes results/soak.json and docs/soak.png; exits with 0 only if everything is equal. After 1.4 times
--minutes it stops, reports that it has not finished, and compares what both runs have until then: every checkpoint of
the same step, and the lines of their logs.
"""

import argparse
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from inbatch.apps.console import print_error, say
from inbatch.data import open_data, write_folder
from inbatch.errors import InbatchError
from inbatch.runtime.child_processes import start
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.training import checkpoint

ROOT = Path(__file__).parents[1]
RECIPE = {
    "preset": "digits-colour", "image_size": 20, "channels": 3, "cache_on_device": False, "batch_size": 64,
    "context": 32, "fuse.name": "conv", "curate.name": "redraw", "seed": 0,
}  # fmt: skip
GROWTH = 1.05
"""Largest ratio of the undisturbed run's memory: the last quarter's median over the second quarter's."""
WAIT = 240
"""Seconds to wait for a start or an end, with a margin for a busy machine."""

# Faults: relative frequency and accepted exit codes.
BLOWS: dict[str, tuple[int, tuple[int, ...]]] = {
    "SIGKILL": (5, (-9,)),
    "SIGKILL while saving": (4, (-9,)),
    "SIGKILL while starting": (2, (-9,)),
    "SIGKILL to the data worker": (2, (1,)),
    "SIGTERM": (3, (75,)),
    "SIGUSR1": (3, (75,)),
    "SIGINT": (2, (130,)),
    "SIGTERM and SIGINT": (2, (75, 130)),
    "SIGTERM twice": (2, (75, -15)),
    "SIGINT three times": (2, (-2, 130)),
    "SIGSTOP for 3 s": (2, ()),
}


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def damages(out: Path, rng: random.Random) -> dict[str, Callable[[], object]]:
    """Return the possible damages while the run is stopped; never both checkpoints at once, which no run survives."""
    last, log = out / "checkpoints" / "last.pt", out / "metrics.jsonl"
    choices: dict[str, Callable[[], object]] = {
        "half a line in metrics.jsonl": lambda: log.open("a").write('{"step": 7, "lo'),
        "half-written files left over": lambda: [
            path.write_bytes(bytes(1000)) for path in (out / ".run.json.1.tmp", out / "checkpoints" / ".last.pt.1.tmp")
        ],
    }
    if last.exists() and last.with_name("previous.pt").exists():
        choices |= {
            "last.pt: a bit flipped": lambda: flip(last, rng),
            "last.pt: truncated": lambda: os.truncate(last, rng.randrange(1, last.stat().st_size)),
            "last.pt: emptied": lambda: os.truncate(last, 0),
            "last.pt: removed": last.unlink,
        }
    return choices


class Run:
    """A run of the command line, started one or more times."""

    def __init__(self, out: Path, words: list[str]) -> None:
        self.out = out
        self.words = [*words, "--out", str(out), "--resume", "auto"]
        self.console = out.with_suffix(".txt")
        self.process: subprocess.Popen[str] | None = None
        self.began, self.heard_from = 0.0, 0
        self.workers: dict[int, float] = {}  # every descendant process, and when it was last seen

    def start(self) -> None:
        self.began, self.heard_from = time.time(), self.console.stat().st_size if self.console.exists() else 0
        command = [sys.executable, "-m", "inbatch", "pretrain", "moco", *self.words]
        env = os.environ | {"OMP_NUM_THREADS": "1", "INBATCH_CACHE": "off"}
        with open(self.console, "ab") as console:
            self.process = start(command, env=env, stdout=console, stderr=console)

    @property
    def code(self) -> int | None:
        """Return the exit code; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def heard(self) -> str:
        """Return its output since the last start."""
        return self.console.read_bytes()[self.heard_from :].decode(errors="replace")

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def until(self, true: Callable[[], bool], seconds: float, tick: float = 0.05) -> bool:
        """Wait until a condition holds; return False if the run ended or the time is over."""
        end = time.time() + seconds
        while time.time() < end and self.code is None:
            if true():
                return True
            time.sleep(tick)
        return False

    def end(self) -> None:
        """End all of its processes."""
        if self.process is not None and self.code is None:
            self.process.kill()
            self.process.wait()

    def step(self) -> int:
        """Return the step of the last log line."""
        try:
            with open(self.out / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
                lines = file.read().split(b"\n")[:-1]
            return int(json.loads(lines[-1])["step"])
        except (OSError, ValueError, IndexError, KeyError):
            return 0


def children(of: int) -> list[int]:
    """Return the child processes of a process."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == of:
                pids.append(int(stat.parent.name))
        except (OSError, ValueError, IndexError):  # it has ended meanwhile
            continue
    return pids


def pss(of: int) -> float:
    """Return the MB of memory of a process, shared memory in proportion; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{of}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3
    except (OSError, StopIteration):
        return 0.0


def digest(last: Path) -> tuple[int, str] | None:
    """Return the step of a checkpoint, and the SHA-256 of its state without times; None if there is none."""
    sha256 = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha256.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha256.update(value.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key, item in value.items():
                sha256.update(repr(key).encode())
                feed(item)
        elif isinstance(value, list | tuple):
            sha256.update(b"[")
            for item in value:
                feed(item)
        else:
            sha256.update(repr(value).encode())

    try:
        saved = torch.load(last, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return None
    for name in ("seconds", "before"):
        del saved["state"]["progress"][name]
    feed(saved["state"])
    return saved["step"], sha256.hexdigest()


class Watch(threading.Thread):
    """Memory and step of each run, every 2 seconds: [seconds, MB of the trainer, MB of its workers, step].

    digests: of the checkpoints found, by their step.
    """

    def __init__(self, runs: dict[str, Run]) -> None:
        super().__init__(daemon=True)
        self.runs, self.began, self.over = runs, time.time(), threading.Event()
        self.samples: dict[str, list[list[float]]] = {name: [] for name in runs}
        self.digests: dict[str, dict[int, str]] = {name: {} for name in runs}

    def run(self) -> None:
        while not self.over.wait(2):
            for name, run in self.runs.items():
                if run.process is None or run.code is not None:
                    continue
                now, below = time.time(), children(run.process.pid)
                run.workers |= dict.fromkeys(below, now)
                held = [pss(run.process.pid), sum(pss(pid) for pid in below)]
                self.samples[name].append([round(now - self.began, 1), *(round(mb, 1) for mb in held), run.step()])
                if (saved := digest(run.out / "checkpoints" / "last.pt")) is not None:
                    self.digests[name].setdefault(*saved)


def lay_out(folder: Path) -> Path:
    """Write the digits as a folder of images: a train and a test split, every other file as JPEG."""
    for split in ("train", "test"):
        write_folder(open_data("digits-canvas-colour", split), folder / split)
    for path in sorted(folder.rglob("*.png"))[::2]:
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    return folder


def pace(words: list[str], work: Path, epochs: int = 4) -> float:
    """Return the seconds of an epoch while two such runs share the machine."""
    both = [Run(work / f"pace-{i}", [*words, "--epochs", str(epochs), "--set", "evaluate_every=2"]) for i in range(2)]
    for run in both:
        run.start()
    try:
        for run in both:
            run.until(lambda: False, 10 * WAIT)
            if run.code != 0:
                raise SystemExit(f"the recipe does not run here: {run.heard()[-2000:]}")
    finally:
        for run in both:
            run.end()
    results = [json.loads((run.out / "result.json").read_text()) for run in both]
    return max(result["training_seconds"] for result in results) / epochs


class Disturbance:
    """Faults injected into the disturbed run, and its reactions. wrong: deviations from the expected behaviour."""

    def __init__(self, run: Run, rng: random.Random, mean: float, began: float) -> None:
        self.run, self.rng, self.mean, self.began = run, rng, mean, began
        self.events: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.damage: str | None = None  # damage that the next start must report
        self.trains, self.slow = 0.0, 0.0  # time of the last start that trained, and seconds until it did

    def go(self, until: float, deadline: float) -> bool:
        """Inject faults until a given time and let the run end; return whether it did before the deadline."""
        run = self.run
        run.start()
        while time.time() < deadline and len(self.wrong) < 5:
            quiet = time.time() > until
            blow = "" if quiet else self.rng.choices(list(BLOWS), [often for often, _ in BLOWS.values()])[0]
            if blow != "SIGKILL while starting":
                self._resumed()
                mean = max(self.mean, 4 * self.slow)  # on a busy machine it must make progress between two faults, too
                pause = min(self.rng.expovariate(1), 4) * mean
                left = deadline - time.time()
                run.until(lambda: False, left if quiet else min(pause, left))
            else:
                run.until(lambda: False, self.rng.random() * 8)
            if run.code == 0:
                return True
            if run.code is not None:
                self.wrong.append(f"it ended by itself with {run.code}: {run.heard()[-1000:]}")
                run.start()
            elif not quiet:
                self._strike(blow)
                if run.code == 0:
                    return True
                if run.code is not None:
                    run.start()
        return False

    def _resumed(self) -> None:
        """Wait until it trains; record how long that took."""
        run, before = self.run, self.events[-1] if self.events else None
        if self.trains == run.began:  # still running, after a pause
            return
        self.trains = run.began
        if not run.until(lambda: "  step " in run.heard(), WAIT) and run.code is None:
            self.wrong.append(f"it did not train after {WAIT} seconds: {run.heard()[-1000:]}")
        self.slow = time.time() - run.began
        if before is not None and run.code is None:
            before["resume_seconds"] = round(self.slow, 1)
        if self.damage and self.damage.startswith("last.pt") and "last.pt is " not in run.heard():
            self.wrong.append(f"{self.damage}, and nothing was said")
        self.damage = None

    def _strike(self, blow: str) -> None:
        """Inject one fault, wait for the end, check the files, and damage some of them."""
        run, rng = self.run, self.rng
        assert run.process is not None
        if blow == "SIGKILL while saving":
            run.until(lambda: bool(list(run.out.glob("checkpoints/.*.tmp"))), 30, tick=0.0005)
            run.send(signal.SIGKILL)
        elif blow == "SIGKILL to the data worker":
            for pid in children(run.process.pid):
                os.kill(pid, signal.SIGKILL)
        elif blow == "SIGSTOP for 3 s":
            run.send(signal.SIGSTOP)
            time.sleep(3)
            run.send(signal.SIGCONT)
        else:
            words = blow.replace(" and", "").removesuffix(" while starting").split()
            times = {"twice": 2, "three": 3}.get(words[-1] if words[-1] != "times" else words[-2], 1)
            names = [word for word in words if word.startswith("SIG")] * times
            for i, name in enumerate(names):
                time.sleep(0.1 if i and times > 1 else 0)
                run.send(getattr(signal, name))
        event: dict[str, Any] = {"seconds": round(time.time() - self.began, 1), "what": blow, "code": None}
        self.events.append(event)
        right = BLOWS[blow][1]
        if not right:
            return
        run.until(lambda: False, WAIT)
        if run.code is None:
            self.wrong.append(f"{blow} did not end it in {WAIT} seconds")
            run.end()
        if "last.pt is " in run.heard():  # reported in the short time before it was killed
            self.damage = None
        event["code"] = run.code
        if run.code == 0:  # it had made its last step
            self.events.remove(event)
            return
        event["step"] = step = self._saved()
        if step is not None and step == self.total():
            return  # the last step was made: it no longer stops, and may be killed while it writes its result
        if run.code not in right:
            self.wrong.append(f"{blow} ended it with {run.code}, not {right}: {run.heard()[-1000:]}")
        if rng.random() < 0.5 and run.out.is_dir():
            possible = damages(run.out, rng)
            self.damage = event["damage"] = rng.choice(list(possible))
            possible[self.damage]()

    def _saved(self) -> int | None:
        """Return the step from which the next start would resume."""
        folder = self.run.out / "checkpoints"
        if not list(folder.glob("*.pt")):
            return None
        try:
            return checkpoint.load(folder).step
        except InbatchError as error:
            self.wrong.append(str(error))
            return None

    def total(self) -> int:
        return int(json.loads((self.run.out / "run.json").read_text())["steps"])


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the places where two states differ in any bit of any tensor."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for i, pair in enumerate(zip(a, b, strict=True)) for place in differences(*pair, f"{where}[{i}]")]
    return [] if type(a) is type(b) and a == b else [where]


def left(out: Path) -> dict[str, Any]:
    """Return the results of a run that must not depend on the faults: everything but times."""
    state = {}
    for name in ("last.pt", "best.pt"):  # previous.pt depends on when the run was last stopped
        state[name] = checkpoint.load(out / "checkpoints", name).state
        del state[name]["progress"]["seconds"], state[name]["progress"]["before"]
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("images_per_second", None)
    result = json.loads((out / "result.json").read_text())
    kept = ("curve", "evaluation", "collapsed", "leak", "steps", "images", "recipe", "context")
    encoder = {path.name: path.read_bytes() for path in sorted((out / "encoder").iterdir())}
    return state | {"metrics.jsonl": log, "result.json": {key: result[key] for key in kept}, "encoder": encoder}


def judged(reference: Run, disturbed: Run, samples: list[list[float]], wrong: list[str]) -> dict[str, Any]:
    """Return every check with its result; all are true if the faults had no effect on the results."""
    ours, theirs = left(disturbed.out), left(reference.out)
    off = {name: differences(ours[name], theirs[name]) for name in theirs}
    # Only during training: the start and the probes at the end do other work.
    held = [a + b for _, a, b, step in samples if 0 < step < samples[-1][3]]
    quarter = len(held) // 4
    growth = statistics.median(held[3 * quarter :]) / statistics.median(held[quarter : 2 * quarter])
    rubbish = [str(path.relative_to(disturbed.out)) for path in disturbed.out.rglob(".*.tmp")]
    end = time.time() + 20
    while (orphans := [pid for pid in disturbed.workers if pss(pid)]) and time.time() < end:
        time.sleep(0.5)
    answers = {f"{name} equal": not places for name, places in off.items()}
    answers |= {"memory flat": growth <= GROWTH, "nothing half-written": not rubbish, "no process left": not orphans}
    answers |= {"every exit as promised": not wrong}
    details = {"differences": {n: f[:20] for n, f in off.items() if f}, "growth": growth, "rubbish": rubbish}
    return {"equal": all(answers.values()), "answers": answers} | details | {"orphans": orphans, "wrong": wrong}


def in_common(one: dict[int, str], other: dict[int, str], logs: tuple[Path, Path]) -> dict[str, Any]:
    """Compare two unfinished runs at the steps for which checkpoints of both were found, and compare their logs."""
    steps = sorted(one.keys() & other.keys())
    lines = [[json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] for log in logs]
    last = min(records[-1]["step"] for records in lines)
    kept = [[{k: v for k, v in x.items() if k != "images_per_second"} for x in f if x["step"] < last] for f in lines]
    return {
        "checkpoints": len(steps), "different_checkpoints": [step for step in steps if one[step] != other[step]],
        "last_checkpoint": steps[-1] if steps else None, "log_lines": len(kept[0]), "same_log": kept[0] == kept[1],
    }  # fmt: skip


def not_finished(common: dict[str, Any]) -> str:
    """Return a sentence about the comparison of unfinished runs."""
    same = common["checkpoints"] - len(common["different_checkpoints"])
    log = "and" if common["same_log"] else "but NOT in"
    return (
        f"not finished; the same, bit for bit, at {same} of {common['checkpoints']} steps where both were seen to "
        f"save, {log} {common['log_lines']:,} lines of the log"
    )


def thinned(samples: list[list[float]], most: int = 500) -> list[list[float]]:
    return samples[:: max(1, -(-len(samples) // most))]


def plot(result: dict[str, Any], png: Path) -> None:
    """Draw steps and memory of both runs over the minutes, and the times of the faults."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for name, colour in (("left alone", "#999999"), ("disturbed", "#0072b2")):
        samples = result["samples"][name]
        minutes = [s[0] / 60 for s in samples]
        above.plot(minutes, [s[3] for s in samples], color=colour, linewidth=1.2, label=name)
        below.plot(minutes, [s[1] for s in samples], color=colour, linewidth=1, label=f"{name}: trainer")
        below.plot(minutes, [s[2] for s in samples], color=colour, linewidth=1, linestyle=":", label="its data worker")
    marks = {"SIGKILL": ("x", "#d55e00"), "asked to stop": ("v", "#009e73"), "paused": ("|", "#000000")}
    for kind, (marker, colour) in marks.items():
        hit = [e for e in result["events"] if _kind(e["what"]) == kind]
        places = [_near(result["samples"]["disturbed"], e["seconds"]) for e in hit]
        label = f"{kind} ({len(hit)})"
        above.scatter(
            [e["seconds"] / 60 for e in hit], places, marker=marker, color=colour, s=26, label=label, zorder=3
        )
    hurt = [e for e in result["events"] if "damage" in e]
    places = [_near(result["samples"]["disturbed"], e["seconds"]) for e in hurt]
    ring = {"marker": "o", "facecolors": "none", "edgecolors": "#cc79a7", "s": 70}
    above.scatter([e["seconds"] / 60 for e in hurt], places, label=f"files damaged, too ({len(hurt)})", **ring)
    verdict = result["verdict"]
    outcome = "the same, bit for bit" if verdict.get("equal") else verdict.get("reason", "NOT the same")
    above.set_title(
        f"{len(result['events'])} blows in {result['minutes']:.0f} minutes; at the end: {outcome}", fontsize=9
    )
    above.set_ylabel("step")
    below.set_ylabel("memory (PSS), MB")
    below.set_xlabel("minutes")
    below.set_ylim(bottom=0)
    for panel in (above, below):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(png, dpi=110)


def _kind(what: str) -> str:
    return "SIGKILL" if "SIGKILL" in what else "paused" if "SIGSTOP" in what else "asked to stop"


def _near(samples: list[list[float]], seconds: float) -> float:
    """Return the step of the sample that is nearest in time."""
    return min(samples, key=lambda s: abs(s[0] - seconds))[3] if samples else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="that the run left alone takes, about")
    parser.add_argument("--every", type=float, default=40, help="seconds between two blows, on average")
    parser.add_argument("--seed", type=int, default=0, help="of everything that befalls the run")
    parser.add_argument("--epochs", type=int, help="instead of timing some")
    parser.add_argument("--work", type=Path, help="a folder for the runs, which stay there")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "soak.json")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "soak.png")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="inbatch-soak-"))
    work.mkdir(parents=True, exist_ok=True)
    where = environment(torch.device("cpu"))
    words = ["--data", str(lay_out(work / "images")), "--workers", "1"]
    words += [word for key, value in RECIPE.items() for word in ("--set", f"{key}={value}")]
    epochs = args.epochs or max(4, round(args.minutes * 60 / pace(words, work)))
    words += ["--epochs", str(epochs), "--set", f"evaluate_every={max(2, epochs // 20)}"]
    say(f"{epochs} epochs, in {work}")

    runs = {name: Run(work / name.replace(" ", "-"), words) for name in ("left alone", "disturbed")}
    watch = Watch(runs)
    began, rng = watch.began, random.Random(args.seed)
    deadline = began + 1.4 * 60 * args.minutes
    disturbance = Disturbance(runs["disturbed"], rng, args.every, began)
    verdict: dict[str, Any] = {"equal": False}
    try:
        watch.start()
        runs["left alone"].start()
        ended = disturbance.go(began + 1.1 * 60 * args.minutes, deadline)
        if ended:
            runs["left alone"].until(lambda: False, deadline - time.time())
        codes = {name: run.code for name, run in runs.items()}
        minutes = (time.time() - began) / 60
        watch.over.set()
        watch.join()
        if ended and set(codes.values()) == {0}:
            verdict = judged(runs["left alone"], runs["disturbed"], watch.samples["left alone"], disturbance.wrong)
        else:
            logs = (runs["left alone"].out / "metrics.jsonl", runs["disturbed"].out / "metrics.jsonl")
            common = in_common(watch.digests["left alone"], watch.digests["disturbed"], logs)
            verdict |= {
                "common": common,
                "reason": not_finished(common) if len(disturbance.wrong) < 5 else "given up",
                "codes": codes,
                "wrong": disturbance.wrong,
            }
    finally:
        watch.over.set()
        for run in runs.values():
            run.end()
    result = {
        "minutes": minutes, "epochs": epochs, "seed": args.seed, "command": ["inbatch", "pretrain", "moco", *words[2:]],
        "verdict": verdict, "events": disturbance.events, "environment": where,
        "samples": {name: thinned(samples) for name, samples in watch.samples.items()},
    }  # fmt: skip
    write_json(args.out, result)
    plot(result, args.png)
    for question, answer in verdict.get("answers", {}).items():
        say(f"{question}: {'yes' if answer else 'NO'}")
    say(f"{len(disturbance.events)} blows in {minutes:.1f} minutes; {args.out}, {args.png}")
    if not verdict["equal"]:
        print_error(f"{verdict.get('reason', 'not the same')}: {json.dumps({**verdict, 'answers': None})}; see {work}")
        return 1
    if args.work is None:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
