"""Preconditioning: the denoiser D(x; sigma) around a raw network F.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)      (EDM, arXiv 2206.00364, eq. 7)

A family of diffusion models differs in its coefficients only: it subclasses ``Preconditioner`` and gives
them.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from multistage_diffusion.common.checks import one_of
from multistage_diffusion.common.transfer import host_to_device
from multistage_diffusion.networks.stage_network import Takes
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.schedules import EDM, IDDPM, LDM, SCHEDULES, VE, VP, FlowMatching, Schedule
from multistage_diffusion.noise.stages import Stages, StagesError


class Coefficients(NamedTuple):
    """The four scalars of D(x; sigma), each of sigma's shape."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


def edm_coefficients(sigma: torch.Tensor, sigma_data: float = 0.5) -> Coefficients:
    """c_skip, c_out, c_in and c_noise of EDM (table 1), in sigma's dtype and on its device."""
    squares = sigma * sigma + sigma_data * sigma_data
    return Coefficients(
        c_skip=sigma_data * sigma_data / squares,
        c_out=sigma * sigma_data / squares.sqrt(),
        c_in=1 / squares.sqrt(),
        c_noise=sigma.log() / 4,
    )


class Preconditioner(nn.Module):
    """D(x; sigma) around a stage network; subclasses give ``coefficients(sigma)``.

    Args:
        network: called as ``network(x, noise, stage, **conditioning)``; its ``num_stages`` must be the
            number of stages.
        stages: which noise level belongs to which stage.
    """

    def __init__(self, network: nn.Module, stages: Stages):
        super().__init__()
        stages.require_variable("sigma", type(self).__name__)
        self.schedule: Schedule = EDM()
        if network.num_stages != len(stages):
            raise ValueError(
                f"{type(self).__name__}: the network has {network.num_stages} stage(s) but {len(stages)} "
                f"were given: {stages!r}"
            )
        self.network = network
        self.stages = stages

    @classmethod
    def constant_names(cls, schedule: type[Schedule]) -> tuple[str, ...]:
        """The constants that ``made`` takes."""
        raise NotImplementedError

    @classmethod
    def schedule_with(cls, schedule: type[Schedule], constants: Mapping[str, object]) -> Schedule:
        """The schedule with those of the constants that are its own; others are the denoiser's."""
        return schedule()

    @classmethod
    def made(
        cls, network: nn.Module, stages: Stages, schedule: type[Schedule], constants: Mapping[str, object]
    ) -> Preconditioner:
        """The denoiser of a family, with constants by name; those that are not given have their defaults."""
        raise NotImplementedError

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        raise NotImplementedError

    def constants(self) -> dict[str, object]:
        """What, besides network and stages, makes another one of the same: the arguments of ``precondition``."""
        raise NotImplementedError

    def to_json(self) -> dict[str, object]:
        """Constants and stages, JSON-able; ``from_json`` inverts it."""
        return as_json(self.constants()) | {"stages": self.stages.to_json()}

    def require_own_network(self) -> None:
        """Raises ValueError where the network is known, from the file that it was read from, to be of another denoiser.

        ``network.preconditioning`` is what ``to_json`` said of that one.
        """
        said = said_of(self.network)
        if said is None:
            return
        if wrong := differences(said, self.to_json()):
            raise ValueError(
                f"{type(self).__name__}: the network is of another denoiser: {'; '.join(wrong)}; load_denoiser gives "
                "the file's own, and network.preconditioning = None says that you want another one"
            )

    def forward(
        self,
        x: torch.Tensor,
        sigma: float | Sequence[float] | torch.Tensor,
        stage: int | Sequence[int] | torch.Tensor | None = None,
        **conditioning,
    ) -> torch.Tensor:
        """The denoised x.

        Args:
            x: noisy images ``[B, C, H, W]``, any floating dtype.
            sigma: noise level of each sample ``[B]``, or one for all; > 0. Keep it on the host (a float or
                a CPU tensor): the stages are then found there, and what the device needs is copied without
                waiting. A sigma on the device is taken as well, but finding its stages makes the host wait,
                unless ``stage`` is given.
            stage: stage id of each sample, or one for all, on the host; or a ``StageOrder``, for networks that take
                one. Default: found from sigma.
            **conditioning: for the network, such as ``class_labels`` and ``augment_labels``.

        Returns:
            D(x; sigma), x's shape, in float32 (float64 for float64 x). The arithmetic outside of the
            network is done in that dtype even under autocast; the coefficients of a host sigma are computed
            in float64.

        Raises:
            TypeError: stages that are no integers.
            ValueError: a sigma on the host that is not positive and finite; as many sigmas or stages as samples
                are missing.
        """
        batch = x.shape[0]
        sigma = self.batched_sigma(sigma, batch)
        stage = self.batched_stage(stage, sigma, batch)
        dtype = torch.promote_types(x.dtype, torch.float32)
        coefficients = torch.stack(self.coefficients(sigma))
        if coefficients.device == x.device:
            coefficients = coefficients.to(dtype)
        else:
            coefficients = host_to_device(coefficients, x.device, dtype)
        return self.denoise(x, coefficients, stage, **conditioning)

    def denoise(
        self, x: torch.Tensor, coefficients: torch.Tensor, stage: torch.Tensor | StageOrder, **conditioning
    ) -> torch.Tensor:
        """As a call, with ``coefficients`` in place of sigma: nothing is copied from the host.

        Args:
            x: noisy images ``[B, C, H, W]``.
            coefficients: c_skip, c_out, c_in and c_noise of every sample ``[4, B]``, where x is.
            stage: stage ids ``[B]`` on the host, or a ``StageOrder``.
            **conditioning: for the network.
        """
        # A compiled network sees counts then, and not which sample is of which stage.
        if Takes.of(self.network).stage_order:
            stage = StageOrder.of(stage, len(self.stages), x.shape[0], x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        c_skip, c_out, c_in, c_noise = coefficients[:, :, None, None, None]
        x = x.to(dtype)
        network_dtype = self._network_dtype()
        noise_dtype = torch.promote_types(network_dtype, torch.float32)  # bfloat16 has no room for 999 steps
        F = self.network(
            (c_in * x).to(network_dtype), c_noise.flatten().to(noise_dtype), stage, **conditioning
        )
        return c_skip * x + c_out * self.prediction_in(F, x.shape[1]).to(dtype)

    def prediction_in(self, F: torch.Tensor, channels: int) -> torch.Tensor:
        """The part of the network's output that D is made of: all of it."""
        return F

    def batched_sigma(self, sigma, batch: int) -> torch.Tensor:
        """One sigma per sample ``[B]``, checked where it is on the host; float64 there. Raises as a call."""
        if not isinstance(sigma, torch.Tensor):
            sigma = torch.as_tensor(sigma, dtype=torch.float64)
        if sigma.device.type == "cpu":
            sigma = sigma.to(torch.float64)
            possible = (sigma > 0) & (sigma < math.inf)
            if not bool(possible.all()):
                raise ValueError(
                    f"{type(self).__name__}: sigma must be positive and finite, got {sigma[~possible].flatten()[0]}"
                )
        return _batched(sigma, batch, f"{type(self).__name__}: sigma")

    def batched_stage(self, stage, sigma: torch.Tensor, batch: int) -> torch.Tensor | StageOrder:
        """One stage id per sample ``[B]``, on the host; a ``StageOrder`` as it is. Raises as a call."""
        if isinstance(stage, StageOrder):
            return stage
        if stage is None:
            return self.stages.assign(sigma)
        stage = torch.as_tensor(stage, device="cpu")
        if stage.is_floating_point() and stage.numel():
            raise TypeError(f"{type(self).__name__}: stage must be integers, got {stage.dtype}")
        stage = stage.to(torch.int64)
        return _batched(stage, batch, f"{type(self).__name__}: stage")

    def _network_dtype(self) -> torch.dtype:
        for parameter in self.network.parameters():
            return parameter.dtype
        return torch.float32


def _batched(values: torch.Tensor, batch: int, name: str) -> torch.Tensor:
    if values.numel() == 1:
        return values.reshape(1).expand(batch)
    if tuple(values.shape) != (batch,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; expected one value, or one per sample: ({batch},)"
        )
    return values


class EDMPreconditioner(Preconditioner):
    """The denoiser of EDM.

    Args:
        network, stages: see ``Preconditioner``.
        sigma_data: standard deviation of the data.
        sigma_min, sigma_max: the noise levels that the network is said to serve; nothing is computed with them.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Stages,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ):
        super().__init__(network, stages)
        if not sigma_data > 0:
            raise ValueError(f"EDMPreconditioner: sigma_data={sigma_data} must be positive")
        if not 0 <= sigma_min < sigma_max:
            raise ValueError(
                f"EDMPreconditioner: 0 <= sigma_min < sigma_max is needed, got {sigma_min} and {sigma_max}"
            )
        self.sigma_data = float(sigma_data)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.require_own_network()

    @classmethod
    def constant_names(cls, schedule: type[Schedule]) -> tuple[str, ...]:
        return "sigma_data", "sigma_min", "sigma_max"

    @classmethod
    def made(
        cls, network: nn.Module, stages: Stages, schedule: type[Schedule], constants: Mapping[str, object]
    ) -> EDMPreconditioner:
        return cls(network, stages, **constants)

    def constants(self) -> dict[str, object]:
        limits = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        return {"schedule": self.schedule.name, "sigma_data": self.sigma_data, **limits}

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        return edm_coefficients(sigma, self.sigma_data)


class SchedulePreconditioner(Preconditioner):
    """The denoiser around a network that is told a schedule's time or step: score SDE, latent diffusion, flow matching.

    With x = y + sigma n, the network sees x as its schedule scales it, s x, where s = 1 / sqrt(1 + sigma²) keeps
    the variance (VP, LDM), s = 1 for VE, and s = 1 / (1 + sigma) for flow matching. What it predicts gives
    D(x; sigma)::

        "epsilon":  x - sigma F                 F predicts n; VE networks predict -n: x + sigma F
        "x0":       F                           F predicts y
        "v":        s² x - s sigma F            F predicts s (n - sigma y) (arXiv 2202.00512); not for VE
                    s x - s sigma F             flow matching: F predicts n - y

    ``c_noise`` is (M − 1) t for VP, ln(sigma / 2) for VE, the nearest step for LDM (arXiv 2206.00364, table 1), and
    1000 t for flow matching.
    The stage is that of sigma itself: next to a cut, the step that a decoder is told may be its neighbour's last.

    Args:
        network: see ``Preconditioner``.
        stages: in the schedule's variable, or in sigma.
        schedule: ``VP``, ``VE``, ``LDM`` or ``FlowMatching``.
        prediction: one of the schedule's ``predictions``; default: the first.
    """

    served: ClassVar[tuple[type[Schedule], ...]] = (VP, VE, LDM, FlowMatching)

    def __init__(self, network: nn.Module, stages: Stages, schedule: Schedule, prediction: str | None = None):
        if not isinstance(schedule, self.served):
            *others, last = [kind.__name__ for kind in self.served]
            allowed = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{type(self).__name__}: schedule must be {allowed}, got {schedule!r}")
        prediction = schedule.predictions[0] if prediction is None else prediction
        one_of(f"SchedulePreconditioner of {schedule.name}", "prediction", prediction, schedule.predictions)
        super().__init__(network, stages_in_sigma(stages, schedule))
        self.schedule, self.prediction = schedule, prediction
        self.require_own_network()

    @classmethod
    def constant_names(cls, schedule: type[Schedule]) -> tuple[str, ...]:
        return (*(field.name for field in dataclasses.fields(schedule)), "prediction")

    @classmethod
    def made(
        cls, network: nn.Module, stages: Stages, schedule: type[Schedule], constants: Mapping[str, object]
    ) -> SchedulePreconditioner:
        return cls(network, stages, cls.schedule_with(schedule, constants), constants.get("prediction"))

    @classmethod
    def schedule_with(cls, schedule: type[Schedule], constants: Mapping[str, object]) -> Schedule:
        return schedule(**{name: value for name, value in constants.items() if name != "prediction"})

    def constants(self) -> dict[str, object]:
        fields = {
            field.name: getattr(self.schedule, field.name) for field in dataclasses.fields(self.schedule)
        }
        return {"schedule": self.schedule.name, **fields, "prediction": self.prediction}

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        """On the host, in float64."""
        sigma = sigma.to("cpu", torch.float64)
        c_skip, c_out = self.schedule.skip_and_out(self.prediction, sigma)
        return Coefficients(c_skip, c_out, self.schedule.scale(sigma), self.schedule.c_noise(sigma))


class IDDPMPreconditioner(SchedulePreconditioner):
    """The denoiser around a network of improved DDPM (arXiv 2102.09672), after EDM (arXiv 2206.00364, table 1).

    D(x; sigma) = x − sigma F(x / sqrt(1 + sigma²); c_noise), where ``c_noise`` is the step with the nearest noise
    level, −1 for what is nearer to 0 than to all of them. Channels of F beyond those of x, the learned variance, are
    left out.

    Args:
        network: see ``Preconditioner``.
        stages: in sigma, or in steps.
        schedule: ``IDDPM``.
        prediction: ``"epsilon"``, ``"x0"`` or ``"v"``, as for ``SchedulePreconditioner``.
    """

    served = (IDDPM,)

    def prediction_in(self, F: torch.Tensor, channels: int) -> torch.Tensor:
        return F[:, :channels]


PRECONDITIONINGS: dict[str, type[Schedule]] = {**SCHEDULES, IDDPM.name: IDDPM}
DENOISERS: dict[str, type[Preconditioner]] = {EDM.name: EDMPreconditioner, IDDPM.name: IDDPMPreconditioner}
# They say what a network was made for, but D is the same without them.
LIMITS = ("sigma_min", "sigma_max", "epsilon_t")


def said_of(network: nn.Module) -> dict[str, object] | None:
    """What the file that a network was read from says of its denoiser; None for a network of no file."""
    return getattr(network, "preconditioning", None)


def denoiser_of(schedule: str) -> type[Preconditioner]:
    """The denoiser of a schedule's family."""
    return DENOISERS.get(schedule, SchedulePreconditioner)


def constants_of(schedule: str) -> tuple[str, ...]:
    """The names of the constants that ``precondition`` takes for a schedule."""
    return denoiser_of(schedule).constant_names(PRECONDITIONINGS[schedule])


def require_known(user: str, schedule: object, constants: Iterable[str]) -> None:
    """Raises ValueError, in the name of ``user``, for an unknown schedule, or a constant that it does not have."""
    if not isinstance(schedule, str) or schedule not in PRECONDITIONINGS:
        allowed = ", ".join(PRECONDITIONINGS)
        raise ValueError(f"{user}: schedule must be one of {allowed}, got {reprlib.repr(schedule)}")
    for name in constants:
        if name not in constants_of(schedule):
            allowed = ", ".join(constants_of(schedule))
            raise ValueError(f"{user}: {schedule} takes {allowed}, not {reprlib.repr(name)}")


def own_constants(schedule: str, values: Mapping[str, object]) -> dict[str, object]:
    """Of the settings of a run, which keeps those of all schedules, the ones that ``precondition`` takes for this.

    A schedule's other constants are not among them: a run's settings may have the same names.

    Raises:
        ValueError: an unknown schedule.
    """
    require_known("precondition", schedule, ())
    own = {"prediction", *PRECONDITIONINGS[schedule].settings}
    known = own.intersection(constants_of(schedule), values)
    return {name: values[name] for name in known}


def precondition(
    network: nn.Module,
    stages: Stages,
    schedule: str = "edm",
    sigma_data: float | None = None,
    prediction: str | None = None,
    **constants: object,
) -> Preconditioner:
    """D(x; sigma) around a network of a family that has this schedule.

    Args:
        network: see ``Preconditioner``.
        stages: in sigma or in the schedule's variable.
        schedule: "edm": ``EDMPreconditioner``; "iddpm": ``IDDPMPreconditioner``; or another key of
            ``schedules.SCHEDULES``: ``SchedulePreconditioner``.
        sigma_data: of "edm" alone; default: 0.5.
        prediction: of all others; default: the usual one of the schedule.
        **constants: of the schedule, such as ``beta_d`` for "vp"; for "edm" ``sigma_min`` and ``sigma_max``.

    Raises:
        ValueError: an unknown schedule, constant or prediction, or stages of another variable or number.
    """
    optional = {"sigma_data": sigma_data, "prediction": prediction}
    given = {name: value for name, value in optional.items() if value is not None} | constants
    require_known("precondition", schedule, given)
    return denoiser_of(schedule).made(network, stages, PRECONDITIONINGS[schedule], given)


def as_json(constants: Mapping[str, object]) -> dict[str, object]:
    """Constants as JSON has them: infinity is written as "inf", and tuples are lists."""
    found = {name: "inf" if value == math.inf else value for name, value in constants.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def from_json(network: nn.Module, values: Mapping[str, object]) -> Preconditioner:
    """The inverse of ``Preconditioner.to_json``, around a network.

    Raises:
        ValueError: values that are no such description, or do not fit the network.
    """
    constants = {name: value for name, value in values.items() if name != "stages"}
    constants |= {name: math.inf for name, value in constants.items() if value == "inf"}
    schedule = constants.pop("schedule", None)
    require_known("from_json", schedule, constants)
    try:
        return precondition(network, Stages.from_json(values.get("stages")), schedule, **constants)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"from_json: a constant of {schedule} is no number: {error}") from error


def differences(said: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """What of two descriptions, as ``Preconditioner.to_json`` gives them, makes another D, in words.

    What only the first one says, or the second one, does not count.
    """
    if said.get("schedule") != other.get("schedule"):
        return [f"the file says {said.get('schedule')}, not {other.get('schedule')}"]
    shown = reprlib.repr
    both = [name for name in said if name in other and name not in LIMITS and said[name] != other[name]]
    return [f"the file says {name}={shown(said[name])}, not {shown(other[name])}" for name in both]


def stages_in_sigma(stages: Stages, schedule: Schedule) -> Stages:
    """The same stages in sigma; those that are in sigma already as they are.

    The ends of the schedule's domain become 0 and infinity.

    Raises:
        StagesError: the stages are neither in sigma nor in the schedule's variable, do not cover its domain, or have
            none of its noise levels in an interval.
    """
    if stages.variable == "sigma":
        return stages
    stages.require_variable(schedule.variable, "stages_in_sigma")
    lowest, highest = schedule.domain
    if stages.domain != schedule.domain:
        given = " to ".join(f"{end:g}" for end in stages.domain)
        raise StagesError(
            f"stages_in_sigma: the stages cut {stages.variable} from {given}, but this {type(schedule).__name__} has "
            f"{lowest:g} to {highest:g}; cut that, as with Stages.from_boundaries(boundaries, {schedule.variable!r}, "
            "schedule.domain)"
        )
    for stage, intervals in enumerate(stages.intervals):
        if not all(schedule.holds(low, high) for low, high in intervals):
            raise StagesError(
                f"stages_in_sigma: stage {stage}, {stages.describe(stage)}, has no {schedule.variable} of this "
                f"{type(schedule).__name__} in one of its intervals"
            )

    def sigma(value: float) -> float:
        if value <= lowest:
            return 0.0
        return math.inf if value >= highest else float(schedule.sigma(value))

    return Stages([[(sigma(low), sigma(high)) for low, high in stage] for stage in stages.intervals])
