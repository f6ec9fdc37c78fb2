"""What may be set of a training run: every field carries its check, its option of ``msd train`` and its help.

Importing this module is quick, as the command line needs it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import partial
from typing import TYPE_CHECKING

from multistage_diffusion.common.settings import (
    Choice,
    Flag,
    Instance,
    Number,
    Setting,
    Several,
    number,
    seed,
    setting,
    settings_of,
    whole,
)
from multistage_diffusion.noise import SCHEDULE_NAMES

if TYPE_CHECKING:
    from multistage_diffusion.noise.stages import Stages

GROUPS = {
    "data and run": None,
    "network": None,
    "stages and noise levels": "sigma is in units of the data, which is in [-1, 1]",
    "optimisation": None,
}
RUN, NETWORK_GROUP, NOISE, OPTIMISATION = GROUPS
run, noise, optimisation = (partial(setting, group=group) for group in (RUN, NOISE, OPTIMISATION))
# What may differ between a run and its continuation: none of it changes what the steps compute, up to rounding and the
# draws of dropout. The images are known by their fingerprint, wherever they lie.
FREE = {
    "data",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "sample_every",
    "sample_count",
    "accumulate",
}
COUNT, POSITIVE, OBJECT = whole(1), number(above=0), Instance(dict, "a dictionary")
STAGES = Instance(dict, "a dictionary")  # in JSON; a configuration has Stages
WIDTHS = Several(COUNT, may_be_empty=True)


def _edm_stages() -> Stages:
    from multistage_diffusion.noise.stages import Stages

    return Stages.edm()


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a run. Defaults are EDM's for CIFAR-10 (arXiv 2206.00364)."""

    network: dict = setting(MISSING, OBJECT, "what ``networks.build`` takes")
    stages: Stages = setting(_edm_stages, STAGES, "in sigma or in the schedule's variable")
    schedule: str = noise("edm", Choice(SCHEDULE_NAMES), "how noise levels are drawn and told to the network")
    prediction: str | None = noise(
        None,
        Choice(("epsilon", "x0", "v")),
        "what the network predicts, where the schedule is not edm; none: the usual, v for flow, else epsilon",
    )
    data: str = run(
        "digits",
        Instance(str, "a string", "SOURCE"),
        '"digits", or a folder, .zip, .npy or .npz of images (not needed with --resume)',
    )
    values: str = run(
        "images",
        Choice(("images", "latents")),
        "what an array holds: images, or an autoencoder's latents of any range, used as they are",
    )
    image_size: int | None = run(None, COUNT, "pixels per side to bring the images to; none: as they are")
    augment: float | None = run(
        None,
        Number(low=0, high=1),
        "probability of each kind of augmentation, which an EDM network is told; 0: flips alone, for any network; "
        "none: images as they are",
    )
    sigma_data: float = noise(0.5, POSITIVE, "standard deviation of the data, of schedule edm")
    P_mean: float | None = noise(
        None, number(), "mean of ln sigma, of edm, and of flow before its shift; none: -1.2, 0 for flow"
    )
    P_std: float | None = noise(None, POSITIVE, "its standard deviation; none: 1.2, 1 for flow")
    shift: float = noise(
        1.0, POSITIVE, "of schedule flow: multiplies sigma, so that more times lie where there is more noise"
    )
    time_sampling: str = noise(
        "logit-normal", Choice(("logit-normal", "uniform")), "of schedule flow: how times are drawn"
    )
    stage_sampling: str = noise(
        "mixed",
        Choice(("mixed", "stratified", "systematic")),
        "draw noise levels from the schedule's distribution, each on its own (mixed) or evenly spaced (systematic: "
        "same expected loss, less variance, few mixes of stages), or draw the stages in given shares (stratified)",
    )
    stage_probabilities: tuple[float, ...] | None = noise(
        None,
        Several(),
        "of stratified sampling: share of each stage; none: all the same",
        option="--stage-shares",
    )
    drawn_stages: Stages | None = setting(
        None,
        STAGES,
        "those that stage_sampling and stage_probabilities mean, where they are not the network's: so a unified "
        "network is trained on the noise levels of a multi-stage one",
    )
    importance_weights: bool = noise(
        False, Flag, "of stratified sampling: keep the expected loss of mixed sampling"
    )
    steps: int = run(1000, COUNT, "optimizer steps")
    batch_size: int = optimisation(64, COUNT, "images per step", option="--batch")
    accumulate: int = optimisation(
        1, COUNT, "split a batch into N parts to save memory; changes rounding and dropout's draws alone"
    )
    precision: str = optimisation("fp32", Choice(("fp32", "bf16")), "of the network; bf16: by autocast")
    lr: float = optimisation(1e-3, POSITIVE, "learning rate of Adam")
    betas: tuple[float, float] = optimisation(
        (0.9, 0.999), Several(Number(low=0, below=1), length=2), "of Adam: how its two means decay"
    )
    eps: float = optimisation(1e-8, POSITIVE, "of Adam")
    weight_decay: float = optimisation(0.0, number(0), "of AdamW (arXiv 1711.05101), as a share of the rate")
    warmup_images: int = optimisation(
        0, whole(0, unit=1000), "images over which the learning rate grows", option="--warmup-kimg"
    )
    lr_decay: str = optimisation(
        "constant", Choice(("constant", "cosine")), "of the learning rate; cosine: to 0 at the last step"
    )
    gradient_clip: float | None = optimisation(
        None, number(above=0, infinite=True), "largest norm of the whole gradient; none: any"
    )
    ema_halflife_images: float = optimisation(
        500_000,
        number(0, infinite=True, unit=1000),
        "half-life of the averaged weights in images",
        option="--ema-kimg",
    )
    ema_rampup_ratio: float | None = optimisation(
        0.05,
        number(above=0, infinite=True),
        "that half-life is at most this share of the images so far; none: no ramp-up",
    )
    seed: int = run(0, seed, "of everything random")
    checkpoint_every: int = run(1000, COUNT, "steps between checkpoints")
    keep_checkpoints: int | None = run(2, COUNT, "newest checkpoints that are kept; none: all")
    log_every: int = run(50, COUNT, "steps between log records")
    sample_every: int | None = run(None, COUNT, "steps between sample grids; none: no grids")
    sample_count: int = run(16, COUNT, "images of a grid")


SETTINGS = settings_of(TrainingSettings)
TrainingSettings.__doc__ += "\n\nAttributes:\n" + "\n".join(
    f"    {name}: {one.help}." for name, one in SETTINGS.items()
)
# Arguments of a network that ``msd train`` has options for.
NETWORK = {
    "encoder_widths": Setting(
        WIDTHS, "base width of the shared encoder, or one per stage for separate networks"
    ),
    "decoder_widths": Setting(WIDTHS, "base width of each stage's decoder, lowest noise first; one: unified"),
    "channel_mult": Setting(WIDTHS, "multiple of the base width at each resolution, finest first"),
    "num_blocks": Setting(whole(1), "residual blocks per resolution"),
    "attn_resolutions": Setting(
        WIDTHS,
        "pixels per side at which there is attention: the image size, its half and so on; an empty text: none",
    ),
    "dropout": Setting(number(0), "dropout probability"),
    "depth": Setting(whole(3), "transformer blocks of a uvit"),
    "num_heads": Setting(whole(1), "attention heads of a uvit"),
    "patch_size": Setting(whole(1), "pixels per side of a uvit's token"),
}
