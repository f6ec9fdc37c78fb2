"""This tree against another commit by ratios, on one machine in one run: whole steps, ops, and what their calls cost.

    python benchmarks/compare.py BASE [--only TEXT ...] [--seconds 30] [--json]

BASE is checked out into a temporary folder and its compiled kernels are built there, or copied where their sources are
the same; this tree is taken as it is built, with changes that are not committed. A process of each tree makes the same
case and they take turns, a pause between: base / this above 1 says that this tree is faster. Both run the benchmarks of
this tree, on the same random numbers, and what they compute is compared: "differs" marks a case whose results do not
agree within 5 % (dropout may be drawn in another way). A case that one of them cannot run says why.

--only takes the cases whose names hold one of the texts, such as "training" or "host"; --seconds are those of a whole
step's turns, an op gets a tenth. All of it takes five to ten minutes on two cores, 100 seconds of them for a build.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

import harness
from harness import OURS, ROOT, Comparison, Function, Rounds

BASE = "base"
COMPILED_SOURCES = ("csrc", "setup.py", "build_support")
PRESET = "edm-cifar10"
SIGMAS = (0.5, 5.0, 30.0)  # one in each stage
TOLERANCE = 0.05
# Seconds of a turn's calls, and between turns, in which the other process's threads go to sleep.
TURN, PAUSE = 0.02, 0.01
OPS_SHARE = 0.1


def whole_step(counts: tuple[int, ...], *, forward: bool) -> Function:
    """A training step in float32, or an evaluation of the denoiser, by public names alone."""
    from multistage_diffusion import networks, presets

    preset = presets.find(PRESET)
    torch.manual_seed(0)
    network = networks.build(preset.config())
    parameters = list(network.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
    denoiser = preset.denoiser(network.train(not forward))
    sigma = torch.tensor(
        [s for s, n in zip(SIGMAS, counts, strict=True) for _ in range(n)], dtype=torch.float64
    )
    clean = 0.5 * torch.randn(sum(counts), 3, network.image_size, network.image_size)
    noisy = clean + sigma.float().view(-1, 1, 1, 1) * torch.randn_like(clean)

    def evaluate() -> Tensor:
        with torch.no_grad():
            return denoiser(noisy, sigma)

    def step() -> Tensor:
        loss = (denoiser(noisy, sigma) - clean).square().mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach()

    return evaluate if forward else step


def whole_steps() -> dict[str, Callable[[], Function]]:
    mixes = {"8/0/0": (8, 0, 0), "3/3/2": (3, 3, 2)}
    cases = {
        f"training {mix}": lambda c=counts: whole_step(c, forward=False) for mix, counts in mixes.items()
    }
    mixes["1/0/0"] = (1, 0, 0)
    return cases | {
        f"sampling {mix}": lambda c=counts: whole_step(c, forward=True) for mix, counts in mixes.items()
    }


def ops() -> dict[str, Callable[[], Function]]:
    """The races of the other benchmarks, ours alone, at the sizes of EDM's decoders."""
    import bench_attention
    import bench_group_norm
    import bench_grouped_conv2d
    import bench_grouped_linear
    import bench_resample2d

    import peers

    def conv2d(counts: tuple[int, ...], backward: bool) -> Function:
        return bench_grouped_conv2d.Problem.of(counts, 16, torch.float32).cases(backward, ways=())[OURS]

    def norm(dtype: torch.dtype, backward: bool) -> Function:
        return bench_group_norm.Problem.of((8, 256, 32), 16, dtype).cases(backward, compiled=False)[OURS]

    def linear(backward: bool) -> Function:
        return bench_grouped_linear.Problem.of((3, 3, 2), torch.float32).cases(backward, ways=())[OURS]

    def attention(backward: bool) -> Function:
        shape = bench_attention.SHAPES["edm-thirds-16"]
        problem = bench_attention.Problem.of(shape, bench_attention.NETWORK_LAYOUT, torch.float32)
        if backward:
            return peers.step(problem.ours, (problem.x,), problem.dy)
        return peers.inference(problem.ours, (problem.x,))

    def resample(backward: bool) -> Function:
        fir = (1, 3, 3, 1)
        problem = bench_resample2d.Problem.of(
            (8, 256, 32), fir, False, torch.float32, torch.channels_last, "cpu"
        )
        return problem.run(problem.ours, backward)

    made = {
        "grouped_conv2d 8/0/0": lambda backward: conv2d((8, 0, 0), backward),
        "grouped_conv2d 3/3/2": lambda backward: conv2d((3, 3, 2), backward),
        "group_norm float32": lambda backward: norm(torch.float32, backward),
        "group_norm bfloat16": lambda backward: norm(torch.bfloat16, backward),
        "grouped_linear": linear,
        "attention": attention,
        "resample2d": resample,
    }
    return {
        f"op {name}, {'step' if backward else 'forward'}": lambda make=make, backward=backward: make(backward)
        for name, make in made.items()
        for backward in (False, True)
    }


def host() -> dict[str, Callable[[], Function]]:
    """What calls cost on tensors so small that little else counts."""
    import host_overhead

    def ready(name: str, backward: bool) -> Function:
        torch.manual_seed(0)
        call, leaves = host_overhead.calls()[name]
        return host_overhead.step(call, leaves) if backward else call

    return {
        f"host {name}, {'step' if backward else 'forward'}": lambda n=name, b=backward: ready(n, b)
        for name in host_overhead.calls()
        for backward in (False, True)
    }


GROUPS = (whole_steps, ops, host)


class Served:
    """The cases of one tree, in the process that serves them: each is made when it is first asked for."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], Function]] = {}
        self._ready: dict[str, tuple[Function, int]] = {}
        self.failures: list[str] = []
        for group in GROUPS:
            try:
                self._makers |= group()
            except Exception as error:  # an older tree may lack what a group needs; the others run
                self.failures.append(f"{group.__name__}: {type(error).__name__}: {error}")

    @property
    def names(self) -> list[str]:
        return list(self._makers)

    def prepare(self, name: str) -> float:
        """Makes a case and calls it twice; returns the size of its result."""
        run = self._makers[name]()
        torch.manual_seed(0)
        result = run()
        calls = max(1, min(1000, round(TURN / harness.wall_clock(run))))
        self._ready = {name: (run, calls)}
        return _size(result)

    def turn(self, name: str) -> float:
        """Seconds of a call, the mean over a turn."""
        run, calls = self._ready[name]
        return harness.wall_clock(lambda: [run() for _ in range(calls)]) / calls


def _size(result: object) -> float:
    """The mean magnitude of a case's first tensor; 0 where it returns none."""
    while isinstance(result, (tuple, list)):
        result = next(part for part in result if part is not None)
    return result.double().abs().mean().item() if isinstance(result, Tensor) else 0.0


def serve(tree: Path) -> None:
    """Answers the requests on the standard input, a line of JSON each."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import msd_kernels

    if not Path(msd_kernels.__file__).is_relative_to(tree):
        raise SystemExit(f"compare: {msd_kernels.__file__} is not of {tree}")
    import multistage_diffusion  # noqa: F401  before a benchmark puts its own tree first

    served = Served()
    print(json.dumps({"names": served.names, "failures": served.failures}), file=answers, flush=True)
    for line in sys.stdin:
        request, name = json.loads(line)
        try:
            answer = {"value": getattr(served, request)(name)}
        except Exception as error:  # is the other side's to tell
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


class Tree:
    """A process that serves the cases of a tree."""

    def __init__(self, name: str, folder: Path) -> None:
        path = os.pathsep.join([str(folder), str(folder / "python")])
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        greeting = self._answer()
        self.names, self.failures = greeting["names"], greeting["failures"]

    def ask(self, request: str, case: str) -> float:
        """Raises ``RuntimeError`` where the tree cannot run the case."""
        print(json.dumps([request, case]), file=self._process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["value"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"compare: the process of {self.name} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A worktree of a commit with its compiled kernels."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / BASE
        _git("worktree", "add", "--detach", str(folder), commit)
        try:
            _build(folder, commit)
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


def _build(folder: Path, commit: str) -> None:
    own = list((ROOT / "msd_kernels").glob("*.so"))
    same = (
        subprocess.run(["git", "diff", "--quiet", commit, "--", *COMPILED_SOURCES], cwd=ROOT).returncode == 0
    )
    if own and same:
        say("the compiled kernels have the same sources: copied")
        for file in own:
            shutil.copy2(file, folder / "msd_kernels")
        return
    say("builds the compiled kernels of the base")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "MSD_KERNELS_CUDA": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"compare: the base does not build:\n{done.stdout[-3000:]}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compare: git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def race(this: Tree, base: Tree, case: str, seconds: float) -> tuple[Comparison, bool]:
    """The turns of a case, and whether both compute the same."""
    sizes = [tree.ask("prepare", case) for tree in (this, base)]
    same = abs(sizes[0] - sizes[1]) <= TOLERANCE * max(sizes)

    def turn(tree: Tree) -> Callable[[], float]:
        def run() -> float:
            time.sleep(PAUSE)
            return tree.ask("turn", case)

        return run

    cases = {OURS: turn(this), BASE: turn(base)}
    return Rounds(cases, timer=lambda run: run()).run(seconds, warm=True), same


def compare(this: Tree, base: Tree, only: list[str], seconds: float) -> dict[str, dict]:
    """By case, its race or why there is none."""
    found: dict[str, dict] = {}
    for case in this.names:
        if only and not any(text in case for text in only):
            continue
        share = 1.0 if case in whole_steps() else OPS_SHARE
        try:
            if case not in base.names:
                raise RuntimeError(f"{base.name}: {'; '.join(base.failures) or 'has no such case'}")
            comparison, same = race(this, base, case, share * seconds)
            found[case] = {"same": same, **comparison.as_dict()}
        except RuntimeError as error:
            found[case] = {"error": str(error)}
        say(" ".join(row(case, found[case])))
    return found


def row(case: str, found: dict) -> tuple[str, ...]:
    """A line of the table."""
    if "error" in found:
        return case, "", "", "", found["error"]
    median, low, high = found["ratio"][BASE]
    milliseconds = (harness.milliseconds(found["seconds"][tree][0]) for tree in (OURS, BASE))
    return case, *milliseconds, f"{median:.3f} [{low:.3f}, {high:.3f}]", "" if found["same"] else "differs"


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", metavar="BASE", help="a commit, branch or tag")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
        return 0
    if not options.base:
        parser.error("which commit is this tree compared with?")
    commit = _git("rev-parse", "--short", f"{options.base}^{{commit}}")
    with ExitStack() as stack:
        folder = stack.enter_context(checked_out(commit))
        trees = [Tree("this", ROOT), Tree(f"base {commit}", folder)]
        for tree in trees:
            stack.callback(tree.close)
        found = compare(*trees, options.only, options.seconds)
    if options.json:
        facts = {"base": commit, "commit": harness.commit(), "cpu": harness.cpu_model()}
        print(json.dumps({**facts, "torch": torch.__version__, "cases": found}))
    else:
        rows = [row(case, entry) for case, entry in found.items()]
        print(harness.table(rows, ("case", "this ms", "base ms", "base / this", "")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
