"""One parameter per stage over the layers' flat ones, for an optimizer that leaves absent stages alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .layers import StageModule, shared_layers

__all__ = ["StageParameters"]

ALIGNMENT = 32  # numbers; where each parameter begins among flat gradients


@dataclass(frozen=True)
class _Part:
    """A parameter of the optimizer and where its gradient comes from.

    Attributes:
        name: as in the network's ``state_dict``.
        parameter: shares its memory with ``source``.
        source: the network's own parameter, an attribute of ``module``.
        span: the part of a flat source; None for one that is not packed.
        stage: the network's stage that alone uses it; None for all.
    """

    name: str
    parameter: nn.Parameter
    source: nn.Parameter
    module: nn.Module
    attribute: str
    span: slice | None
    stage: int | None

    @property
    def source_name(self) -> str:
        """As in ``network.named_parameters()``."""
        return self.name if self.span is None else self.name.rpartition(".")[0]

    @property
    def is_the_networks(self) -> bool:
        """Whether the network still has that parameter, and has it in the same place."""
        if self.module._parameters.get(self.attribute) is not self.source:
            return False
        first = 0 if self.span is None else self.span.start
        return self.parameter.data_ptr() == self.source.data_ptr() + first * self.source.element_size()

    def gradient(self) -> torch.Tensor | None:
        """The source's, cut to the span; a view."""
        whole = self.source.grad
        return whole if whole is None or self.span is None else whole[self.span]


class StageParameters:
    """What to give an optimizer in place of ``network.parameters()``.

    The layers keep the weights of all stages in ONE flat parameter (:class:`multistage_diffusion.layers.StageModule`),
    whose gradient is 0 where a stage has no sample in the batch. To an optimizer that is a gradient like any other:
    momentum and weight decay go on moving a decoder that was not trained, and Adam's averages decay towards 0. A rare
    stage, in 0.4 % of EDM's samples, would be moved by noise most of the time. Here every stage's weights are a
    parameter of their own, flat and in the same memory, without a gradient where its stage is absent, which optimizers
    pass over: each decoder is trained by the batches that hold its stage, as where every batch is of one stage (arXiv
    2312.09181).

    Example::

        parameters = StageParameters(network)          # after network.to(device)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        ...
        loss.backward()
        parameters.take_gradients(counts)              # samples of each stage since the gradients were dropped
        optimizer.step()
        parameters.drop_gradients()                    # in place of optimizer.zero_grad()

    Parameters that no longer require a gradient, such as those of one decoder by their names, are left alone. All are
    vectors: groups with and without weight decay go by names, too, not by numbers of dimensions. A copy, by
    ``copy.deepcopy`` or pickle, is that of the network's copy.

    Args:
        network: the network itself, which has ``num_stages``, or one of ordinary layers. Its parameters must stay where
            they are in memory.
        flat_gradients: keep all gradients in one tensor that stays where it is: what a CUDA graph can add to, and what
            processes sum up in one call. A parameter that a loss does not reach has the gradient 0 then, not None.

    Attributes:
        names: names of the parameters, those of ``network.state_dict()``, in the order of iteration.
        flat_gradients: that tensor, or None.

    Raises:
        TypeError: what holds a network with stages, such as a denoiser, instead of the network; a network whose
            parameters are spread over processes, as by ``fully_shard``: give an optimizer its own parameters there.
        ValueError: flat gradients of parameters that differ in dtype or device.
    """

    def __init__(self, network: nn.Module, flat_gradients: bool = False) -> None:
        staged = any(isinstance(module, StageModule) for module in network.modules())
        if staged and not hasattr(network, "num_stages"):
            raise TypeError(
                f"StageParameters: needs the network itself, which has num_stages, got {type(network).__name__}"
            )
        self.network = network
        self.num_stages = getattr(network, "num_stages", 1)
        self._parts = list(_parts(network))
        self.names = [part.name for part in self._parts]
        self.flat_gradients, self._views = _flat_gradients(network) if flat_gradients else (None, {})
        self._given: list[_Part] = []  # since the last time that gradients were dropped

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (part.parameter for part in self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __reduce__(self):
        return type(self), (self.network, self.flat_gradients is not None)

    def take_gradients(self, counts: Sequence[int]) -> None:
        """Gives the parameters the network's gradients, without a copy; those of absent stages get None.

        Args:
            counts: samples of each stage that the gradients come from; where gradients are averaged over several
                processes, those of all of them together.

        Raises:
            ValueError: not one count per stage.
            RuntimeError: the network's parameters have moved in memory or were replaced, as by ``network.to(...)`` or
                ``load_state_dict(..., assign=True)``; gradients that should be flat are not, as after
                ``network.zero_grad()``; those of the step before are still there, as after ``optimizer.zero_grad()``.
        """
        if len(counts) != self.num_stages:
            raise ValueError(
                f"StageParameters: one count per stage is needed, got {len(counts)} for {self.num_stages} stage(s)"
            )
        if moved := [part.name for part in self._parts if not part.is_the_networks]:
            raise RuntimeError(
                f"StageParameters: {len(moved)} parameters of the network have moved in memory or were replaced, first "
                f"{moved[0]}; make StageParameters and the optimizer anew after network.to(...) and the like"
            )
        if self._given and all(part.parameter.grad is None for part in self._given):
            raise RuntimeError(
                "StageParameters: the network still has the gradients of the step before; drop them with "
                "drop_gradients() in place of optimizer.zero_grad()"
            )
        if not all(_is_at(parameter.grad, view) for parameter, view in self._views.items()):
            raise RuntimeError(
                "StageParameters: gradients have left flat_gradients; drop them with drop_gradients() alone"
            )
        for part in self._parts:
            absent = part.stage is not None and not counts[part.stage]
            unused = absent or not part.parameter.requires_grad
            part.parameter.grad = None if unused else part.gradient()
        self._given = [
            part for part in self._parts if part.span is not None and part.parameter.grad is not None
        ]

    def drop_gradients(self) -> None:
        """Sets all gradients to None, the network's own among them; flat ones become 0."""
        for part in self._parts:
            part.parameter.grad = None
        self._given = []
        self.network.zero_grad(set_to_none=True)
        if self.flat_gradients is not None:
            self.flat_gradients.zero_()
            for parameter, view in self._views.items():
                parameter.grad = view.detach()

    def split_state(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An optimizer's state over the network's own parameters, by ``{parameter}.{entry}``, as one over these.

        Entries of these parameters stay as they are.
        """
        parts: dict[str, list[_Part]] = {}
        for part in self._parts:
            parts.setdefault(part.source_name, []).append(part)
        known, split = set(self.names), {}
        for full_name, value in tensors.items():
            name, _, entry = full_name.rpartition(".")
            if name in known or name not in parts:
                split[full_name] = value
                continue
            for part in parts[name]:
                split[f"{part.name}.{entry}"] = value[part.span] if value.dim() else value.clone()
        return split


def _flat_gradients(network: nn.Module) -> tuple[torch.Tensor, dict[nn.Parameter, torch.Tensor]]:
    """Zeros for the gradients of all parameters, and the part of each, which becomes its ``grad``."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    kinds = {(parameter.dtype, parameter.device) for parameter in trained}
    if len(kinds) > 1:
        raise ValueError(
            f"StageParameters: flat_gradients need one dtype and device, got {sorted(map(str, kinds))}"
        )
    sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in trained]
    flat = trained[0].new_zeros(sum(sizes)) if trained else torch.zeros(0)
    views = {}
    for parameter, part in zip(trained, flat.split(sizes), strict=True):
        views[parameter] = part.as_strided(parameter.shape, parameter.stride())
        parameter.grad = views[parameter].detach()
    return flat, views


def _is_at(tensor: torch.Tensor | None, place: torch.Tensor) -> bool:
    return tensor is not None and tensor.data_ptr() == place.data_ptr()


def _parts(network: nn.Module) -> Iterator[_Part]:
    shared = set(shared_layers(network)) if hasattr(network, "num_stages") else set()
    for prefix, module in network.named_modules():
        packed = set(module.stage_parameter_names()) if isinstance(module, StageModule) else set()
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            if attribute not in packed:
                yield _Part(name, parameter, parameter, module, attribute, None, None)
                continue
            if type(parameter.detach()) is not torch.Tensor:
                raise TypeError(
                    f"StageParameters: {name} is a {type(parameter).__name__}, whose stages do not lie in memory one "
                    "after the other; give the optimizer the network's own parameters"
                )
            end = 0
            for stage, tensor in zip(module.stage_ids, module.stage_tensors(attribute), strict=True):
                span = slice(end, end + tensor.numel())
                end = span.stop
                own = nn.Parameter(parameter.detach()[span])
                own_stage = None if module in shared else stage
                yield _Part(f"{name}.{stage}", own, parameter, module, attribute, span, own_stage)
