"""Runs every op without one private name of PyTorch: ``python private_names.py NAME...`` prints a line for each.

A process that has PyTorch alone is forked for each name, so that the library is imported where the name is hidden.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch._dynamo  # once for all children: the first backward pass imports it
from torch.autograd import forward_ad

# Without any of these all calls go through the dispatcher.
AROUND = (
    "torch._C.DispatchKey",
    "torch._C.DispatchKeySet",
    "torch._C._AutoDispatchBelowADInplaceOrView",
    "torch._C._after_ADInplaceOrView_keyset",
    "torch._C._are_functorch_transforms_active",
)
CASES = (
    "group_norm of stages",
    "group_norm of a dense tensor",
    "grouped_linear of stages",
    "grouped_conv2d of one stage",
    "attention of stages",
    "resample2d of stages",
)


def hide(name: str):
    """Takes a name away; returns what to do after the import: most come back, for PyTorch itself needs them."""
    path, _, last = name.removeprefix("torch.").rpartition(".")
    owner = torch
    for part in path.split("."):
        owner = getattr(owner, part) if part else owner
    if owner is torch.ops.aten:
        return lambda: hide_op(last)
    value = getattr(owner, last)
    delattr(owner, last)
    return (lambda: None) if owner is forward_ad else lambda: setattr(owner, last, value)


def ask_for_names() -> None:
    """Imports the module that asks, and not yet the library: PyTorch's own registration needs some of the names."""
    package = ModuleType("msd_kernels")
    package.__path__ = list(find_spec("msd_kernels").submodule_search_locations)
    sys.modules["msd_kernels"] = package
    import_module("msd_kernels._private")
    del sys.modules["msd_kernels"]


def hide_op(name: str) -> None:
    from msd_kernels.ops.attention import library as attention

    class Aten:
        def __getattr__(self, asked: str):
            if asked == name:
                raise AttributeError(asked)
            return getattr(torch.ops.aten, asked)

    attention.aten = Aten()


def results() -> list[torch.Tensor]:
    """Outputs and gradients of every op, and of one under a mode."""
    sys.path[:0] = [str(Path(__file__).resolve().parent)]
    from torch.utils.flop_counter import FlopCounterMode

    from op_calls import CALLS, forward_and_backward

    found = []
    generator = torch.Generator().manual_seed(5)
    for case in CASES:
        call = CALLS[case][1](4)
        leaves = call.leaves(generator)
        found += forward_and_backward(call, leaves)
    with FlopCounterMode(display=False):
        found += forward_and_backward(call, leaves)
    return found


def average_moves() -> None:
    # Else tests/multistage_diffusion, beside this program, hides the package.
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "python")]
    from multistage_diffusion.training.ema import _move

    averages = [torch.zeros(3), torch.ones(2)]
    _move(averages, [torch.ones(3), torch.zeros(2)], 0.25)
    torch.testing.assert_close(averages, [torch.full((3,), 0.25), torch.full((2,), 0.75)])


def child(name: str, expected: Path) -> None:
    after_import = hide(name) if name else lambda: None
    if name == "torch._foreach_lerp_":
        average_moves()
        return
    ask_for_names()
    after_import()
    if name in AROUND[1:]:  # what follows is the same for all of these
        assert not sys.modules["msd_kernels._private"].AROUND_THE_DISPATCHER
        return
    from msd_kernels import _private

    assert (name in AROUND) != _private.AROUND_THE_DISPATCHER
    found = results()
    if not name:
        torch.save(found, expected)
        return
    for ours, theirs in zip(found, torch.load(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def outcome(name: str, expected: Path) -> str:
    process = os.fork()
    if process == 0:
        try:
            child(name, expected)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return "right" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for each in ("", *sys.argv[1:]):
            print(each or "all", outcome(each, Path(folder) / "expected.pt"), flush=True)
