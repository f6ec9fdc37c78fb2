"""Which backend serves a call, and why the others do not.

Every op owns one :class:`OpBackends` that lists its candidates in order of preference. A candidate answers two
questions about a :class:`Call`, each with ``None`` or a reason: *can it serve* (``cannot``), and *should it, given that
another one is faster* (``slower``). ``auto`` takes the first candidate without a reason; ``MSD_KERNELS_BACKEND`` or
:func:`use` force one, which is then asked only whether it can.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from msd_kernels.layouts import Layout

__all__ = ["NAMES", "BackendError", "Explanation", "FallbackWarning", "use"]

NAMES = ("reference", "cpu", "triton", "cuda", "library")
VARIABLE = "MSD_KERNELS_BACKEND"

# The ops that have backends, for settings that name one.
_ops: set[str] = set()
# The choice of this thread or task alone. Autograd runs CUDA backwards in threads of its own, hence `own_choice`.
_forced: ContextVar[str | None] = ContextVar("msd_kernels_backend", default=None)


class BackendError(RuntimeError):
    """A backend was forced that cannot serve the call."""


class FallbackWarning(UserWarning):
    """A call is served by another backend than the one meant for its device. Warned once per op and reason."""


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`msd_kernels.explain`.

    Attributes:
        op: name of the op.
        backend: the backend that serves the call, or None where a forced one cannot.
        why: why this one.
        why_not: for every other backend, why it does not serve the call.
    """

    op: str
    backend: str | None
    why: str
    why_not: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend'} ({self.why})"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.why_not.items()])


class Call(NamedTuple):
    """What a choice of backend depends on.

    Attributes:
        op: name of the op.
        device: of its tensors.
        dtype: of its features; of the optimal denoiser's data.
        layout: the op's, None where it has none.
        backward: whether gradients are asked for.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    layout: Layout | None = None
    backward: bool = False


def _never(call: Call) -> str | None:
    return None


@dataclass(frozen=True)
class Candidate:
    """One backend of one op.

    Attributes:
        name: one of :data:`NAMES`.
        implementation: the module with the op's functions, which all take the same arguments as the dispatcher op.
        devices: device types that it serves, or None for all.
        cannot: ``cannot(call)`` says why it cannot serve the call, or None.
        slower: ``slower(call)`` says why another candidate is preferred although it can, or None.
    """

    name: str
    implementation: ModuleType
    devices: tuple[str, ...] | None = None
    cannot: Callable[[Call], str | None] = _never
    slower: Callable[[Call], str | None] = _never

    def reason_against(self, call: Call) -> str | None:
        kind = call.device.type
        if self.devices is not None and kind not in self.devices:
            return f"serves {' and '.join(self.devices)} tensors, got a {kind} tensor"
        return self.cannot(call)


@dataclass
class OpBackends:
    """The candidates of one op, in order of preference."""

    op: str
    candidates: Sequence[Candidate]
    _warned: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        _ops.add(self.op)

    def choose(self, x: Tensor, layout: Layout | None = None, *, backward: bool = False) -> ModuleType:
        """The implementation that serves a call on ``x``.

        Raises:
            BackendError: the forced backend cannot serve it.
        """
        device, dtype = x.device, x.dtype

        def find() -> ModuleType:
            with _current(device):
                return self._choose(Call(self.op, device, dtype, layout, backward))

        return (
            find() if layout is None else layout.derived((self.op, _setting(), device, dtype, backward), find)
        )

    def _choose(self, call: Call) -> ModuleType:
        forced = forced_backend(self.op)
        if forced is not None:
            return self._forced_candidate(forced, call).implementation
        skipped: list[tuple[str, str]] = []
        for candidate in self.candidates:
            reason = candidate.reason_against(call)
            if reason is None and candidate.slower(call) is None:
                self._warn_of_fallback(candidate, skipped)
                return candidate.implementation
            if reason is not None and (candidate.devices is None or call.device.type in candidate.devices):
                skipped.append((candidate.name, reason))
        raise BackendError(f"{self.op}: no backend serves this call: {dict(skipped)}")

    def explain(self, x: Tensor, layout: Layout | None = None) -> Explanation:
        """Names the backend that serves a call on ``x`` and the reason why each other one does not."""
        with _current(x.device):
            return self._explain(Call(self.op, x.device, x.dtype, layout))

    def _explain(self, call: Call) -> Explanation:
        forced = forced_backend(self.op)
        why_not: dict[str, str] = {}
        chosen: tuple[str, str] | None = None
        for candidate in self.candidates:
            reason = candidate.reason_against(call)
            if forced is not None and candidate.name != forced:
                reason = f"{VARIABLE} or use() forces {forced}"
            elif forced is None:
                reason = reason or candidate.slower(call)
                if reason is None and chosen is not None:
                    reason = f"{chosen[0]} comes first"
            if reason is None:
                chosen = (
                    candidate.name,
                    "forced" if forced else "the first of its order that serves this call",
                )
            else:
                why_not[candidate.name] = reason
        for name in NAMES:
            if name not in {candidate.name for candidate in self.candidates}:
                why_not[name] = f"has no implementation of {self.op}"
        if chosen is None:
            return Explanation(self.op, None, f"{forced} is forced and cannot serve it", why_not)
        return Explanation(self.op, *chosen, why_not)

    def _forced_candidate(self, forced: str, call: Call) -> Candidate:
        for candidate in self.candidates:
            if candidate.name == forced:
                reason = candidate.reason_against(call)
                if reason is None:
                    return candidate
                raise BackendError(
                    f"{self.op}: backend {forced!r} is forced but cannot serve this call: {reason}"
                )
        raise BackendError(
            f"{self.op}: backend {forced!r} is forced but has no implementation of this op; "
            f"there are {', '.join(candidate.name for candidate in self.candidates)}"
        )

    def _warn_of_fallback(self, chosen: Candidate, skipped: list[tuple[str, str]]) -> None:
        for name, reason in skipped:
            if (name, reason) not in self._warned:
                self._warned.add((name, reason))
                warnings.warn(
                    f"{self.op}: served by {chosen.name!r} because {name!r} cannot: {reason}",
                    FallbackWarning,
                    stacklevel=3,
                )


def _current(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one, which predicates ask for what it can do."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return nullcontext()
    return torch.cuda.device(device)


def own_choice() -> str | None:
    """What :func:`use` forces in this thread, or None. An op's forward keeps it for its backward."""
    return _forced.get()


def _setting() -> str:
    own = _forced.get()
    return os.environ.get(VARIABLE, "auto") if own is None else own


def forced_backend(op: str) -> str | None:
    """The backend forced for an op by :func:`use` or ``MSD_KERNELS_BACKEND``, or None for the automatic choice.

    The setting is a backend's name for all ops, or a comma-separated list of ``op=backend`` and at most one bare
    name for the other ops: ``MSD_KERNELS_BACKEND=group_norm=cpu,library``.

    Raises:
        ValueError: a name that is no backend, or no op; two backends for one op, or two bare names.
    """
    setting = _setting()
    if setting in ("auto", ""):
        return None
    chosen: dict[str, str] = {}  # by op; "" stands for the others
    for entry in setting.split(","):
        target, _, name = entry.strip().rpartition("=")
        if name not in (*NAMES, "auto"):
            raise ValueError(
                f"{VARIABLE}: unknown backend {name!r} in {setting!r}; allowed are auto, {', '.join(NAMES)}"
            )
        if target and target not in _ops:
            raise ValueError(
                f"{VARIABLE}: unknown op {target!r} in {setting!r}; allowed are {', '.join(sorted(_ops))}"
            )
        if target in chosen:
            raise ValueError(
                f"{VARIABLE}: {setting!r} names two backends for {target or 'all ops'}; one is allowed"
            )
        chosen[target] = name
    choice = chosen.get(op) or chosen.get("")
    return None if choice == "auto" else choice


@contextmanager
def use(setting: str) -> Iterator[None]:
    """Forces a backend inside a ``with`` block; ``setting`` as in ``MSD_KERNELS_BACKEND``, over which it wins.

    It holds for the calling thread, or the asyncio task, alone; a thread that is started inside begins without it. The
    backward of a call keeps the choice that the call was made with, wherever and in whichever thread it runs. Where the
    call was made without one, that of the thread in which its backward runs decides: on a CPU the one that calls
    ``backward``, on a GPU one of autograd's, which has none.
    """
    token = _forced.set(setting)
    try:
        forced_backend("")
        yield
    finally:
        _forced.reset(token)
