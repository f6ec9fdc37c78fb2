"""An op sample by sample, as :func:`msd_kernels.batch_invariant` asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any

from torch import Tensor

from msd_kernels import batch_invariance
from msd_kernels.stage_batch import StageBatch


def sample_by_sample(
    samples: Sequence[str], stages: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: inside of ``batch_invariant`` an op is called once per sample, with the stage of that sample alone.

    Its module has a function ``explain`` that checks a call.

    Args:
        samples: names of the arguments that hold samples, StageBatches or tensors; the first is always given.
        stages: names of the arguments that may hold one entry per stage.
    """

    def decorate(op: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(op)

        @wraps(op)
        def call(*args, **kwargs):
            if not batch_invariance.active():
                return op(*args, **kwargs)
            batch_invariance.refuse_compilation()
            with batch_invariance.single_samples():
                return _each_sample(op, signature.bind(*args, **kwargs).arguments, samples, stages)

        call.by_sample = True
        return call

    return decorate


def _each_sample(op, arguments: dict[str, Any], samples: Sequence[str], stages: Sequence[str]) -> Any:
    for name, value in arguments.items():
        if isinstance(value, Iterator):
            raise TypeError(
                f"{op.__name__}: inside of batch_invariant() {name} is read once per sample, which an iterator is "
                "not; pass a tensor or a sequence"
            )
    op.__globals__["explain"](**arguments)  # whatever is wrong with the call shows as it does elsewhere
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if "counts" in arguments:
        arguments["x"] = StageBatch.from_dense(arguments["x"], arguments.pop("counts"))
    first = arguments[samples[0]]
    whole = {name: arguments.pop(name) for name in samples if name in arguments}
    batch_invariance.require_cpu(*_tensors(whole.values()))
    counts = first.counts if isinstance(first, StageBatch) else (first.shape[0],)
    per_stage = {name: arguments.pop(name) for name in stages if name in arguments}
    pieces: list[list[Any]] = []
    start = 0
    for stage, count in enumerate(counts):
        own = arguments | {name: _stage(value, stage) for name, value in per_stage.items()}
        parts = [
            {name: _sample(value, stage, i, start + i) for name, value in whole.items()} for i in range(count)
        ] or [{name: _none(value, stage) for name, value in whole.items()}]
        pieces.append([op(**part, **own) for part in parts])
        start += count
    return _joined(pieces, counts)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, StageBatch):
            yield value.values
        elif isinstance(value, Tensor):
            yield value


def _stage(value: Any, stage: int) -> Any:
    """What one stage has of a sequence with an entry for each."""
    return value if isinstance(value, (int, str, Tensor)) else [value[stage]]


def _sample(value: StageBatch | Tensor | float, stage: int, of_stage: int, of_batch: int) -> Any:
    if isinstance(value, StageBatch):
        size = value.height * value.width * value.channels[stage]
        start = value.offsets[stage] + of_stage * size
        values = batch_invariance.of_one_layout(value.values[start : start + size])
        return StageBatch(values, (1,), (value.channels[stage],), value.height, value.width)
    if isinstance(value, Tensor) and value.dim():
        return batch_invariance.of_one_layout(value[of_batch : of_batch + 1])
    return value


def _none(value: StageBatch | Tensor | float, stage: int) -> Any:
    """As :func:`_sample`, of a stage that has none."""
    if isinstance(value, StageBatch):
        return StageBatch(value.values[:0], (0,), (value.channels[stage],), value.height, value.width)
    return value[:0] if isinstance(value, Tensor) and value.dim() else value


def _joined(pieces: list[list[Any]], counts: Sequence[int]) -> Any:
    results = [result for stage in pieces for result in stage]
    first = results[0]
    if isinstance(first, StageBatch):
        values = batch_invariance.joined([result.values for result in results])
        return StageBatch(
            values, counts, [stage[0].channels[0] for stage in pieces], first.height, first.width
        )
    joined = batch_invariance.joined(results)
    return joined if isinstance(first, Tensor) else type(first)(*joined)
