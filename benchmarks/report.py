"""Writes all that is said about speed: the files of results, the plot and the README's tables.

    python benchmarks/report.py --measure    # runs all CPU benchmarks first: what `make report` does, 20 to 25 minutes
    python benchmarks/report.py RUN.json ... # the files of results from what a benchmark has left: `make bench`, or
                                             # whole_models.py, which takes the models of other people
    python benchmarks/report.py              # plot and tables from the files in benchmarks/results/

A file of results holds one benchmark's races with the processor, the commit, the versions and the date; a new one takes
the place of that of another processor. In the README what stands between ``<!-- figures: NAME -->`` and the next
``<!-- end -->`` is written; ``tests/test_report.py`` compares it, and the plot, with the files. Measure on a quiet
machine, and commit first: the files name the commit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import harness  # noqa: E402
from harness import OURS  # noqa: E402
from multistage_diffusion.common.plots import COLORS, FAINT, INK, saved_axes  # noqa: E402

README, PLOT = ROOT / "README.md", ROOT / "docs" / "speed.png"
UNIT = "seconds per call; ratios are peer / ours; [median, lower quartile, upper quartile]"
BLOCK = re.compile(r"(<!-- figures: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MISSING, NOT_MEASURED = "–", "Not measured for this version yet."
Table = list[tuple[str, ...]]

WHOLE_STEPS = {
    "training, 8 samples of the widest stage": ("training_step", "training_step_float32[8-0-0]"),
    "training, 3, 3 and 2 samples of the stages": ("training_step", "training_step_float32[3-3-2]"),
    "sampling, 8 samples of the widest stage": ("sampling_step", "sampling_step_float32[8]"),
    "sampling, one sample": ("sampling_step", "sampling_step_float32[1]"),
    "sampling, 3, 3 and 2 samples": ("sampling_step", "sampling_step_of_mixed_stages"),
}
GROUP_NORM = {
    "forward, bf16 [8, 256, 32, 32]": "group_norm[forward-8x256x32x32-bfloat16]",
    "forward + backward, bf16 [8, 256, 32, 32]": "group_norm[step-8x256x32x32-bfloat16]",
    "the same, the loss's gradient in NCHW": "group_norm_reaches_its_goal[C2]",
    "forward, bf16 [8, 640, 32, 32]": "group_norm[forward-8x640x32x32-bfloat16]",
    "forward + backward, bf16 [8, 640, 32, 32]": "group_norm[step-8x640x32x32-bfloat16]",
    "forward + backward, fp32 [8, 640, 32, 32]": "group_norm[step-8x640x32x32-float32]",
    "forward + backward, bf16 [4, 256, 64, 64]": "group_norm[step-4x256x64x64-bfloat16]",
}
GROUPED_CONV2D = {
    f"{label}, {side}²": f"grouped_conv2d[thirds-float32-{side}-{kind}]"
    for kind, label in (("forward", "forward"), ("step", "forward + backward"))
    for side in (32, 16, 8)
}
RESAMPLE2D = {
    "[1, 3, 3, 1] down, bf16": "resample2d_reaches_its_goal[fir-down-bfloat16-nhwc]",
    "[1, 3, 3, 1] up, bf16": "resample2d_reaches_its_goal[fir-up-bfloat16-nhwc]",
    "[1, 3, 3, 1] down, fp32": "resample2d_reaches_its_goal[fir-down-float32-nhwc]",
    "[1, 1] down, fp32": "resample2d_reaches_its_goal[box-down-float32-nhwc]",
}
ATTENTION = {
    "forward, head dimension 384": "attention[forward-edm-16-per_head]",
    "forward + backward, head dimension 384": "attention[step-edm-16-per_head]",
    "forward + backward, 3, 3 and 2 samples of 384, 256 and 32": "attention[step-edm-thirds-16-per_head]",
}
# Bars of the plot: the benchmark, its race and the peer.
NORM = "8x256x32x32-bfloat16"
BARS = {
    **{f"fp32 {label}": (*where, "plain") for label, where in WHOLE_STEPS.items()},
    "fp32 3×3 convolutions of 3, 3 and 2 samples, 16²": (
        "grouped_conv2d",
        GROUPED_CONV2D["forward + backward, 16²"],
        "loop",
    ),
    "GroupNorm + SiLU, bf16": ("group_norm", f"group_norm[forward-{NORM}]", "eager"),
    "GroupNorm + SiLU, bf16, with gradients": ("group_norm", f"group_norm[step-{NORM}]", "eager"),
    "FIR resampling, bf16, with gradients": (
        "resample2d",
        RESAMPLE2D["[1, 3, 3, 1] down, bf16"],
        "library",
    ),
    "attention, bf16, with gradients": ("attention", "attention[step-edm-16-per_head]", "einsum"),
}


class Results:
    """What the files hold: by benchmark the machine and, by name, the races."""

    def __init__(self, folder: Path = harness.RESULTS) -> None:
        self.files: dict[str, Path] = {}
        self.machines: dict[str, dict] = {}
        self._races: dict[str, dict[str, dict]] = {}
        for path in sorted(folder.glob("cpu-*cores-*.json")):
            found = json.loads(path.read_text())
            stem = path.stem.rpartition("-")[2]
            self.files[stem], self.machines[stem] = path, found["machine"]
            self._races[stem] = {race["name"]: race for race in found["results"]}

    def races(self, stem: str) -> dict[str, dict]:
        return self._races.get(stem, {})

    def race(self, stem: str, name: str) -> dict:
        """Empty where it was not measured."""
        return self.races(stem).get(name, {})

    def ratio(self, stem: str, name: str, peer: str) -> float | None:
        """How many times as long as ours the peer takes."""
        ratio = self.race(stem, name).get("ratio", {}).get(peer)
        return ratio[0] if ratio else None


def number(value: float | None) -> str:
    """Three digits."""
    return MISSING if value is None else f"{value:.2f}" if value < 10 else f"{value:.3g}"


def markdown(header: Sequence[str], rows: Table) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def whole_steps(results: Results) -> str:
    rows = []
    for label, (stem, name) in WHOLE_STEPS.items():
        if race := results.race(stem, name):
            floor = results.ratio(stem, name, "floor")
            peak = [f"{race['peak_bytes'][case] / 2**20:.0f} MiB" for case in (OURS, "plain")]
            rows.append((label, number(results.ratio(stem, name, "plain")), number(floor), *peak))
    if not rows:
        return NOT_MEASURED
    return markdown(("", "plain / ours", "floor / ours", "peak memory of ours", "of plain"), rows)


def whole_models(results: Results) -> str:
    races = list(results.races("whole_models").values())
    orders = sorted({race["order"] for race in races})
    rows = []
    for key in dict.fromkeys(map(_model_key, races)):
        found = {race["order"]: race["ratio"]["original"][0] for race in races if _model_key(race) == key}
        rows.append((", ".join(key), *(number(found.get(order)) for order in orders)))
    return markdown(("original / replaced", *orders), rows) if rows else NOT_MEASURED


def _model_key(race: dict) -> tuple[str, str, str]:
    return race["model"], race["dtype"], race["pass"]


def group_norm(results: Results) -> str:
    rows = [(label, *_norm_cells(results.race("group_norm", name))) for label, name in GROUP_NORM.items()]
    races = [race for race in results.races("group_norm").values() if "share_of_copy" in race]
    if races:
        least = min(races, key=lambda race: race["ratio"]["eager"][0])
        kind, shape, dtype = re.search(r"\[(\w+)-([\dx]+)-(\w+)\]", least["name"]).groups()
        label = {"forward": "forward", "step": "forward + backward"}[kind]
        short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
        sizes = shape.replace("x", ", ")
        rows.append((f"{label}, {short} [{sizes}] (the least of all)", *_norm_cells(least)))
    return markdown(("", "eager / ours", "`torch.compile` / ours", "share of copy"), rows)


def _norm_cells(race: dict) -> tuple[str, str, str]:
    ratio = {peer: values[0] for peer, values in race.get("ratio", {}).items()}
    share = race.get("share_of_copy", MISSING)
    return number(ratio.get("eager")), number(ratio.get("compiled")), share


def ratios(results: Results, stem: str, names: dict[str, str], peers: dict[str, str]) -> str:
    """A row per race of a benchmark, a column per peer, by what they are called in the table."""
    if not results.races(stem):
        return NOT_MEASURED
    rows = [
        (label, *(number(results.ratio(stem, name, peer)) for peer in peers)) for label, name in names.items()
    ]
    return markdown(("", *(f"{title} / ours" for title in peers.values())), rows)


def grouped_conv2d(results: Results) -> str:
    peers = {"loop": "one per stage", "padded": "padded to the widest", "as_groups": "`groups=batch`"}
    return ratios(results, "grouped_conv2d", GROUPED_CONV2D, peers)


def resample2d(results: Results) -> str:
    peers = {"score SDE": "score SDE", "depthwise": "depthwise", "library": "library"}
    return ratios(results, "resample2d", RESAMPLE2D, peers)


def attention(results: Results) -> str:
    peers = {"einsum": "einsum", "sdpa of packed": "SDPA", "sdpa": "SDPA of parts"}
    return ratios(results, "attention", ATTENTION, peers)


def optimal_denoiser(results: Results) -> str:
    race = results.race("optimal_denoiser", "optimal_denoiser_reaches_its_goal")
    if not race:
        return NOT_MEASURED
    megabytes = race["extra_bytes"] / 1e6
    return (
        f"{race['clustering_seconds']:.1f} s and {megabytes:.0f} MB besides the data for {race['images']:,} images; a "
        f"plain loop, extrapolated, {race['plain_loop_hours']:.0f} hours."
    )


def machines(results: Results) -> str:
    """Where each file comes from."""
    lines = []
    for stem, path in results.files.items():
        machine = results.machines[stem]
        lines.append(
            f"- `{path.relative_to(ROOT)}`: {machine['cores']} cores, {machine['cpu']} ({machine['simd']}), "
            f"PyTorch {machine['torch']}, commit {machine['commit']}, {machine['date'].split()[0]}"
        )
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "whole steps": whole_steps,
    "whole models": whole_models,
    "grouped_conv2d": grouped_conv2d,
    "group_norm": group_norm,
    "resample2d": resample2d,
    "attention": attention,
    "optimal_denoiser": optimal_denoiser,
    "machines": machines,
}


def written(readme: str, results: Results) -> str:
    """The README with every block made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{BLOCKS[block[2]](results)}\n\n{block[3]}", readme)


def bars(results: Results) -> dict[str, float]:
    """What the plot shows."""
    found = {label: results.ratio(*where) for label, where in BARS.items()}
    return {label: ratio for label, ratio in found.items() if ratio is not None}


def draw(results: Results, path: Path = PLOT) -> None:
    """Draws the bars; the picture keeps their lengths, for the test."""
    from PIL import Image, PngImagePlugin

    found = bars(results)
    with saved_axes(path, width=8.0, height=1.1 + 0.36 * len(found)) as axes:
        positions = range(len(found))[::-1]
        axes.barh(positions, list(found.values()), height=0.62, color=COLORS[0])
        axes.axvline(1.0, color=INK, linewidth=1.0)
        for y, ratio in zip(positions, found.values(), strict=True):
            axes.annotate(number(ratio), (ratio, y), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(positions, list(found))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_color(FAINT)
        axes.set_xlim(0, 1.12 * max(found.values(), default=1.0))
        axes.set_title("PyTorch's time over ours, on a processor")
    note = PngImagePlugin.PngInfo()
    note.add_text("bars", json.dumps(found))
    with Image.open(path) as image:
        image.load()
    image.save(path, pnginfo=note)


def drawn(path: Path = PLOT) -> dict[str, float]:
    """What a plot shows."""
    from PIL import Image

    with Image.open(path) as image:
        return json.loads(image.text["bars"])


def files(run: dict) -> Iterator[tuple[str, dict]]:
    """The files of results, by name, that a run of pytest-benchmark, or of whole_models.py, comes to."""
    if "models" in run:
        machine = {key: value for key, value in run.items() if key != "models"}
        races = [{"name": ", ".join((*_model_key(race), race["order"])), **race} for race in run["models"]]
        yield _file("whole_models", "benchmarks/whole_models.py", machine, races)
        return
    by_stem: dict[str, list[dict]] = {}
    for found in run["benchmarks"]:
        stem = re.search(r"bench_(\w+)\.py", found["fullname"])[1]
        by_stem.setdefault(stem, []).append(
            {"name": found["name"].removeprefix("test_"), **found["extra_info"]}
        )
    for stem, races in by_stem.items():
        yield _file(stem, f"pytest benchmarks/bench_{stem}.py", run["machine_info"], races)


def _file(stem: str, what: str, machine: dict, races: list[dict]) -> tuple[str, dict]:
    name = f"cpu-{machine['cores']}cores-{machine['kind'].replace(' ', '_')}-{stem}.json"
    return name, {"what": what, "machine": machine, "unit": UNIT, "results": races}


def write_files(run: dict, folder: Path = harness.RESULTS) -> None:
    """In the place of those of the same benchmarks."""
    for name, content in files(run):
        for old in folder.glob(f"cpu-*cores-*-{name.rpartition('-')[2]}"):
            old.unlink()
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {name}: {len(content['results'])} races")


def measure() -> dict:
    """Runs all benchmarks; a goal that is not reached does not keep its race from being written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", f"--benchmark-json={path}"]
        status = subprocess.run(command, cwd=ROOT).returncode
        if status not in (0, 1) or not path.is_file():
            raise SystemExit(f"report: the benchmarks ended with status {status}")
        return json.loads(path.read_text())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a file that a benchmark has left")
    parser.add_argument("--measure", action="store_true", help="run all benchmarks first")
    options = parser.parse_args(arguments)
    for run in (
        *([measure()] if options.measure else ()),
        *(json.loads(r.read_text()) for r in options.runs),
    ):
        write_files(run)
    results = Results()
    README.write_text(written(README.read_text(), results))
    draw(results)
    print(f"wrote {README.name} and {PLOT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
