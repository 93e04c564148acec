"""Train a small model that inherits what a restoration network knows, in five stages.

1. decoder: the autoencoder's decoder learns to draw RealESRGAN_x4plus's pictures from the features
   which that has of an LQ image before it enlarges them.
2. features: the time-aware encoder and the UNet learn to give those features.
3. imitate: all of them draw that network's pictures from LQ images.
4. joint: all, at all timesteps, against the originals: by the error of pixels at small ones, by
   perceptual distance, two small adversaries and that network's detail at large ones.
5. settle: all, from what they draw by then, nearer to the originals, with fine structure where
   those have it and less of JPEG's blocks; without adversaries and so without much chance: for a
   CPU's small batches.

python examples/recipes/tiny/inherit.py --photos photos/train photos/more --out runs/inherited \
    --restorer realesrgan_x4plus.safetensors --perceptual squeezenet10.safetensors

The same command goes on where the last one stopped. It writes into --out: `networks.safetensors`
(averaged weights in fp16, to carry to another machine), `state.pt` (all else that going on needs;
without it the optimizers start anew), `log.jsonl`, and `model`, which the library opens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from inherit_networks import Restorer, Setting, build_student
from inherit_recording import Repeated
from inherit_samples import HeldOut, Pool, pack_photos, split_photos
from inherit_settle import SettleStage
from inherit_stages import (
    FAITHFUL_BELOW,
    DecoderStage,
    FeaturesStage,
    ImitateStage,
    JointStage,
    Stage,
)
from safetensors import safe_open
from safetensors.torch import save_file

from tadsr.checkpoints import load_checkpoint, save_native
from tadsr.measure.perceptual import SqueezeNetDistance
from tadsr.training.optimization import WeightAverage

STAGES = (DecoderStage, FeaturesStage, ImitateStage, JointStage, SettleStage)
"""In their order."""
LIMITS = {
    "decoder": "700s", "features": "500s", "imitate": "1500s", "joint": "3000s", "settle": "3000s",
}  # fmt: skip
RATES = {"decoder": 1e-2, "features": 6e-3, "imitate": 4e-3, "joint": 2e-3, "settle": 5e-5}
WARMUP_STEPS = 20
FINAL_FRACTION = 0.05
CANDIDATES = 3
"""Of cuDNN's ways, which are timed before a long stage; all of them take 40 s."""
NETWORKS, STATE = "networks.safetensors", "state.pt"
FACTS = {"default_process_size": 64, "default_timestep": 500, "license": "apache-2.0"}
"""What the model says of itself."""


class Limit:
    """How long a stage takes: so many steps, or "90s": seconds, of the processor on a CPU."""

    def __init__(self, text: str) -> None:
        self.is_time = text.endswith("s")
        self.amount = float(text.removesuffix("s"))

    def done(self, steps: int, seconds: float) -> float:
        """Return which share of it is over."""
        return (seconds if self.is_time else steps) / self.amount if self.amount else 1.0


class Run:
    """A run in a folder: where it is, and what it has to go on with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(args.device)
        self.is_cuda = self.device.type == "cuda"
        self.clock = time.perf_counter if self.is_cuda else time.process_time
        self.end = time.perf_counter() + args.seconds
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark_limit = CANDIDATES
        self.checkpoint, student = build_student(args.networks, args.seed)
        restorer = Restorer(args.restorer).to(self.device, memory_format=torch.channels_last)
        if self.is_cuda:
            restorer.half()
        if restorer.width != self.checkpoint.vae.config.latent_channels:
            raise SystemExit(
                f"{args.networks} must have as many latents as {args.restorer} has features: "
                f"{restorer.width}"
            )
        perceptual = SqueezeNetDistance(args.perceptual).to(self.device)
        student.to(self.device, memory_format=torch.channels_last)
        self.decoded: dict = {}
        self.photos, held_out = split_photos(args.photos, args.held_out)
        precision = {"bf16": torch.bfloat16, "fp32": None}[args.precision]
        self.setting = Setting(
            student, restorer, perceptual, HeldOut(held_out, args.held_out_px), self.device,
            precision, {name: getattr(args, f"{name}_rate") for name in RATES}, args.seed,
            args.faithful_share, self.is_cuda and not args.no_graph,
        )  # fmt: skip
        self.stage_number, self.step, self.seconds = 0, 0, 0.0
        self.state: dict = {}
        self.load()

    def load(self) -> None:
        """Take up what the folder holds."""
        if (self.out / STATE).is_file():
            self.state = torch.load(self.out / STATE, map_location="cpu", weights_only=True)
            place, tensors, whitening = (
                self.state[key] for key in ("place", "student", "whitening")
            )
        elif (self.out / NETWORKS).is_file():
            with safe_open(self.out / NETWORKS, "pt") as file:
                place = json.loads(file.metadata()["place"])
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            whitening = [tensors.pop(name) for name in sorted(tensors) if "whitening" in name]
        elif self.args.start:
            # A finished model has been through all stages; the last two can be done again.
            place, whitening = [STAGES.index(JointStage), 0, 0.0], []
            parts = load_checkpoint(self.args.start).components()
            tensors = {
                f"{part}.{name}": tensor
                for part in ("vae", "unet", "prompt_embeddings")
                for name, tensor in parts[part].state_dict().items()
            }
        else:
            return
        self.stage_number, self.step, self.seconds = place
        self.setting.student.load_state_dict(tensors)
        self.setting.whitening = [tensor.to(self.device) for tensor in whitening]

    def save(self, stage: Stage, average: WeightAverage) -> None:
        """Write both files; the second can go on from any step as if nothing had been."""
        place = [self.stage_number, self.step, self.seconds]
        student = self.setting.student
        with average.used():
            tensors = {n: t.detach().half().contiguous() for n, t in student.state_dict().items()}
            tensors |= {f"whitening.{i}": t for i, t in enumerate(self.setting.whitening)}
            write(self.out / NETWORKS, lambda path: save_file(
                {n: t.cpu() for n, t in tensors.items()}, path, {"place": json.dumps(place)}
            ))  # fmt: skip
        state = {
            "place": place, "student": student.state_dict(), "average": average.tensors,
            "whitening": self.setting.whitening, "stage": stage.state_dict(),
        }  # fmt: skip
        write(self.out / STATE, lambda path: torch.save(state, path))

    def train(self) -> None:
        """Go through what is left of the stages, or as far as the time goes."""
        is_over = False
        while self.stage_number < len(STAGES) and not is_over:
            is_over = self.train_stage(STAGES[self.stage_number](self.setting))
            self.state = {}
        self.export()

    def train_stage(self, stage: Stage) -> bool:
        """Train one stage; return whether the time of this call is over."""
        args, limit = self.args, Limit(getattr(self.args, stage.name))
        started = self.clock()
        torch.backends.cudnn.benchmark = stage.name in ("joint", "settle")
        refresh_every = self.of_stage(args.refresh_every)
        pool = Pool(
            self.photos, self.decoded, stage=self.stage_number, crop_px=self.of_stage(args.crop_px),
            size=args.pool,
            group=args.group, workers=args.workers, seed=args.seed,
            refreshments=self.step // refresh_every, describe=stage.describe,
            device=self.device, shares=[args.camera_share, self.of_stage(args.saved_share)],
        )  # fmt: skip
        if not self.setting.whitening and "features" in pool.kept:
            self.setting.measure_features(pool.kept["features"])
        average = WeightAverage(self.setting.student, args.average)
        if self.state:
            stage.load_state_dict(self.state["stage"])
            average.tensors = {n: t.to(self.device) for n, t in self.state["average"].items()}
        print(f"{stage.name}: pool of {args.pool} in {self.clock() - started:.0f} s", flush=True)
        repeated = Repeated(stage.step, is_recorded=self.setting.is_recorded)
        if self.step == 0:
            self.report(stage, average)
        is_over = False
        while limit.done(self.step, self.seconds) < 1 and not is_over:
            before = self.clock()
            share = limit.done(self.step, self.seconds)
            warmup = min(1.0, (self.step + 1) / WARMUP_STEPS)
            falling = 0.5 * (1 + math.cos(math.pi * share))
            stage.set_rates(warmup * (FINAL_FRACTION + (1 - FINAL_FRACTION) * falling))
            stage.take(pool, self.step, self.of_stage(args.batch))
            repeated()
            average.update(self.step)
            self.step += 1
            if self.step % refresh_every == 0:
                pool.refresh()
            is_reported = self.step % args.every == 0
            if is_reported and self.is_cuda:
                torch.cuda.synchronize()
            self.seconds += self.clock() - before
            if is_reported:
                self.report(stage, average)
                self.save(stage, average)
            is_over = time.perf_counter() > self.end
        pool.close()
        if limit.done(self.step, self.seconds) >= 1:
            if self.step % args.every:
                self.report(stage, average)
            average.use()
            self.stage_number, self.step, self.seconds = self.stage_number + 1, 0, 0.0
            if self.stage_number < len(STAGES):
                # What the next one starts from, with nothing of this one's optimizers.
                stage = STAGES[self.stage_number](self.setting)
            average = WeightAverage(self.setting.student, args.average)
        self.save(stage, average)
        return is_over

    def of_stage(self, numbers: list[float]) -> float:
        """Return what an option says about the stage at hand."""
        return numbers[min(self.stage_number, len(numbers) - 1)]

    def report(self, stage: Stage, average: WeightAverage) -> None:
        """Print and log how far the stage is, on photographs that it has not seen."""
        with average.used():
            figures = stage.evaluate()
        figures |= {name: value.item() for name, value in stage.figures.items()}
        place = {"stage": stage.name, "step": self.step, "seconds": round(self.seconds, 1)}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(place | figures) + "\n")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{stage.name} {self.step} ({self.seconds:.0f} s): {shown}", flush=True)

    def export(self) -> None:
        """Write the averaged weights as a folder that `TADSRPipeline.from_pretrained` opens."""
        with safe_open(self.out / NETWORKS, "pt") as file:
            names = self.setting.student.state_dict().keys()
            self.setting.student.load_state_dict({n: file.get_tensor(n) for n in names})
        facts = FACTS | {"inherited_from": Path(self.args.restorer).name}
        parts = self.checkpoint.components() | {"metadata": facts}
        for name in ("vae", "unet", "prompt_embeddings"):
            parts[name].to("cpu", memory_format=torch.contiguous_format)
        save_native(self.out / "model", **parts, dtype=torch.float16, overwrite=True)
        print(f"{self.out / 'model'}: written")


def write(path: Path, save) -> None:
    """Write a file so that it is there whole or as it was."""
    partial = path.with_suffix(".partial")
    save(partial)
    partial.replace(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--photos", nargs="+", required=True, help="folders; some of the last one are held out")
    add("--pack", metavar="FOLDER", help="only write the photographs' middles there, to carry")
    add("--restorer", help="RealESRGAN_x4plus as safetensors")
    add("--perceptual", help="SqueezeNet 1.0 as safetensors")
    add("--networks", default=str(Path(__file__).with_name("inherited_networks.yaml")))
    add("--out", default="runs/inherited")
    add("--start", metavar="MODEL", help="do the last two stages again from it, as from tadsr-tiny")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--no-graph", action="store_true", help="do not record steps as a CUDA graph")
    for name, amount in LIMITS.items():
        add(f"--{name}", default=amount, help="steps, or seconds as in 90s; 0 leaves it out")
    for name, rate in RATES.items():
        add(f"--{name}-rate", type=float, default=rate, help="largest learning rate, Muon's")
    add("--seconds", type=float, default=math.inf, help="stop after so many, to go on later")
    add("--batch", type=int, nargs="+", default=[4], help="of all stages, or of each")
    add("--crop-px", type=int, nargs="+", default=[128], help="of all stages, or of each")
    add("--pool", type=int, default=64, help="samples that batches are drawn from")
    add("--group", type=int, default=4, help="samples that are replaced at once")
    add("--refresh-every", type=int, nargs="+", default=[8], help="steps between replacements")
    add("--average", type=float, default=0.99, help="decay of the weights' average")
    few = f"of samples at timesteps below {FAITHFUL_BELOW}, beside those there by chance"
    add("--faithful-share", type=float, default=0.0, help=few)
    add("--camera-share", type=float, default=0.3, help="of samples as a camera takes them")
    saved = "of samples that are JPEGs and no worse, of all stages or of each"
    add("--saved-share", type=float, nargs="+", default=[0.0, 0.0, 0.0, 0.0, 0.25], help=saved)
    add("--held-out", type=int, default=20)
    add("--held-out-px", type=int, default=256)
    add("--every", type=int, default=200, help="steps between reports and checkpoints")
    add("--workers", type=int, default=0, help="processes that cut and degrade")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, or pack photographs."""
    args = parse(arguments)
    if args.pack:
        pack_photos(args.photos, args.pack)
    else:
        Run(args).train()


if __name__ == "__main__":
    main()
