"""Import from and export to the parameter names and shapes of the paper's reference implementation."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multistage_diffusion.layers import StageConv2d, StageModule
from multistage_diffusion.networks import EDMUNet

__all__ = ["export", "load"]

VALUES = ("parameters", "gradients")


@dataclass(frozen=True)
class Family:
    """How one family's reference names map to a network here.

    Attributes:
        build: the reference constructor's arguments -> network.
        name: (module path here, parameter name, stage) -> reference name.
        buffers: names and values of the constants that the reference keeps in its state dict.
    """

    build: Callable[[Mapping[str, object]], nn.Module]
    name: Callable[[str, str, int], str]
    buffers: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]


def load(state_dict: Mapping[str, Tensor], family: str, config: Mapping[str, object]) -> nn.Module:
    """Builds a network and fills it with the parameters of a reference checkpoint.

    Args:
        state_dict: tensors under the reference's names.
        family: ``"edm"``.
        config: the reference constructor's arguments.

    Raises:
        ValueError: an unknown family, an argument that is not supported, or parameters that are missing, extra or of
            another shape; the message names the first ones.
    """
    rules = _family(family)
    network = rules.build(config)
    expected = dict(_entries(network, rules))
    constants = {name for name, _ in rules.buffers(network)}
    missing = [name for name in expected if name not in state_dict]
    extra = [name for name in state_dict if name not in expected and name not in constants]
    if missing or extra:
        raise ValueError(
            f"official.load: the checkpoint does not fit a {family} network of this config: "
            f"{_summary('missing', missing)}; {_summary('unexpected', extra)}; check family and config"
        )
    wrong = [
        f"{name} is {list(state_dict[name].shape)}, the network needs {list(view.shape)}"
        for name, view in expected.items()
        if state_dict[name].shape != view.shape
    ]
    if wrong:
        raise ValueError(f"official.load: {_summary('wrong shapes', wrong)}; check the widths in config")
    with torch.no_grad():
        for name, view in expected.items():
            view.copy_(torch.as_tensor(state_dict[name]))
    return network


def export(network: nn.Module, values: str = "parameters") -> dict[str, Tensor]:
    """The network's parameters, or their gradients, in the reference's names and shapes.

    Args:
        network: one that :func:`load` builds.
        values: ``"parameters"`` (with the reference's constant buffers) or ``"gradients"`` (those that exist).

    Raises:
        ValueError: another ``values``, or a network of a family without a reference.
    """
    if values not in VALUES:
        raise ValueError(f"official.export: values must be one of {', '.join(VALUES)}, got {values!r}")
    rules = _family(getattr(network, "family", type(network).__name__))
    if values == "parameters":
        found = {name: view.clone(memory_format=torch.contiguous_format) for name, view in _entries(network, rules)}
        return found | dict(rules.buffers(network))
    return {
        name: view.clone(memory_format=torch.contiguous_format)
        for name, view in _entries(network, rules, gradients=True)
    }


def _family(family: str) -> Family:
    if family not in FAMILIES:
        raise ValueError(f"official: family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family]


def _entries(network: nn.Module, rules: Family, *, gradients: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(reference name, view of the parameter or of its gradient) for every stage of every layer."""
    for path, module in network.named_modules():
        if not isinstance(module, StageModule):
            continue
        for parameter in module.stage_parameter_names():
            flat = getattr(module, parameter)
            values = flat.grad if gradients else flat.detach()
            if values is None:
                continue
            for stage, view in enumerate(module.stage_tensors(parameter, values)):
                yield rules.name(path, parameter, stage), view


def _summary(kind: str, names: list[str], most: int = 3) -> str:
    if not names:
        return f"nothing {kind}"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {kind}: {', '.join(names[:most])}{more}"


EDM_ARGUMENTS = {
    "img_resolution": "image_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "channel_mult": "channel_mult",
    "num_blocks": "num_blocks",
    "attn_resolutions": "attn_resolutions",
    "dropout": "dropout",
    "channel_mult_emb": "channel_mult_emb",
    "label_dim": "label_dim",
    "augment_dim": "augment_dim",
    "label_dropout": "label_dropout",
}
EDM_FIXED = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}


def _build_edm(config: Mapping[str, object]) -> EDMUNet:
    config = dict(config)
    stages = config.pop("stage_interval", None)
    arguments = {
        "encoder_widths": [config.pop("en_model_channels", 128)],
        "decoder_widths": config.pop("de_model_channels", [192, 128, 16]),
    }
    for name, value in EDM_FIXED.items():
        given = config.pop(name, value)
        if given != value:
            raise ValueError(f"official.load: edm networks with {name}={given!r} are not supported, only {value!r}")
    for name, own in EDM_ARGUMENTS.items():
        if name in config:
            arguments[own] = config.pop(name)
    if config:
        raise ValueError(f"official.load: unknown arguments for edm: {', '.join(sorted(config))}")
    num_stages = len(ast.literal_eval(stages.replace("inf", "1e999")) if isinstance(stages, str) else stages or ())
    if stages is not None and num_stages != len(arguments["decoder_widths"]):
        raise ValueError(
            f"official.load: stage_interval names {num_stages} stages, "
            f"de_model_channels {len(arguments['decoder_widths'])}"
        )
    return EDMUNet(**arguments)


EDM_ATTENTION = {"attention.norm": "norm2", "attention.qkv": "qkv", "attention.proj": "proj"}


def _edm_name(path: str, parameter: str, stage: int) -> str:
    for own, theirs in EDM_ATTENTION.items():
        path = re.sub(rf"\.{re.escape(own)}$", f".{theirs}", path)
    path = re.sub(r"^embedding\.", "", path)
    path = re.sub(r"^dec\.", f"decs.{stage}.", path)
    return f"{path}.{parameter}"


def _edm_buffers(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in network.named_modules():
        if isinstance(module, StageConv2d) and module.resample is not None:
            taps = torch.tensor(module.filter, dtype=torch.float32)
            value = torch.outer(taps, taps) / taps.sum() ** 2
            stages = module.num_stages if path.startswith("dec.") else 1
            for stage in range(stages):
                yield _edm_name(path, "resample_filter", stage), value[None, None].clone()


FAMILIES = {"edm": Family(_build_edm, _edm_name, _edm_buffers)}
