"""Import from and export to the parameter names and shapes of the paper's reference implementation.

One module per family says how the reference's constructor arguments and parameter names map to a network here.
Checkpoints of the original, unified networks of a family are taken as well.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multistage_diffusion.common.checks import one_of
from multistage_diffusion.networks import build as build_network
from multistage_diffusion.networks.layers import OnStages, StageModule
from multistage_diffusion.networks.network_limits import at_most
from multistage_diffusion.networks.stage_network import StageNetwork
from multistage_diffusion.official import edm, ldm, ncsnpp, uvit
from multistage_diffusion.official.entries import Family, Place, tensors
from multistage_diffusion.official.pickles import shown

__all__ = [
    "FAMILIES",
    "build",
    "export",
    "fill",
    "irregular",
    "load",
    "made",
    "shown",
    "start_multistage",
    "summary",
]

VALUES = ("parameters", "gradients")
FAMILIES: dict[str, Family] = {
    "edm": edm.FAMILY,
    "ncsnpp": ncsnpp.FAMILY,
    "ldm": ldm.FAMILY,
    "uvit": uvit.FAMILY,
}
# So many more than a checkpoint has are still built, without memory, to say which of them are missing.
MORE_TENSORS = 2000
# Arguments that count layers, each of which has tensors.
DEPTHS = ("num_blocks", "num_res_blocks", "transformer_depth", "depth")


def build(family: str, config: Mapping[str, object]) -> nn.Module:
    """The network that the reference's constructor builds from the arguments ``config``, with fresh weights.

    Raises:
        ValueError: an unknown family, or an argument that is unknown, not supported, or of another type.
    """
    rules = _family(family)
    try:
        return rules.build(config)
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError, ZeroDivisionError) as error:
        arguments = ", ".join(f"{shown(name)}={reprlib.repr(value)}" for name, value in config.items())
        raise ValueError(
            f"official: {family} cannot be built of {arguments}: {error}; check the types of these arguments"
        ) from error


def load(state_dict: Mapping[str, Tensor], family: str, config: Mapping[str, object]) -> nn.Module:
    """Builds a network and fills it with the parameters of a reference checkpoint.

    Args:
        state_dict: tensors under the reference's names, of any floating dtype.
        family: ``"edm"``, ``"ncsnpp"``, ``"ldm"`` or ``"uvit"``.
        config: the reference constructor's arguments.

    Returns:
        The network, in float32 and training mode.

    Raises:
        ValueError: an unknown family, an argument that is not supported, parameters that are missing, extra or of
            another shape, not dense, not floating point or not finite in float32, or constants that contradict
            ``config``; the message names the first ones.
    """
    for name in DEPTHS:
        if isinstance(depth := config.get(name), int) and depth > len(state_dict):
            raise ValueError(
                f"official.load: {name}={reprlib.repr(depth)} is more than the checkpoint's {len(state_dict)} tensors"
            )
    return made(lambda: build(family, config), state_dict)


def made(make: Callable[[], nn.Module], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """A network that holds the parameters of a reference checkpoint; one of another size takes no memory.

    Raises:
        ValueError: as :func:`load`.
    """
    with torch.device("meta"):
        with at_most(len(state_dict) + MORE_TENSORS):
            network = make()
        _fitting(network, state_dict)
    network = make()
    fill(network, state_dict)
    return network


def fill(network: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copies the parameters of a reference checkpoint into a network; all of them or, with an error, none.

    Raises:
        ValueError: as :func:`load`.
    """
    expected, given = _fitting(network, state_dict)
    rules = _family(network.family)
    contradicted = [
        name for name, value in rules.constants(network) if name in given and not _agrees(given[name], value)
    ]
    if contradicted and rules.constants_matter:
        raise ValueError(
            f"official.load: {summary('constants that contradict config', contradicted)}; check the filter "
            "in config"
        )
    infinite = [
        name for name, place in expected.items() if not given[name].to(place.view.dtype).isfinite().all()
    ]
    if infinite:
        raise ValueError(
            f"official.load: {summary('tensors with values that are not finite in float32', infinite)}; "
            "the checkpoint is damaged, or its training diverged"
        )
    with torch.no_grad():
        for name, place in expected.items():
            place.write(given[name])


def irregular(tensor: object) -> str:
    """Why something is no dense floating point tensor with values; empty where it is one."""
    if not isinstance(tensor, Tensor):
        return f"is of the type {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is of the layout {str(tensor.layout).removeprefix('torch.')}, not dense"
    if tensor.is_meta:
        return "is on the device meta, without values"
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return "repeats its values without holding them"
    return "" if tensor.is_floating_point() else f"is of {tensor.dtype}, not floating point"


def _fitting(
    network: nn.Module, state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, Place], dict[str, Tensor]]:
    """The network's parameters and the tensors for them by name, which agree in names, kind and shapes."""
    rules = _family(network.family)
    rename = rules.unified_name(network)
    given = {rename(name): tensor for name, tensor in state_dict.items()}
    expected, constants = dict(tensors(rules.entries(network))), dict(rules.constants(network))
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected and name not in constants]
    if missing or extra:
        raise ValueError(
            f"official.load: the checkpoint does not fit a {network.family} network of this config: "
            f"{summary('missing', missing)}; {summary('unexpected', extra)}; check family and config"
        )
    odd = [f"{name} {reason}" for name, tensor in given.items() if (reason := irregular(tensor))]
    if odd:
        raise ValueError(
            f"official.load: {summary('unsuitable', odd)}; weights are dense floating point tensors"
        )
    wrong = [
        f"{name} is {list(given[name].shape)}, the network needs {list(place.shape)}"
        for name, place in expected.items()
        if given[name].shape != place.shape
    ]
    if wrong:
        raise ValueError(f"official.load: {summary('wrong shapes', wrong)}; check the widths in config")
    return expected, given


def export(network: nn.Module, values: str = "parameters") -> dict[str, Tensor]:
    """The network's parameters, or their gradients, in the reference's names and shapes.

    Args:
        network: one of the families' networks with a shared encoder (a unified network has one decoder).
        values: ``"parameters"`` (with the constants that the reference saves) or ``"gradients"`` (those that
            exist).

    Returns:
        Copies, contiguous, by name.

    Raises:
        ValueError: another ``values``, or a network without a reference: of another family, or with one encoder
            per stage.
    """
    one_of("official.export", "values", values, VALUES)
    rules = _family(network.family if isinstance(network, StageNetwork) else type(network).__name__)
    if not network.shared_encoder:
        raise ValueError(
            "official.export: the reference has no network with one encoder per stage; "
            "export needs a shared encoder, got separate networks"
        )
    gradients = values == "gradients"
    found = {name: place.read() for name, place in tensors(rules.entries(network), gradients=gradients)}
    return found if gradients else found | dict(rules.constants(network))


@dataclass(frozen=True)
class Start:
    """What a multi-stage network took over from a unified one, in parameters.

    Attributes:
        copied, total: per part (``"shared"``, ``"stage 0"``, ...) the parameters copied, and all of them.
        fresh: per part, the reference's names of the layers that start from fresh weights.
    """

    copied: dict[str, int]
    total: dict[str, int]
    fresh: dict[str, list[str]]

    def __str__(self) -> str:
        lines = []
        for part, total in self.total.items():
            line = f"{part}: {self.copied[part]:,} of {total:,} parameters copied"
            if self.fresh[part]:
                line += f"; {summary('fresh layers', self.fresh[part])}"
            lines.append(line)
        return "\n".join(lines)


def start_multistage(unified: nn.Module, decoder_widths: Sequence[int]) -> tuple[nn.Module, Start]:
    """A multi-stage network that begins with the weights of a unified one.

    Shared layers are copied, and of each decoder the layers whose shapes agree: all of them where the width is that of
    the unified network. The others start from fresh weights.

    Args:
        unified: a network with one stage.
        decoder_widths: base width of each stage's decoder.

    Raises:
        ValueError: ``unified`` has several stages, or widths that do not fit.
    """
    if unified.num_stages != 1:
        raise ValueError(
            f"official.start_multistage: needs a network with one stage, got {unified.num_stages}"
        )
    network = build_network(unified.config | {"decoder_widths": list(decoder_widths)})
    rules = _family(network.family)
    source = {name: place.view for name, place in tensors(rules.entries(unified))}
    layers: dict[tuple[StageModule, int], list[tuple[str, Tensor, Tensor | None]]] = {}
    seen = set()
    for entry in rules.entries(network):
        for stage, tensor in entry.stages():
            target = entry.view(tensor.detach())
            if target.data_ptr() in seen:  # one parameter with several names
                continue
            seen.add(target.data_ptr())
            found = (entry.named(stage), target, source.get(entry.named(0)))
            layers.setdefault((entry.module, stage), []).append(found)
    selected = {layer for part in network.modules() if isinstance(part, OnStages) for layer in part.modules()}
    report = Start({}, {}, {})
    for (layer, stage), parts in layers.items():
        own = layer.num_stages > 1 or layer in selected or network.num_stages == 1
        part = f"stage {stage}" if own else "shared"
        for counts in (report.copied, report.total):
            counts.setdefault(part, 0)
        size = sum(target.numel() for _, target, _ in parts)
        report.total[part] += size
        report.fresh.setdefault(part, [])
        if all(origin is not None and origin.shape == target.shape for _, target, origin in parts):
            report.copied[part] += size
            for _, target, origin in parts:
                target.copy_(origin)
        else:
            report.fresh[part].append(parts[0][0].rpartition(".")[0])
    return network, report


def _family(family: str) -> Family:
    one_of("official", "family", family, FAMILIES)
    return FAMILIES[family]


def _agrees(given: Tensor, value: Tensor) -> bool:
    return given.shape == value.shape and torch.allclose(given.double(), value.double(), rtol=1e-3, atol=1e-6)


def summary(kind: str, names: list[str], most: int = 3) -> str:
    """How many names are of a kind, and the first of them."""
    if not names:
        return f"nothing {kind}"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {kind}: {', '.join(map(shown, names[:most]))}{more}"
