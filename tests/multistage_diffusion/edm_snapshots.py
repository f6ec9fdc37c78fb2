"""Snapshots as EDM's training writes them, with the class's source and its state apart."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fixtures import config


@pytest.fixture
def persistence(monkeypatch, tmp_path):
    """What EDM's persistence does when it pickles: the class's source goes along, its state apart."""
    module, package = ModuleType("torch_utils.persistence"), ModuleType("torch_utils")
    ran = tmp_path / "ran"

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the real one would run the source")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", package)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    source = f"open({str(ran)!r}, 'w').close()"

    class Persistent(nn.Module):
        class_name = "SongUNet"

        def __reduce__(self):
            meta = {
                "type": "class",
                "version": 6,
                "module_src": source,
                "class_name": self.class_name,
                "state": self.__dict__,
            }
            return _reconstruct_persistent_obj, (meta,), None

    return SimpleNamespace(Persistent=Persistent, ran=ran)


def snapshot(
    persistence,
    state: dict[str, torch.Tensor],
    class_name: str = "SongUNet",
    constants: dict[str, object] | None = None,
    arguments: dict[str, object] | None = None,
) -> nn.Module:
    """A persistent network with these parameters and buffers, wrapped as EDM wraps its U-Net.

    Args:
        class_name, constants: of the wrapper, EDM's preconditioner; the constants are its attributes.
        arguments: of the network's constructor.
    """
    wrapper, network = persistence.Persistent(), persistence.Persistent()
    wrapper.class_name = class_name
    if arguments is None:
        arguments = {k: v for k, v in config("edm", "a/").items() if k != "stage_interval"}
    network._init_kwargs = arguments
    network.skip_scale = np.sqrt(0.5)
    network.constants = np.arange(3.0)
    for name, tensor in state.items():
        *path, last = name.split(".")
        owner = network
        for depth, part in enumerate(path):
            if part not in owner._modules:
                kind = nn.ModuleDict if depth == 0 and part in ("enc", "decs") else persistence.Persistent
                owner.add_module(part, kind())
            owner = owner._modules[part]
        if last == "resample_filter":
            owner.register_buffer(last, tensor)
        else:
            owner.register_parameter(last, nn.Parameter(tensor))
    wrapper.add_module("model", network)
    wrapper.sigma_max = float("inf")
    for name, value in (constants or {}).items():
        setattr(wrapper, name, value)
    return wrapper
