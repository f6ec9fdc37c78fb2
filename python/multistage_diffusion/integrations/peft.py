"""LoRA (arXiv 2106.09685) on stage layers, by ``peft``: every stage has a pair of matrices of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from msd_kernels import StageBatch, grouped_linear
from multistage_diffusion.networks.layers import (
    PerStage,
    StageConv2d,
    StageLinear,
    StageModule,
    fan_in_uniform,
)

__all__ = ["LoraStage", "on_stage_layers"]


def on_stage_layers(config: LoraConfig) -> LoraConfig:
    """Has ``peft`` adapt the stage layers that ``config`` targets, and returns it.

    ``peft`` keeps this in no file: call it on a loaded configuration, too. It has no public way to make layers known
    to it: this uses the private ``LoraConfig._register_custom_module``.

    Example::

        model = get_peft_model(network, on_stage_layers(LoraConfig(target_modules=["up", "merge"])))
        ...
        config = on_stage_layers(LoraConfig.from_pretrained(folder))
        model = PeftModel.from_pretrained(network, folder, config=config)
    """
    config._register_custom_module({StageConv2d: LoraStage, StageLinear: LoraStage})
    return config


class LoraStage(StageModule, LoraLayer):
    """A :class:`StageConv2d` or :class:`StageLinear` that stays as it is, plus ``scaling · B_s(A_s(x))`` in stage s.

    ``A_s`` has the shape of the layer's weight with ``r`` outputs, ``B_s`` is ``[out, r]``. What they add enters the
    layer as its residual, so three launches serve all stages. ``peft`` makes these layers: :func:`on_stage_layers`.

    Raises:
        ValueError: a rank below 1; a variant (DoRA and others), an initialisation other than ``peft``'s own, "gaussian"
            or none, or a bias of the adapter, none of which is there for stage layers.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **_
    ) -> None:
        super().__init__(base_layer.num_stages)
        LoraLayer.__init__(self, base_layer)
        self.stage_ids = self.get_base_layer().stage_ids
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(module, StageConv2d):
            return module.in_channels, module.out_channels
        return module.in_features, module.out_features

    def holders(self) -> dict[str, PerStage]:
        """What the adapters hold per stage; the layer itself is a module of its own."""
        kinds = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        return {f"{kind}.{name}": holder for kind, held in kinds.items() for name, holder in held.items()}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **_) -> None:
        """Adds an adapter; it adds nothing to the layer yet, unless its initialisation is left out."""
        self._require_plain(r, config)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        weights = self.get_base_layer().weight()
        down = [torch.empty(r, *weight.shape[1:]) for weight in weights]
        up = [torch.zeros(out, r) for out in self.out_features]
        for tensor in down:
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(tensor, std=1 / r)
            else:
                fan_in_uniform(tensor, tensor[0].numel(), r)
        if config.init_lora_weights is False:
            for tensor in up:
                fan_in_uniform(tensor, r, len(tensor))
        for held, tensors in ((self.lora_A, down), (self.lora_B, up)):
            held[adapter_name] = PerStage(tensors)
            held[adapter_name].renumber(self.stage_ids)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _require_plain(self, r: int, config: LoraConfig) -> None:
        if r < 1:
            raise ValueError(f"LoraStage: r must be >= 1, got {r}")
        if config.lora_bias:
            raise ValueError("LoraStage: lora_bias must be False, got True")
        if config.init_lora_weights not in (True, False, "gaussian"):
            given = repr(config.init_lora_weights)
            raise ValueError(f"LoraStage: init_lora_weights must be True, False or 'gaussian', got {given}")
        self.resolve_lora_variant(config=config)  # raises for all but plain LoRA

    def forward(
        self,
        x: StageBatch,
        *,
        skip: StageBatch | Tensor | None = None,
        residual: StageBatch | None = None,
        **others,
    ) -> StageBatch:
        """Takes and returns what the layer itself does."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        sources = {} if skip is None else {"skip": skip}
        if not (self.disable_adapters or self.merged):
            for name in self.active_adapters:
                if name in self.lora_A:
                    added = self._added(name, x, sources)
                    residual = (
                        added if residual is None else added.with_values(added.values + residual.values)
                    )
        return self.base_layer(x, residual=residual, **sources, **others)

    def _added(self, name: str, x: StageBatch, sources: dict[str, StageBatch | Tensor]) -> StageBatch:
        """What one adapter adds to the layer's output."""
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        x, sources = _mapped(dropout, x), {key: _mapped(dropout, source) for key, source in sources.items()}
        down = base.convolve if isinstance(base, StageConv2d) else grouped_linear
        h = down(x, self.lora_A[name](), **sources)
        return grouped_linear(h.with_values(h.values * self.scaling[name]), self.lora_B[name]())

    def delta_weights(self, adapter_name: str) -> list[Tensor]:
        """What an adapter amounts to: one summand of each stage's weight, in its shape."""
        parts = self.lora_B[adapter_name](), self.lora_A[adapter_name](), self.get_base_layer().weight()
        return [
            (self.scaling[adapter_name] * (up @ down.flatten(1))).view_as(weight)
            for up, down, weight in zip(*parts, strict=True)
        ]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters, the active ones by default, to the layer's own weights.

        Raises:
            ValueError: with ``safe_merge``, weights that would not be finite; they are left as they were.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            weights = self.get_base_layer().weight()
            merged = [weight + delta for weight, delta in zip(weights, self.delta_weights(name), strict=True)]
            if safe_merge and not all(torch.isfinite(weight).all() for weight in merged):
                raise ValueError(
                    f"LoraStage: merging adapter {name!r} would make weights that are not finite"
                )
            for weight, value in zip(weights, merged, strict=True):
                weight.copy_(value)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes merged adapters out of the layer's own weights again, up to rounding."""
        while self.merged_adapters:
            deltas = self.delta_weights(self.merged_adapters.pop())
            for weight, delta in zip(self.get_base_layer().weight(), deltas, strict=True):
                weight.sub_(delta)

    def extra_repr(self) -> str:
        return f"r={dict(self.r)}"


def _mapped(function: Callable[[Tensor], Tensor], features: StageBatch | Tensor) -> StageBatch | Tensor:
    return features.map(function) if isinstance(features, StageBatch) else function(features)
