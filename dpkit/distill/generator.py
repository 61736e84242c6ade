"""A generative model's samples as the small set: a class-conditional diffusion model, trained on the real images.

The network and the noise schedule are those of the library ``diffusers``; training and its random numbers are ours.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkit import tree
from dpkit.data import Split, _torchvision
from dpkit.distill.interface import Made, MethodSpec, Task

PRECISIONS = ("fp32", "bf16")
EVERY = 50  # steps between two checkpoints, each of which waits for the device
GROUPS = 8  # of the group norms, and channels of an attention head
CHUNK = 100  # images sampled at the same time
SHARE = 16.5  # activations of one image in the U-Net, in those of one in a ConvNet-3 of the same width (measured)


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec(MethodSpec):
    """Samples of a diffusion model (DDPM: Ho et al. 2020, arXiv 2006.11239) conditioned on the class; defaults of its CIFAR-10.

    steps of Adam on batches of ``batch`` images with the learning rate ``lr``; gradients of norm above one are scaled to one.
    width: channels at full resolution, a multiple of 8; twice as many below. levels: resolutions, each half of the one above;
    the image's side must be a multiple of ``2 ** (levels - 1)``. timesteps: of the noise. ema: decay of the average of the
    weights that samples are drawn with; it starts as (1 + step) / (10 + step), so that short runs forget their start.
    sample_steps: of DDIM. precision: ``fp32``, or ``bf16`` for passes through the network.

    Departures: three resolutions instead of four, one residual block instead of two at each on the way down, attention at the
    lowest only; no warm-up, dropout or flips; the network predicts the velocity (Salimans and Ho 2022, arXiv 2202.00512,
    section 4) under the cosine schedule (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17), which need fewer steps.
    """

    method: ClassVar[str] = "generator"
    steps: int = 800_000
    batch: int = 128
    lr: float = 2e-4
    width: int = 128
    levels: int = 3
    timesteps: int = 1000
    ema: float = 0.9999
    sample_steps: int = 50
    precision: str = "fp32"

    def check(self) -> None:
        super().check()
        for name in ("steps", "batch", "levels", "timesteps", "sample_steps"):
            self.require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        self.require(self.lr > 0 and math.isfinite(self.lr), f"lr must be > 0, got {self.lr:g}")
        self.require(self.width >= GROUPS and self.width % GROUPS == 0,
                     f"width must be a multiple of {GROUPS}, got {self.width}")
        self.require(self.sample_steps <= self.timesteps,
                     f"sample_steps must be at most timesteps, {self.timesteps}; got {self.sample_steps}")
        self.between("ema", 0, 1, open_high=True)
        self.one_of("precision", PRECISIONS)

    def held(self, classes: int) -> float:
        return SHARE * self.batch

    def fewest(self, classes: int) -> float:
        return SHARE

    def lower(self) -> str:
        return "width"


def generator(spec: GeneratorSpec, task: Task) -> Made:
    """Train the model, then sample ``ipc`` images of each class by DDIM (Song et al. 2021, arXiv 2010.02502, eta 0).

    The loss is the mean squared error of the velocity; history: its value at each step. A memory bound below a batch's
    activations cuts the batch into pieces, whose gradients add up to the same but for rounding. Raises ``ImportError`` without
    the package diffusers, ``ValueError`` on an image size that does not fit or a class without images, ``FloatingPointError``
    when the weights stop being finite.
    """
    diffusers, device = _diffusers(), torch.device(task.device)
    side, multiple = task.model.image_size, 2 ** (spec.levels - 1)
    if side % multiple:
        raise ValueError(f"the images' side must be a multiple of {multiple} for levels {spec.levels}, got {side}; lower levels")
    for c, place in enumerate(task.places(0)):
        if len(place) == 0:
            raise ValueError(f"the generator learns from images of every class, class {c} has none")
    piece = spec.batch if task.room(spec) else max(1, int(task.held / SHARE))
    unet, schedule = network(spec, task).to(device), _schedule(diffusers, spec)
    weights = dict(unet.named_parameters())
    average = {name: t.detach().clone() for name, t in weights.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=spec.lr)
    history, recent = torch.zeros(0, dtype=torch.float64), []
    if task.resume is not None:
        history = task.resume["history"].clone()
        _restore(task.resume, weights, average, optimiser, len(history))
    pixels = task.real.images.to(device)
    labels = task.real.hard_labels().to(device)
    for step in range(len(history), spec.steps):
        rows, times, noise = _draw(spec, task, step, device)
        clean = _signed(pixels[rows])
        noisy, target = schedule.add_noise(clean, noise, times), schedule.get_velocity(clean, noise, times)
        total = torch.zeros((), device=device)
        for part in torch.arange(spec.batch).split(piece):
            at = slice(int(part[0]), int(part[-1]) + 1)
            error = F.mse_loss(_predict(unet, spec, noisy[at], times[at], labels[rows[at]]), target[at])
            loss = error * (len(part) / spec.batch)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            decay = min(spec.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), list(weights.values()), 1 - decay)
        recent.append(total)
        if (step + 1) % EVERY == 0 or step + 1 == spec.steps:
            history, recent = torch.cat([history, torch.stack(recent).double().cpu()]), []
            if not (bool(torch.isfinite(history[-1])) and tree.is_finite(average)):
                raise FloatingPointError(f"the weights are not finite after step {step + 1}; lower lr")
            task.keep(_state(weights, average, optimiser, history))
        task.tick(step + 1, spec.steps)
    with torch.no_grad():
        for name, t in weights.items():
            t.copy_(average[name])
    return Made(_sample(spec, task, unet, schedule), tuple(history.tolist()))


def network(spec: GeneratorSpec, task: Task) -> nn.Module:
    """The U-Net at initialisation, on the CPU: (N, C, S, S) noisy images, times and classes to velocities."""
    options: dict[str, Any] = {
        "sample_size": task.model.image_size, "in_channels": task.model.channels, "out_channels": task.model.channels,
        "block_out_channels": (spec.width, *[2 * spec.width] * (spec.levels - 1)), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * spec.levels, "up_block_types": ("UpBlock2D",) * spec.levels,
        "norm_num_groups": GROUPS, "attention_head_dim": GROUPS, "num_class_embeds": task.model.classes}
    # modules of torch draw their weights from the process's own generator and take no other: its state is put back
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(tree.seed_for(task.seed, "init"))
        return _diffusers().UNet2DModel(**options)


def _diffusers():
    """The library, imported when it is needed: it takes seconds."""
    _torchvision.load()  # diffusers imports it, also where its compiled operators do not fit
    try:
        import diffusers
        diffusers.UNet2DModel, diffusers.DDIMScheduler  # noqa: B018 - it imports its own parts late too
    except ModuleNotFoundError as error:
        raise ImportError("method generator needs the package diffusers; `pip install diffusers`") from error
    except RuntimeError as error:
        raise ImportError(f"the package diffusers does not work here ({' '.join(str(error).split())}); "
                          "`pip install -c constraints.txt diffusers`") from error
    return diffusers


def _schedule(diffusers, spec: GeneratorSpec):
    return diffusers.DDIMScheduler(num_train_timesteps=spec.timesteps, beta_schedule="squaredcos_cap_v2",
                                   prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=True)


def _draw(spec: GeneratorSpec, task: Task, step: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the real images (B,), times (B,) and noise (B, C, S, S) of one step."""
    source, shape = tree.generator_for(task.seed, "train", step), (spec.batch, *task.real.images.shape[1:])
    rows = torch.randint(len(task.real), (spec.batch,), generator=source)
    times = torch.randint(spec.timesteps, (spec.batch,), generator=source)
    return rows.to(device), times.to(device), torch.randn(shape, generator=source).to(device)


def _signed(images: Tensor) -> Tensor:
    """Pixels as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images * 2 - 1


def _predict(unet: nn.Module, spec: GeneratorSpec, noisy: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(noisy.device.type, dtype=torch.bfloat16, enabled=spec.precision == "bf16"):
        return unet(noisy, times, class_labels=labels, return_dict=False)[0].float()


@torch.no_grad()
def _sample(spec: GeneratorSpec, task: Task, unet: nn.Module, schedule) -> Split:
    """``ipc`` images of each class, (K * ipc, C, S, S) float32 in [0, 1], class after class."""
    device = next(unet.parameters()).device
    labels = torch.arange(task.model.classes).repeat_interleave(spec.ipc)
    noise = torch.randn(len(labels), *task.real.images.shape[1:], generator=tree.generator_for(task.seed, "sample"))
    schedule.set_timesteps(spec.sample_steps)
    found = []
    for x, y in zip(noise.split(CHUNK), labels.split(CHUNK), strict=True):
        x, y = x.to(device), y.to(device)
        for time in schedule.timesteps:
            x = schedule.step(_predict(unet, spec, x, time.expand(len(x)).to(device), y), time, x, return_dict=False)[0]
        found.append(x.cpu())
    return Split(((torch.cat(found) + 1) / 2).clamp(0, 1), labels)


def _state(weights: tree.Params, average: tree.Params, optimiser: torch.optim.Optimizer, history: Tensor) -> tree.Params:
    """All that the rest of a run depends on, on the CPU."""
    moments = {name: optimiser.state[t] for name, t in weights.items()}
    groups = {"weights": weights, "average": average, "first": {n: m["exp_avg"] for n, m in moments.items()},
              "second": {n: m["exp_avg_sq"] for n, m in moments.items()}}
    return {f"{group}/{name}": t.detach().cpu().clone() for group, tensors in groups.items()
            for name, t in tensors.items()} | {"history": history}


@torch.no_grad()
def _restore(state: Any, weights: tree.Params, average: tree.Params, optimiser: torch.optim.Optimizer, steps: int) -> None:
    for name, t in weights.items():
        t.copy_(state[f"weights/{name}"])
        average[name].copy_(state[f"average/{name}"])
        optimiser.state[t] = {"step": torch.tensor(float(steps)),
                              "exp_avg": state[f"first/{name}"].to(t.device, copy=True),
                              "exp_avg_sq": state[f"second/{name}"].to(t.device, copy=True)}
