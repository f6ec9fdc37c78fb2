"""Multi-stage diffusion models (arXiv 2312.09181): one encoder, one decoder per stage of noise levels.

The names below are imported when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

import importlib

_EXPORTS = {
    "clustering": ("FoundStages", "find_stages"),
    "noise.stages": ("Stages", "StagesError"),
    "noise.preconditioning": (
        "EDMPreconditioner",
        "IDDPMPreconditioner",
        "Preconditioner",
        "SchedulePreconditioner",
        "precondition",
    ),
    "noise.losses": ("denoising_loss", "edm_loss"),
    "noise.noise_levels": ("MixedNoise", "StratifiedNoise", "SystematicNoise"),
    "noise.distributions": ("LogLogistic", "LogNormal", "Uniform"),
    "noise.levels": ("edm_sigmas", "vp_sigma", "vp_t"),
    "noise.schedules": ("EDM", "LDM", "VE", "VP", "FlowMatching"),
    "sampling.samplers": ("SamplerConfig", "SeededNoise", "generate", "heun", "sample", "sampler_config"),
    "sampling.dpm_solver": ("DDIMConfig", "DPMMultistepConfig", "DPMSinglestepConfig"),
    "sampling.service": ("Request", "SampleError", "SamplerService"),
    "data.augmentation": ("Augmentation",),
    "presets": ("PRESETS",),
    "training.ema": ("EMA",),
    "training.checkpoints": ("CheckpointError", "load_model"),
    "official.network_files": ("CheckpointFileError", "load_denoiser", "load_network"),
    "sampling.cuda_graphs": ("GraphedFunction", "GraphedNetwork"),
    "training.data_parallel": ("Processes",),
    "networks.stage_order": ("StageOrder",),
    "training.parameters": ("FlatGradients", "StageParameters"),
    "training.trainer": ("Trainer", "train"),
    "training.configure": ("configure",),
    "training.config": ("TrainingConfig",),
    "evaluation": ("Evaluation", "evaluate"),
    "data.images": ("DataError", "ImageData", "load_images"),
}
_SOURCE = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_SOURCE)


def __getattr__(name: str):
    if name not in _SOURCE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_SOURCE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
