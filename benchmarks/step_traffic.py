"""Every op of a training step on a GPU: how many there are, and how many bytes they read and write.

    python benchmarks/step_traffic.py --preset edm-cifar10 --counts 92,3,1 [--forward] [--json]

Counted exactly, on any machine: the trainer's own step runs on PyTorch's fake tensors, with autocast to bfloat16:
loss, gradients, clipping where the preset has it, optimizer, average. ``--forward`` counts one evaluation of the
denoiser without gradients. Every op counts that is no view and no allocation, with all bytes that it reads and writes,
each once; what a fill overwrites is not read. An op of ours is served as on a GPU by its Triton kernels, and what these
launches leave for each other counts as scratch: written, and read, as often as a launch has it. For some of the
convolutions ``auto`` may take a library, whose own scratch nobody knows.

``--json`` prints ``{"ops": ..., "bytes": ...}`` of the whole, and the same of its parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import torch  # noqa: E402
from launches import served_on_gpu  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily  # noqa: E402
from torch.utils import _foreach_utils  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import harness  # noqa: E402
from msd_kernels.dispatch.backends import use  # noqa: E402
from msd_kernels.dispatch.operator import NAMESPACE  # noqa: E402
from msd_kernels.runtime import processor  # noqa: E402
from multistage_diffusion import StageOrder, networks, presets  # noqa: E402
from multistage_diffusion.presets import Preset  # noqa: E402
from multistage_diffusion.training.trainer import Trainer, TrainingConfig  # noqa: E402

# Neither moves bytes: new memory, and one that has no alias in its schema although it is a view.
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")
QUESTIONS = ("promote_types", "is_pinned")
# In-place ops that do not read what they write.
FILLS = ("bernoulli_", "copy_", "fill_", "normal_", "random_", "uniform_", "zero_")
# What a fused optimizer's schema says that it writes and it only reads: its gradients.
READ_ONLY = {"_fused_adamw_": 1}
LABELS = ("class_labels", "augment_labels")


@dataclass
class Entry:
    """Ops of one kind: how many, the bytes that they read and write, and those of their scratch among them."""

    ops: int = 0
    read: int = 0
    written: int = 0
    scratch: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written + self.scratch

    def add(self, other: Entry) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Traffic(TorchDispatchMode):
    """Counts what is called inside, by kind of op, for the part of the step that is set."""

    parts: dict[str, dict[str, Entry]] = field(default_factory=dict)
    part: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._scratch = 0
        self._own: set[int] | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._scratch = 0
        results = function(*args, **(kwargs or {}))
        if not _moves(function):
            return results
        name = _name(function)
        read = _tensors((args, kwargs))
        written = _tensors(results) or _mutated(function, args, kwargs)
        if name in FILLS:
            read = [t for t in read if t is not written[0]]
        if name in READ_ONLY:
            kept = {id(t) for t in _tensors(args[READ_ONLY[name]])}
            written = [t for t in written if id(t) not in kept]
        found = Entry(1, sum(map(_bytes, read)), sum(map(_bytes, written)), self._scratch)
        label = name if function.namespace == NAMESPACE else f"{name}{_dtypes(name, read, written)}"
        self.parts.setdefault(self.part, {}).setdefault(label, Entry()).add(found)
        return results

    def note(self, kernel, arguments: Sequence[object], options: Mapping[str, object]) -> None:
        """Of a launch inside of an op: its tensors that are neither the op's inputs nor its outputs are scratch."""
        self._launched.append(list({id(t): t for t in _tensors(arguments)}.values()))

    def around(self, kernel: Callable[..., object]) -> Callable[..., object]:
        """The function that serves an op's call, with its scratch counted."""

        def served(*args):
            self._launched: list[list[Tensor]] = []
            inside = _Inside()
            with inside:
                results = kernel(*args)
            known = {_memory(t) for t in (*_tensors(args), *_tensors(results))}
            moved = [t for launched in (*self._launched, *inside.moved) for t in launched]
            self._scratch += sum(_bytes(t) for t in moved if _memory(t) not in known)
            # PyTorch's own ops inside move the inputs and outputs once more.
            self._scratch += sum(_bytes(t) for op in inside.moved for t in op if _memory(t) in known)
            return results

        return served


class _Inside(TorchDispatchMode):
    """What PyTorch's ops move inside of an op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[list[Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if _moves(function):
            self.moved.append([*_tensors((args, kwargs)), *_tensors(results)])
        return results


def _name(function) -> str:
    return function.name().split("::")[1].split(".")[0]


def _moves(function) -> bool:
    """Whether an op is one that works on a GPU: no view, no allocation, no question to a tensor."""
    questions = function.namespace not in (NAMESPACE, "aten") or _name(function) in QUESTIONS
    return not (function.is_view or questions or _name(function) in ALLOCATIONS)


def _tensors(value: object) -> list[Tensor]:
    """All tensors in nested arguments, each once."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return []
    return list({id(t): t for item in value for t in _tensors(item)}.values())


def _mutated(function, args: Sequence[object], kwargs: Mapping[str, object] | None) -> list[Tensor]:
    """What an op without results writes, by its schema."""
    named = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | (kwargs or {})
    return _tensors(
        [named.get(a.name) for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
    )


def _bytes(tensor: Tensor) -> int:
    """Of the elements that have memory of their own."""
    sizes = (n if s else min(n, 1) for n, s in zip(tensor.size(), tensor.stride(), strict=True))
    return prod(sizes) * tensor.itemsize


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _dtypes(name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> str:
    kinds = [str(tensors[0].dtype).removeprefix("torch.") for tensors in (read, written) if tensors]
    return f" {' to '.join(kinds)}" if name == "_to_copy" else f" {kinds[-1]}" if kinds else ""


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the ops inside, where all tensors are fake and taken for those of a GPU."""
    traffic = Traffic()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # when one is copied
        stack.enter_context(served_on_gpu(traffic.note, around=traffic.around))
        stack.enter_context(
            mock.patch.object(FakeTensor, "is_cpu", property(lambda tensor: False), create=True)
        )
        stack.enter_context(mock.patch.object(processor, "computes_in", return_value=True))
        # Fake parameters cannot be swapped, and are where they are to be.
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_: module))
        # By their types PyTorch tells what its lists of tensors may hold.
        types = [*_foreach_utils._foreach_supported_types, FakeTensor]
        stack.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types", types))
        stack.enter_context(use("triton"))
        stack.enter_context(traffic)
        yield traffic


def training_step(preset: Preset, counts: Sequence[int]) -> Traffic:
    """One step of the trainer on a batch of so many samples per stage."""
    settings = preset.training_settings() | {"batch_size": sum(counts), "augment": None, "precision": "bf16"}
    config = TrainingConfig(preset.config(), data="", **settings)
    with counted() as traffic, tempfile.TemporaryDirectory() as folder:
        network = networks.build(preset.config())
        with unset_fake_temporarily():  # the schedule looks at its numbers
            trainer = Trainer(config, folder, data=_images(network), network=network, quiet=True)
        tensors = {name: torch.empty(_shape(network, counts)) for name in ("y", "noise")}
        tensors |= {"scalars": torch.empty(6, sum(counts)), "share": torch.empty(sum(counts))}
        tensors |= _labels(network, counts)
        stage = StageOrder(counts, None, None)  # as the trainer deals samples: sorted
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        trainer._update_weights(counts)  # which makes the optimizer's state
        traffic.parts.clear()
        traffic.part = "loss and gradients"
        trainer._forward_and_backward(tensors, stage)
        traffic.part = "update"
        trainer._update_weights(counts)
    return traffic


def forward(preset: Preset, counts: Sequence[int]) -> Traffic:
    """One evaluation of the denoiser, as a sampler asks for."""
    with counted() as traffic:
        network = networks.build(preset.config()).eval()
        with unset_fake_temporarily():
            denoiser = preset.denoiser(network)
        x, coefficients = torch.empty(_shape(network, counts)), torch.empty(4, sum(counts))
        labels = _labels(network, counts)
        traffic.parts.clear()
        traffic.part = "forward"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            denoiser.denoise(x, coefficients, StageOrder(counts, None, None), **labels)
    return traffic


def _shape(network, counts: Sequence[int]) -> tuple[int, ...]:
    return (sum(counts), network.in_channels, network.image_size, network.image_size)


def _labels(network, counts: Sequence[int]) -> dict[str, Tensor]:
    sizes = {name: getattr(network.takes, name) for name in LABELS}
    return {name: torch.empty(sum(counts), size) for name, size in sizes.items() if size}


def _images(network) -> SimpleNamespace:
    """A data set that nothing is read from."""
    return SimpleNamespace(
        channels=network.in_channels,
        image_size=network.image_size,
        num_images=1,
        labels=None,
        values="images",
    )


def totals(entries: Mapping[str, Entry]) -> dict[str, int]:
    """Of all kinds of ops together."""
    return {"ops": sum(e.ops for e in entries.values()), "bytes": sum(e.bytes for e in entries.values())}


def summary(traffic: Traffic) -> dict[str, object]:
    """Of all parts together, and of each."""
    parts = {part: totals(entries) for part, entries in traffic.parts.items()}
    return {key: sum(part[key] for part in parts.values()) for key in ("ops", "bytes")} | {"parts": parts}


def report(traffic: Traffic) -> str:
    """A table by op."""
    header = ("op", "number", "read, MB", "written, MB", "scratch, MB")
    lines = []
    for part, entries in traffic.parts.items():
        found = totals(entries)
        lines.append(f"{part}: {found['ops']} ops, {found['bytes'] / 1e9:.2f} GB")
        ordered = sorted(entries.items(), key=lambda item: -item[1].bytes)
        rows = [
            (name, str(e.ops), *(f"{size / 1e6:.1f}" for size in (e.read, e.written, e.scratch)))
            for name, e in ordered
        ]
        lines.append(harness.table(rows, header))
    whole = summary(traffic)
    return "\n".join([*lines, f"together: {whole['ops']} ops, {whole['bytes'] / 1e9:.2f} GB"])


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name, preset in presets.PRESETS.items() if preset.stages()]
    parser.add_argument("--preset", default="edm-cifar10", choices=known)
    parser.add_argument(
        "--counts", type=_counts, default=(92, 3, 1), help="samples of each stage (default: 92,3,1)"
    )
    parser.add_argument("--forward", action="store_true", help="one evaluation without gradients")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    preset = presets.find(options.preset)
    if (
        len(options.counts) != len(preset.boundaries) - 1
        or min(options.counts) < 0
        or not sum(options.counts)
    ):
        parser.error(
            f"--counts: {options.preset} has {len(preset.boundaries) - 1} stages, got {options.counts}"
        )
    traffic = (forward if options.forward else training_step)(preset, options.counts)
    print(json.dumps(summary(traffic)) if options.json else report(traffic))
    return 0


if __name__ == "__main__":
    sys.exit(main())
