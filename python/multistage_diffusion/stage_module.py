"""What the stage-grouped layers have in common: packed parameters that are saved and loaded per stage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from msd_kernels import StageWeights

from .network_limits import count_tensors

__all__ = ["StageModule"]


class StageModule(nn.Module):
    """A module whose parameters are packed over the stages but saved and loaded per stage.

    Whatever else is registered on it, in a subclass for instance, is saved and loaded as PyTorch does. Packed
    parameters are vectors: ``torch.nn.utils.weight_norm`` and ``spectral_norm`` would not see the stages' own weights.

    Attributes:
        num_stages: stages that the module holds weights of.
        stage_ids: their numbers in the network, which name the parameters; see :class:`OnStages`.
    """

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self.num_stages = num_stages
        self.stage_ids = tuple(range(num_stages))
        self._stage_shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def add_stage_parameter(self, name: str, shapes: Sequence[tuple[int, ...]]) -> StageWeights:
        """Registers one flat parameter for tensors of ``shapes``, uninitialised."""
        count_tensors(len(shapes))
        self._stage_shapes[name] = tuple(tuple(shape) for shape in shapes)
        setattr(self, name, nn.Parameter(torch.empty(sum(math.prod(shape) for shape in shapes))))
        return self.packed(name)

    def packed(self, name: str, dtype: torch.dtype | None = None) -> StageWeights | None:
        """The parameter as the ops take it, cast to ``dtype``; None for a parameter that the layer lacks."""
        parameter = getattr(self, name)
        if parameter is None:
            return None
        return StageWeights(parameter if dtype is None else parameter.to(dtype), self._stage_shapes[name])

    def stage_tensors(self, name: str, values: Tensor | None = None) -> list[Tensor]:
        """Each stage's part of a parameter, or of ``values`` (its gradient, say), as a view in its own shape."""
        flat = getattr(self, name).detach() if values is None else values
        return StageWeights(flat, self._stage_shapes[name]).tensors()

    def stage_parameter_names(self) -> Iterator[str]:
        """The names of the packed parameters."""
        return iter(self._stage_shapes)

    def _others(self) -> StageModule:
        """This module without its packed parameters and buffers, for PyTorch's own code; all else is shared."""
        others = object.__new__(type(self))
        others.__dict__.update(self.__dict__)
        for kind in ("_parameters", "_buffers"):
            entries = getattr(self, kind).items()
            others.__dict__[kind] = {name: t for name, t in entries if name not in self._stage_shapes}
        return others

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name in self._stage_shapes:
            flat = getattr(self, name)
            tensors = self.stage_tensors(name, flat if keep_vars else flat.detach())
            for stage, tensor in zip(self.stage_ids, tensors, strict=True):
                destination[f"{prefix}{name}.{stage}"] = tensor
        nn.Module._save_to_state_dict(self._others(), destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        others, unknown = self._others(), []
        nn.Module._load_from_state_dict(
            others, state_dict, prefix, local_metadata, strict, missing_keys, unknown, error_msgs
        )
        self._parameters.update(others._parameters)  # some may be new objects
        self._buffers.update(others._buffers)
        assign = local_metadata.get("assign_to_params_buffers", False)
        known = set()
        for name in self._stage_shapes:
            keys = [f"{prefix}{name}.{stage}" for stage in self.stage_ids]
            known.update(keys)
            views, given = self.stage_tensors(name), {}
            for stage, (key, view) in enumerate(zip(keys, views, strict=True)):
                if key not in state_dict:
                    missing_keys.append(key)
                elif problem := _misfit(state_dict[key], view, assign):
                    error_msgs.append(f"{key} {problem}")
                else:
                    given[stage] = state_dict[key].detach()
            if assign and given:
                tensors = [given.get(stage, view) for stage, view in enumerate(views)]
                if problem := self._assign(name, tensors):
                    error_msgs.append(f"{prefix}{name} {problem}")
                continue
            if views[0].is_meta and not all(tensor.is_meta for tensor in given.values()):
                warnings.warn(
                    f"{prefix}{name} is on the meta device, where copying from a checkpoint does nothing; "
                    "load_state_dict(..., assign=True) puts the checkpoint's values in its place",
                    stacklevel=2,
                )
            for stage, tensor in given.items():
                views[stage].copy_(tensor)
        unexpected_keys.extend(key for key in unknown if key not in known)

    def _assign(self, name: str, tensors: Sequence[Tensor]) -> str | None:
        """Puts these stages' values in place of a parameter, in their dtype and on their device, or says why not."""
        kinds = sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors})
        if len(kinds) > 1 or not tensors[0].is_floating_point():
            return f"must have one floating dtype and device in all stages to be assigned, got {', '.join(kinds)}"
        packed = getattr(self, name)
        flat = torch.empty(packed.shape, dtype=tensors[0].dtype, device=tensors[0].device)
        for view, tensor in zip(self.stage_tensors(name, flat), tensors, strict=True):
            view.copy_(tensor)
        if isinstance(packed, nn.Parameter):
            flat = nn.Parameter(flat, requires_grad=packed.requires_grad)
        setattr(self, name, flat)
        return None


def _misfit(given, view: Tensor, assign: bool) -> str | None:
    """Why a checkpoint's entry cannot be a stage's part of a parameter; None where it can."""
    if not isinstance(given, Tensor):
        return f"must be a tensor, got {type(given).__name__}"
    if given.shape != view.shape:
        return f"has shape {list(given.shape)}, the network needs {list(view.shape)}"
    if given.is_meta and not view.is_meta and not assign:
        return f"is on the meta device and has no values to copy to {view.device}"
    return None
