"""Which stage a network's parameters belong to, so that an optimizer leaves the decoders of absent stages alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn

from multistage_diffusion.networks.layers import StageModule, shared_layers
from multistage_diffusion.networks.stage_order import StageOrder

__all__ = ["FlatGradients", "StageParameters", "owned_parameters"]

ALIGNMENT = 32  # numbers; where each parameter begins among flat gradients


def _num_stages(network: nn.Module) -> int:
    """The stages that a network declares; 0 where it declares none."""
    return getattr(network, "num_stages", 0)


def owned_parameters(network: nn.Module) -> Iterator[tuple[int, nn.Parameter]]:
    """(stage, parameter) for all that one stage of a network alone uses.

    Raises:
        TypeError: what holds a network with stages, such as a denoiser, instead of the network.
    """
    staged = [module for module in network.modules() if isinstance(module, StageModule)]
    if staged and not _num_stages(network):
        raise TypeError(
            f"StageParameters: needs the network itself, which has num_stages, got {type(network).__name__}"
        )
    shared = set(shared_layers(network)) if staged else set()
    for module in staged:
        if module not in shared:
            yield from module.stage_parameters()


class StageParameters:
    """Has an optimizer leave the decoders of absent stages alone where several processes train one network.

    A rare stage, in 0.4 % of EDM's samples, is missing in most batches. To an optimizer a gradient of 0 is one like
    any other: momentum and weight decay would go on moving a decoder that was not trained, and Adam's averages decay
    towards 0. So parameters of a stage without samples have no gradient (None), which optimizers pass over: each
    decoder is trained by the batches that hold its stage, as where every batch is of one stage (arXiv 2312.09181). In
    one process the layers see to that, and nothing needs to be done.

    Where processes sum up their gradients (DDP, FSDP2, accelerate, Lightning), all of them need one for every
    parameter: the layers give zeros then. Attached to the optimizer, this counts the samples of each stage in every
    process, and before each step takes away the gradients of the stages that none of them had.

    Example::

        network = fully_shard(network)                     # or DistributedDataParallel(network)
        optimizer = torch.optim.AdamW(network.parameters())
        StageParameters(network, optimizer)

    It counts in every call of the network with gradients enabled, by its argument ``stage`` (ids, or a StageOrder) or
    ``counts``; a compiled network calls no hooks, nor has every network such an argument: call :meth:`count` then.

    Args:
        network: the network itself, which has ``num_stages``, or what wraps it in ``module``, as DDP does.
        optimizer: one with PyTorch's hooks, or what wraps one in ``optimizer``, as accelerate's and Lightning's do.

    Raises:
        TypeError: what holds a network with stages, such as a denoiser, instead of the network.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not _num_stages(network):
            network = dict(network.named_children()).get("module", network)
        next(owned_parameters(network), None)  # says what is wrong with the network
        self.network, self.num_stages = network, _num_stages(network) or 1
        self.samples = [0] * self.num_stages
        self._signature = signature(network.forward)
        network.absent_stages_are_left_alone = True
        network.register_forward_pre_hook(self._count_call, with_kwargs=True)
        getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._before_step)

    def count(self, counts: Sequence[int]) -> None:
        """Adds the samples of each stage in a micro-batch of this process.

        Raises:
            ValueError: not one count per stage.
        """
        _require_counts("StageParameters", counts, self.num_stages)
        self.samples = [a + b for a, b in zip(self.samples, counts, strict=True)]

    def _count_call(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        given = self._signature.bind_partial(*args, **kwargs).arguments
        if "counts" in given:
            self.count(given["counts"])
        elif "stage" in given:
            self.count(_counts(given["stage"], self.num_stages))

    def _before_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        samples = torch.tensor(self.samples)
        self.samples = [0] * self.num_stages
        if dist.is_available() and dist.is_initialized():
            if dist.get_backend() == "nccl":
                samples = samples.cuda()
            dist.all_reduce(samples)
        samples = samples.tolist()
        if not any(samples):
            if not any(group.get("lr") for group in optimizer.param_groups):
                return  # a step that moves nothing: by it distributed checkpoints have an optimizer make its state
            raise RuntimeError(
                "StageParameters: no samples were counted since the step before; call count(counts) once per "
                "micro-batch for a compiled network or one without an argument named stage or counts"
            )
        for stage, parameter in owned_parameters(self.network):
            if not samples[stage]:
                parameter.grad = None


def _counts(stage: Sequence[int] | Tensor | StageOrder, num_stages: int) -> list[int]:
    if isinstance(stage, StageOrder):
        return list(stage.counts)
    found = Counter(stage.reshape(-1).tolist() if isinstance(stage, Tensor) else map(int, stage))
    return [found[s] for s in range(num_stages)]


def _require_counts(user: str, counts: Sequence[int], num_stages: int) -> None:
    if len(counts) != num_stages:
        raise ValueError(
            f"{user}: one count per stage is needed, got {len(counts)} for {num_stages} stage(s)"
        )


class FlatGradients:
    """All gradients of a network in one tensor that stays where it is.

    That is what a CUDA graph can add to, and what processes sum up in one call. A parameter that a loss does not reach
    has the gradient 0, not None.

    Example::

        gradients = FlatGradients(network)                 # after network.to(device)
        optimizer = torch.optim.AdamW(network.parameters())
        ...
        loss.backward()
        gradients.leave_absent(counts)                     # samples of each stage in this step, of all processes
        optimizer.step()
        gradients.clear()                                  # in place of optimizer.zero_grad()

    Args:
        network: its parameters must stay what they are. Those that need no gradient have none.

    Attributes:
        values: that tensor.

    Raises:
        TypeError: what holds a network with stages, such as a denoiser, instead of the network.
        ValueError: parameters that differ in dtype or device.
    """

    def __init__(self, network: nn.Module) -> None:
        next(owned_parameters(network), None)  # says what is wrong with the network
        self.network, self.num_stages = network, _num_stages(network) or 1
        network.absent_stages_are_left_alone = True
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        kinds = {(parameter.dtype, parameter.device) for parameter in trained}
        if len(kinds) > 1:
            raise ValueError(f"FlatGradients: need one dtype and device, got {sorted(map(str, kinds))}")
        sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in trained]
        self.values = trained[0].new_zeros(sum(sizes)) if trained else torch.zeros(0)
        parts = zip(trained, self.values.split(sizes), strict=True)
        self._views = {
            parameter: part.as_strided(parameter.shape, parameter.stride()) for parameter, part in parts
        }
        self._attach()

    def __reduce__(self):
        return type(self), (self.network,)

    def _attach(self) -> None:
        for parameter, view in self._views.items():
            parameter.grad = view.detach()

    def leave_absent(self, counts: Sequence[int]) -> None:
        """Takes away the gradients of stages without samples until :meth:`clear`.

        Args:
            counts: samples of each stage that the gradients come from, of all processes together.

        Raises:
            ValueError: not one count per stage.
            RuntimeError: gradients have left the tensor, as after ``zero_grad()``, or parameters were replaced, as by
                ``load_state_dict(..., assign=True)``.
        """
        _require_counts("FlatGradients", counts, self.num_stages)
        if any(p.requires_grad and p not in self._views for p in self.network.parameters()):
            raise RuntimeError(
                "FlatGradients: parameters of the network were replaced; make FlatGradients and the optimizer anew"
            )
        if not all(_is_at(parameter.grad, view) for parameter, view in self._views.items()):
            raise RuntimeError(
                "FlatGradients: gradients have left the flat ones; drop them with clear() alone"
            )
        for stage, parameter in owned_parameters(self.network):
            if not counts[stage]:
                parameter.grad = None

    def clear(self) -> None:
        """Sets all gradients to 0."""
        self.values.zero_()
        self._attach()


def _is_at(tensor: Tensor | None, place: Tensor) -> bool:
    return tensor is not None and tensor.data_ptr() == place.data_ptr()
