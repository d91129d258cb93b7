"""Train and evaluate small classifiers on tensors held in memory: enough for the demo, the tests and the benchmarks."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
MOMENTUM, CLIP = 0.9, 1.0  # of SGD; the largest norm of a gradient
WARMUP = 0.1  # the share of steps over which the rate rises


@dataclass(frozen=True)
class Training:
    """How a network is trained by SGD with Nesterov's momentum, in `epochs` over the data in batches of `batch_size`.

    `adam` takes AdamW instead, which transformers need. The rate rises linearly to `lr`; `schedule` says how it goes
    on: "linear" or "cosine" to 0, "step" (a tenth behind half and three quarters of all steps) or "constant".
    `precision` is autocast's dtype. `augment` shifts images (N, C, H, W) by up to ±`shift` pixels and, with `flip`,
    mirrors them. The order of the data and the augmentation depend on `seed` alone. Raises ValueError.
    """

    epochs: int
    lr: float
    batch_size: int = 128
    weight_decay: float = 5e-4
    seed: int = 0
    adam: bool = False
    augment: bool = True
    shift: int = 2
    flip: bool = False
    schedule: str = "linear"
    precision: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"no schedule {self.schedule!r}; there are {', '.join(SCHEDULES)}")
        if self.epochs < 0:
            raise ValueError(f"epochs must be at least 0, got {self.epochs}")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters."""
        if self.adam:
            return torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(model.parameters(), self.lr, MOMENTUM, weight_decay=self.weight_decay, nesterov=True)


def fit(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    how: Training,
    *,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> Model:
    """Train `model` in place on (N, …) inputs and class labels and return it in eval mode.

    Labels (N,) go with outputs (N, C), labels (N, T) with those of a sequence, (N, T, C).
    Raises ValueError on inputs that do not fit, FloatingPointError on divergence.
    """
    _check(inputs, labels, how.augment)
    target = torch.device(device) if device is not None else _device(model)
    model.to(target).train()
    generator = torch.Generator().manual_seed(how.seed)
    optimizer = how.optimizer(model)
    steps = how.epochs * math.ceil(len(inputs) / how.batch_size)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, WARMUP, how.schedule))
    with _bar(progress) as bar:
        task = bar.add_task("training", total=steps, note="")
        for epoch in range(how.epochs):
            total = torch.zeros((), device=target)
            for chosen in _batches(len(inputs), how.batch_size, generator):
                batch = inputs[chosen]
                if how.augment:
                    batch = augment(batch, how.shift, how.flip, generator)
                with torch.autocast(target.type, how.precision, enabled=how.precision is not None):
                    loss = F.cross_entropy(model(batch.to(target)).movedim(-1, 1), labels[chosen].to(target))
                _step(model, optimizer, loss)
                rates.step()
                total += loss.detach() * len(chosen)
                bar.advance(task)
            mean = _mean(total, len(inputs), epoch, how.lr)
            bar.update(task, note=f"epoch {epoch + 1}/{how.epochs} loss {mean:.3f}")
    return model.eval()


def predict(model: nn.Module, inputs: Tensor, batch_size: int = 500) -> Tensor:
    """Return the outputs for (N, …) inputs in eval mode, on the inputs' device, then restore the model's mode."""
    device, training = _device(model), model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(batch.to(device)).to(inputs.device) for batch in inputs.split(batch_size)])
    finally:
        model.train(training)


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Return the share (0 to 1) of (N,) or (N, T) labels at which the largest logit, (N, C) or (N, T, C), stands."""
    return (predict(model, inputs, batch_size).argmax(-1) == labels).double().mean().item()


def _check(inputs: Tensor, labels: Tensor, augment: bool) -> None:
    if len(inputs) != len(labels) or len(inputs) == 0:
        raise ValueError(f"fit needs one label per input and at least one: {len(inputs)} inputs, {len(labels)} labels")
    if augment and inputs.dim() != 4:
        raise ValueError(f"augment shifts images (N, C, H, W), got {tuple(inputs.shape)}; pass augment=False")


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the peak rate by the share of the steps that is done
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "step": lambda done: 1 if done < 0.5 else 0.1 if done < 0.75 else 0.01,
    "constant": lambda done: 1,
}


def _rate(step: int, steps: int, warmup: float, schedule: str = "linear") -> float:
    """Return the share of the peak rate at `step`: a linear rise over the warm-up, then as the schedule says."""
    rise = math.ceil(steps * warmup)
    if step < rise:
        return (step + 1) / rise
    return SCHEDULES[schedule](min(1, (step - rise) / max(1, steps - rise)))


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield shuffled indices in batches of nearly equal size: a last batch of one would break BatchNorm."""
    order = torch.randperm(count, generator=generator)
    yield from order.tensor_split(math.ceil(count / batch_size))


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by its own offset, repeating the border pixels, and mirror half of them if asked."""
    count, _, height, width = images.shape
    offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator).to(images.device)
    rows = torch.arange(height, device=images.device) + offsets[0] - shift
    columns = torch.arange(width, device=images.device) + offsets[1] - shift
    if flip:
        mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(images.device)
        columns = torch.where(mirrored, columns.flip(1), columns)
    # Clamped indices read the border again, so no padding value has to be known.
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    sample = torch.arange(count, device=images.device)[:, None, None]
    return images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()


def _mean(total: Tensor, count: int, epoch: int, lr: float) -> float:
    """Return the epoch's mean loss, refusing to go on when it is not finite."""
    mean = total.item() / count
    if not math.isfinite(mean):
        raise FloatingPointError(f"training diverged: mean loss {mean} in epoch {epoch + 1}; lower lr={lr}")
    return mean


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), disable=not shown)
