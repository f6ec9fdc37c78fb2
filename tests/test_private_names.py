"""Private names of PyTorch: which are used, that each is asked for, and that all works without it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import msd_kernels
import multistage_diffusion

PACKAGES = [Path(package.__file__).parent for package in (msd_kernels, multistage_diffusion)]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))

# Asked for, with something else where they are gone.
ASKED = {
    "torch._C.DisableTorchFunction",
    "torch._C.DispatchKey",
    "torch._C.DispatchKeySet",
    "torch._C._AutoDispatchBelowADInplaceOrView",
    "torch._C._after_ADInplaceOrView_keyset",
    "torch._C._any_requires_grad",
    "torch._C._dynamo.eval_frame.get_eval_frame_callback",
    "torch._C._are_functorch_transforms_active",
    "torch._C._is_tracing",
    "torch._C._len_torch_dispatch_stack",
    "torch._foreach_lerp_",
    "torch.autograd._profiler_enabled",
    "torch.autograd.forward_ad._current_level",
    "torch.ops.aten._scaled_dot_product_efficient_attention",
    "torch.ops.aten._scaled_dot_product_flash_attention",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "torch.ops.aten._softmax_backward_data",
    "torch.utils._pytree.GetAttrKey",
    "torch.utils._pytree.register_pytree_node",
}
# Imported for a side effect, where there is such a module.
MODULES = {"torch._dynamo"}
# Methods of nn.Module that a module with an own form of state overrides, and so calls.
OVERRIDDEN = {"torch.nn.Module._load_from_state_dict", "torch.nn.Module._save_to_state_dict"}


def is_private(name: str) -> bool:
    """``__code__`` and its like are Python's own."""
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


class Names(ast.NodeVisitor):
    """Private names below ``torch`` of one source: those that it takes for granted, and those that it asks for."""

    def __init__(self) -> None:
        self.meanings: dict[str, str] = {}
        self.assumed: set[str] = set()
        self.asked: set[str] = set()

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.split(".")[0] == "torch":
                self.meanings[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                self._assume(alias.name)

    def visit_ImportFrom(self, node):
        if (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                self.meanings[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self._assume(f"{node.module}.{alias.name}")

    def visit_Assign(self, node):
        meaning = self.meaning(node.value)
        if meaning and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self.meanings[node.targets[0].id] = meaning
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if meaning := self.meaning(node):
            self._assume(meaning)
        else:
            self.generic_visit(node)

    def visit_Call(self, node):
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called == "ask":
            self.asked.add(f"torch.{node.args[0].value}")
        elif called == "import_module" and isinstance(node.args[0], ast.Constant):
            self._ask(node.args[0].value)
        elif called == "getattr" and len(node.args) == 3 and (owner := self.meaning(node.args[0])):
            if isinstance(node.args[1], ast.Constant):
                self._ask(f"{owner}.{node.args[1].value}")
        elif called == "_kernel" and isinstance(node.args[0], ast.Constant):
            self.asked.add(f"torch.ops.aten._scaled_dot_product_{node.args[0].value}")
        self.generic_visit(node)

    def meaning(self, node: ast.expr) -> str | None:
        """The full name of an expression of attributes below ``torch``."""
        if isinstance(node, ast.Name):
            return self.meanings.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self.meaning(node.value)):
            return f"{owner}.{node.attr}"
        return None

    def _assume(self, name: str) -> None:
        if is_private(name):
            self.assumed.add(name)

    def _ask(self, name: str) -> None:
        if name.startswith("torch.") and is_private(name):
            self.asked.add(name)


def names_of(source: str) -> Names:
    names = Names()
    names.visit(ast.parse(source))
    return names


@pytest.fixture(scope="module")
def found() -> list[Names]:
    return [names_of(path.read_text()) for path in SOURCES]


def test_private_names_are_asked_for(found):
    assert set().union(*(names.assumed for names in found)) <= OVERRIDDEN


def test_private_names_are_those_that_are_listed(found):
    assert set().union(*(names.asked for names in found)) == ASKED | MODULES


def test_private_names_would_be_noticed():
    names = names_of(
        "import torch\nfrom torch import _a\nb = torch.ops.aten\nb._c(torch.x._d)\ngetattr(b, '_e', None)"
    )
    assert names.assumed == {"torch._a", "torch.ops.aten._c", "torch.x._d"}
    assert names.asked == {"torch.ops.aten._e"}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What came out without each name, in one process that forks."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("private_names.py"), *sorted(ASKED)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    lines = dict(
        line.split(" ", 1) for line in run.stdout.splitlines() if line.startswith(("torch.", "all "))
    )
    assert lines.pop("all") == "right", run.stderr
    return {name: text if text == "right" else f"{text}: {run.stderr}" for name, text in lines.items()}


@pytest.mark.parametrize("name", sorted(ASKED))
def test_private_names_may_vanish(name, outcomes):
    """The kernels of CUDA behind SDPA cannot run here: without them a call takes the path of those without a kernel."""
    assert outcomes[name] == "right"
