"""The samplers by name, with the settings that each takes: for Python, presets and the command line alike.

Importing this module is quick: it holds plain data, and torch is imported where a sampler is made.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multistage_diffusion.common.checks import one_of
from multistage_diffusion.common.settings import Choice, Flag, Setting, number

if TYPE_CHECKING:
    from multistage_diffusion.noise.schedules import Schedule

__all__ = ["SAMPLERS", "SETTINGS", "Sampler", "find_sampler"]

HEUN, STEPS = "heun", "sampler"
SETTINGS = {
    "sigma_min": Setting(
        number(above=0),
        "lowest noise level before 0; default: 0.002, or the schedule's lowest if that is higher",
        HEUN,
    ),
    "sigma_max": Setting(
        number(above=0),
        "noise level to start from; default: 80, or the schedule's highest if that is lower",
        HEUN,
    ),
    "rho": Setting(number(above=0), "how much steps are shortened towards low noise; default: 7", HEUN),
    "S_churn": Setting(
        number(0, infinite=True), "amount of added noise; default: 0, a deterministic sampler", HEUN
    ),
    "S_min": Setting(number(0), "lowest noise level at which noise is added; default: 0", HEUN),
    "S_max": Setting(number(0, infinite=True), "highest one; default: inf", HEUN),
    "S_noise": Setting(number(0), "standard deviation of the added noise; default: 1", HEUN),
    "spacing": Setting(
        Choice(("own", "karras", "log-snr")),
        "with dpm-multistep and ddim: steps evenly spaced in the schedule's own variable, in sigma^(1/7), or in "
        "log-SNR; default: karras for edm, else own",
        STEPS,
    ),
    "denoise_to_zero": Setting(
        Flag,
        "with the other samplers than heun: one more evaluation, which removes the noise that they leave",
        STEPS,
    ),
    "eta": Setting(
        number(0), "with ddim: 0, a deterministic sampler (default), to 1, ancestral sampling", STEPS
    ),
}


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Attributes:
        name: what the command line calls it.
        title: what it is.
        steps: its steps where nothing else is asked for (network evaluations for ``"dpm-singlestep"``).
        settings: the other settings that it takes.
        kind: module and class of its configuration.
    """

    name: str
    title: str
    steps: int
    settings: tuple[str, ...]
    kind: tuple[str, str]

    def config(self, schedule: Schedule, steps: int | None = None, **settings):
        """Its configuration, of the class ``kind``, on the noise levels of a schedule.

        Raises:
            ValueError: too few steps, or settings out of their range.
            TypeError: a setting that it does not take.
        """
        module, name = self.kind
        kind = getattr(importlib.import_module(f"multistage_diffusion.sampling.{module}"), name)
        return kind.for_schedule(schedule, self.steps if steps is None else steps, **settings)


SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "heun",
            "EDM's",
            18,
            tuple(name for name, setting in SETTINGS.items() if setting.group == HEUN),
            ("samplers", "SamplerConfig"),
        ),
        Sampler(
            "dpm-singlestep",
            "DPM-Solver of order 3",
            20,
            ("denoise_to_zero",),
            ("dpm_solver", "DPMSinglestepConfig"),
        ),
        Sampler(
            "dpm-multistep",
            "DPM-Solver++(2M)",
            20,
            ("spacing", "denoise_to_zero"),
            ("dpm_solver", "DPMMultistepConfig"),
        ),
        Sampler("ddim", "DDIM", 20, ("spacing", "eta", "denoise_to_zero"), ("dpm_solver", "DDIMConfig")),
    )
}


def find_sampler(name: str) -> Sampler:
    """The sampler of this name.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    one_of("sampler_config", "sampler", name, SAMPLERS)
    return SAMPLERS[name]
