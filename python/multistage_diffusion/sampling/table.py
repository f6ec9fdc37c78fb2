"""The samplers by name, with the settings that each takes: for Python, presets and the command line alike.

Importing this module is quick: it holds plain data, and torch is imported where a sampler is made.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multistage_diffusion.noise.schedules import Schedule

__all__ = ["SAMPLERS", "Sampler", "find_sampler"]


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
            ("sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise"),
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
    if name not in SAMPLERS:
        raise ValueError(f"sampler_config: sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return SAMPLERS[name]
