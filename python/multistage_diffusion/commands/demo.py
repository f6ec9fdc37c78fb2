"""``msd demo``"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from multistage_diffusion.commands._options import add_command, add_machine_options, set_up_machine, whole
from multistage_diffusion.common.atomic_files import replacing

EXAMPLES = """\
  msd demo --out runs/demo
  msd demo --out runs/demo --steps 300             quicker, with worse digits
"""

NUM_SAMPLES = 256
SHOWN = 100  # ten of each digit, a column for each


def add_parser(subparsers):
    parser = add_command(
        subparsers,
        "demo",
        "Find three stages of handwritten digits, train a model on the CPU, sample from it, measure the samples.\n"
        "A demo that was stopped goes on where it was; a finished one is sampled and measured again.",
        EXAMPLES,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="folder for samples.png, loss.png, metrics.json, the checkpoints and, in stages/, the pictures of "
        "the clustering; default: runs/demo",
    )
    parser.add_argument(
        "--steps", type=whole(1), metavar="N", help="training steps; default: those of the preset"
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="S", help="of everything random; default: 0"
    )
    parser.add_argument(
        "--stages", metavar="STAGES", help="as of msd train; three of them; default: found by msd cluster"
    )
    add_machine_options(parser)
    return parser


def run(args) -> int:
    from multistage_diffusion.cli import build_parser
    from multistage_diffusion.commands import train

    device = set_up_machine(args)
    options = ["--out", str(args.out), "--seed", str(args.seed), "--device", str(device)]
    options += ["--steps", str(args.steps)] if args.steps else []
    if any((args.out / name).exists() for name in ("config.json", "checkpoints")):
        options += ["--resume", *(["--stages", args.stages] if args.stages else [])]
    else:
        options += ["--data", "digits", "--preset", "digits", "--class-conditional"]
        options += ["--stages", args.stages or str(find_stages(args.out / "stages"))]
    code = train.run(build_parser().parse_args(["train", *options]))
    if code:
        return code
    start = time.monotonic()
    metrics = measure(args.out, device)
    seconds = time.monotonic() - start
    metrics |= {"measure_seconds": round(seconds, 1), "seconds": round(metrics["train_seconds"] + seconds, 1)}
    with replacing(args.out / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    print(summary(args.out, metrics))
    return 0


def find_stages(directory: Path) -> Path:
    """Clusters the noise levels of the digits; returns the file of their stages."""
    from multistage_diffusion.cli import build_parser
    from multistage_diffusion.commands import cluster

    options = ["--data", "digits", "--schedule", "edm", "--measure", "smooth", "--samples", "100"]
    cluster.run(build_parser().parse_args(["cluster", *options, "--out", str(directory)]))
    return directory / "stages.json"


def measure(directory: Path, device) -> dict:
    """Samples from the trained model, writes samples.png, and judges the samples."""
    import torch

    from multistage_diffusion.common.plots import save_sample_grid
    from multistage_diffusion.metrics import digit_classifier, evaluate_digits
    from multistage_diffusion.sampling.samplers import class_labels, generate
    from multistage_diffusion.training.checkpoints import load_model
    from multistage_diffusion.training.run_log import RunLog

    model = load_model(directory, device=device)
    network = model.denoiser.network
    shape = (network.in_channels, network.image_size, network.image_size)
    print(f"sampling {NUM_SAMPLES} images", file=sys.stderr)
    seeds = range(NUM_SAMPLES)
    labels = class_labels(network, seeds)
    samples = generate(model.denoiser, seeds, shape, batch_size=128, dtype=torch.float32, **labels)
    images = samples.images.float()
    save_sample_grid(images[:SHOWN], directory / "samples.png", columns=network.label_dim)
    judged = digit_classifier().probabilities(images).argmax(dim=1)
    asked = labels["class_labels"].argmax(dim=1)
    log, seconds = RunLog(directory / "log.jsonl"), model.metadata["seconds"]
    records = [] if log.is_empty() else log.read()
    return {
        **evaluate_digits(images),
        "asked_digit_share": float((judged == asked).float().mean()),
        "steps": model.step,
        "train_seconds": round(seconds, 3),
        "images_per_second": round(model.images / max(seconds, 1e-9), 1),
        "loss_stage": records[-1].get("loss_stage") if records else None,
        "evaluations_per_sample": samples.evaluations,
        "evaluations_per_stage": samples.evaluations_per_stage,
    }


def summary(directory: Path, metrics: dict) -> str:
    """What the demo did, in a few lines."""
    return (
        f"{directory}: {metrics['steps']} steps at {metrics['images_per_second']:.0f} images/s, "
        f"{metrics['seconds']:.0f} s in all\n"
        f"  a classifier is sure of {metrics['confident_share']:.1%} of the samples "
        f"(real digits {metrics['confident_held_out']:.1%}, noise {metrics['confident_noise']:.1%})\n"
        f"  and takes {metrics['asked_digit_share']:.1%} for the digit that was asked for\n"
        f"  Fréchet distance {metrics['frechet_samples']:.2f} "
        f"(real digits {metrics['frechet_held_out']:.2f}, noise {metrics['frechet_noise']:.2f})\n"
        f"  see samples.png, loss.png, metrics.json"
    )
