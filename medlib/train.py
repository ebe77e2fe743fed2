"""The training loop: any stage of any method, on any device, resumable at any step.

A stage is identified by what goes into it: its settings, what it may see of the data, the seed and the weights it
starts from. Its folder is named by a hash of those, so that a stage whose inputs are unchanged is taken from its
checkpoint: pre-training that sees no label is done once for all label ratios.
"""

import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric
from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from tqdm.auto import tqdm

from medlib.data.batches import TrainingData
from medlib.methods.base import Method, Stage, Streams
from medlib.nets import channels_last, recompute_levels, seeded_init
from medlib.paths import written_whole
from medlib.rng import stream_seed

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
WINDOWS = 4  # of a volume that a 3D network sees at a time when it predicts: less than a training step holds
PRECISIONS = ("32-true", "bf16-mixed")
EARLY = 10  # the step after which a long stage is validated for the first time
FORMAT = 1  # of checkpoints; part of every stage's key, so that old ones are never read as new

Callback = Callable[[str, int, Mapping[str, Any]], None]
Predict = Callable[[Tensor], Tensor]  # prepared images (B, 1, *space) to class probabilities (B, C, *space)
Validate = Callable[[Predict], Mapping[str, float]]


class NonFiniteLoss(RuntimeError):
    """A loss term became infinite or not a number; the message names it."""


class StopTraining(KeyboardInterrupt):
    """Raised by a callback, it ends the run as Ctrl-C does: after this step, with a checkpoint."""


@dataclass
class StageResult:
    """One finished stage.

    ``folder`` holds checkpoint, settings and metrics; ``reused`` is True when it was taken from an earlier run;
    ``seconds`` is what its training took, then or now.
    """

    name: str
    key: str
    folder: Path
    steps: int
    seconds: float
    reused: bool

    def history(self) -> list[dict[str, Any]]:
        """The lines of its metrics file, oldest first."""
        if not (self.folder / METRICS).exists():
            return []
        lines = []
        for number, text in enumerate((self.folder / METRICS).read_text().splitlines(keepends=True), start=1):
            if not text.endswith("\n"):
                break  # a run that was killed may leave half a line at the end
            line = _object(text)
            if not isinstance(line.get("step"), int):
                raise ValueError(f"{self.folder / METRICS}: line {number} is damaged; delete the folder to train anew")
            lines.append(line)
        return lines


@dataclass
class Trained:
    """Networks after the last stage, in eval mode, and how they came about."""

    networks: nn.ModuleDict
    stages: list[StageResult]

    def state(self, stage: str, step: int | None = None) -> dict[str, Tensor]:
        """The weights at the end of ``stage``, or after a ``step`` that was kept, for ``networks.load_state_dict``.

        ValueError: no such stage, or a step that was not kept.
        """
        for result in self.stages:
            if result.name == stage:
                path = result.folder / (CHECKPOINT if step is None else _kept(step))
                if not path.exists():
                    raise ValueError(f"step {step} of stage {stage!r} was not kept: train with keep=[{step}]")
                return torch.load(path, map_location="cpu", weights_only=True)["networks"]
        raise ValueError(f"there is no stage {stage!r}; there are {', '.join(result.name for result in self.stages)}")


def make_fabric(device: str = "auto", devices: int | str = 1, precision: str | None = None) -> Fabric:
    """Fabric for ``device`` ("auto", "cpu", "cuda", "mps").

    ``precision`` "32-true" or "bf16-mixed" (autocast; losses stay in float32); None: what the device prefers, bf16 on a
    GPU that has it, float32 elsewhere.
    """
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch sees no GPU; use device='auto' or 'cpu'")
    if precision is None:
        on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
        precision = _preferred("cuda" if on_gpu else "cpu")
    fabric = Fabric(accelerator=device, devices=devices, precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def _preferred(kind: str) -> str:
    """The precision of a kind of device where nobody asks for another."""
    return "bf16-mixed" if kind == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def precision_of(fabric: Fabric) -> str:
    """One of `PRECISIONS`."""
    return str(fabric.strategy.precision.precision)


def train(
    method: Method,
    data: TrainingData,
    *,
    seed: int,
    output_dir: Path,
    fabric: Fabric | None = None,
    validate: Validate | None = None,
    validate_every: int | None = None,
    log_every: int = 10,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
    callback: Callback | None = None,
    keep: Collection[int] = (),
    recompute: int = 0,
) -> Trained:
    """Train ``method`` on ``data`` through all its stages; resumes and reuses what ``output_dir`` already holds.

    Args:
        seed: of initial weights, sampling, augmentation and dropout; each has its own stream.
        output_dir: stages are kept in ``output_dir/stages``.
        validate: called with a function images -> probabilities in stages that use labels; returns named numbers.
        validate_every: steps between validations; default a quarter of the stage. A quarter of more than 1,000 steps
            is a long time to wait for a validation that cannot work: such a stage has one after 10 steps, too.
        log_every: steps between lines of the metrics file; the only moments at which the host waits for the device.
        callback: called as ``callback(stage, step, terms)`` at every such line, ``terms`` being the loss terms and
            ``lr``; after a validation with ``val_dice``, which maps names to numbers, and ``predict``, the networks of
            this step as they predict. (A reused stage shows what it logged; it has no ``predict``.) It may raise
            `StopTraining`.
        keep: steps, 0 among them, after which the weights are also kept, for `Trained.state`. Those that a stage does
            not reach are left out; a finished stage that lacks one is trained again.
        recompute: levels of the networks whose activations are computed again in the backward pass, see
            `medlib.nets.recompute_levels`: less memory, more time, the same result, so that a stage may be resumed with
            another number.

    Raises:
        NonFiniteLoss: a term is infinite or not a number.
        KeyboardInterrupt: after Ctrl-C or `StopTraining`, once a checkpoint was written.
    """
    fabric = fabric or make_fabric()
    with seeded_init(seed, "weights"):
        networks = method.networks(data.classes)
    channels_last(recompute_levels(networks.to(fabric.device), recompute))
    results = []
    for stage in method.stages(data):
        loop = _Loop(
            method, stage, networks, data, seed, output_dir, fabric, validate, validate_every,
            log_every, checkpoint_seconds, progress, callback, keep,
        )  # fmt: skip
        results.append(loop.run())
        if loop.interrupted.is_set():
            raise KeyboardInterrupt(
                f"stopped after the last step of {stage.name}; its checkpoint is written, the same call goes on from it"
            )
    networks.requires_grad_(True).eval()
    return Trained(networks, results)


def predictor(method: Method, networks: nn.ModuleDict, fabric: Fabric) -> Predict:
    """``method`` with ``networks`` (in eval mode) as a function: without gradients, in the training's precision.

    A method with a ``patch`` predicts volumes of any shape: by windows of that size that overlap by half, blended with
    a Gaussian weight where the images lie (a volume on the host never is on the device as a whole). A volume smaller
    than the window is padded with zeros.
    """

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode(), fabric.autocast():
            return method.predict(networks, images.to(fabric.device)).float()

    if method.patch is None:
        return predict
    window = method.patch

    def predict_by_windows(images: Tensor) -> Tensor:
        with torch.inference_mode():  # the blending writes into what predict returns
            blended = sliding_window_inference(
                images, window, WINDOWS, predict, 0.5, "gaussian", sw_device=fabric.device, device=images.device
            )
        return cast(Tensor, blended)

    return predict_by_windows


def stage_key(stage: Stage, data: TrainingData, seed: int, networks: nn.ModuleDict, precision: str = "") -> str:
    """What identifies a stage's outcome, as 16 hexadecimal digits.

    ``precision`` is given where it is not the one that the device prefers: what a GPU trained can be read on a laptop.
    """
    digest = hashlib.sha256()
    inputs: list[Any] = [FORMAT, stage.describe(), data.fingerprint(stage.uses_labels, stage.everything), seed]
    inputs += [precision] if precision else []
    digest.update(json.dumps(inputs, sort_keys=True, default=str).encode())
    for name, tensor in networks.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class _Loop:
    """One stage of one run."""

    method: Method
    stage: Stage
    networks: nn.ModuleDict
    data: TrainingData
    seed: int
    output_dir: Path
    fabric: Fabric
    validate: Validate | None
    validate_every: int | None
    log_every: int
    checkpoint_seconds: float
    progress: bool
    callback: Callback | None
    keep: Collection[int]
    interrupted: threading.Event = field(default_factory=threading.Event)

    def run(self) -> StageResult:
        precision = precision_of(self.fabric)
        asked = precision if precision != _preferred(self.fabric.device.type) else ""
        key = stage_key(self.stage, self.data, self.seed, self.networks, asked)
        self.folder = self.output_dir / "stages" / f"{self.method.name}-{self.stage.name}-{key}"
        self.step, self.seconds = 0, 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            return self._run(key)

    def _run(self, key: str) -> StageResult:
        saved = self._load()
        done = 0 if saved is None else saved["step"]
        if any(step <= done and not (self.folder / _kept(step)).exists() for step in self.keep):
            saved = None  # trained without keeping a step that is wanted now
        if saved is not None and saved["step"] >= self.stage.steps:
            with self._readable():
                self.networks.load_state_dict(saved["networks"])
            self._replay()
            return StageResult(self.stage.name, key, self.folder, self.stage.steps, saved["seconds"], reused=True)
        settings = {"method": self.method.name, "seed": self.seed, **self.stage.describe()}
        if self.fabric.is_global_zero:
            with written_whole(self.folder / "stage.json") as unfinished:
                unfinished.write_text(json.dumps(settings, indent=2, default=str) + "\n")
        with _own_randomness(self.seed, self.stage.name, self.fabric.device), _interruptible() as interrupted:
            self.interrupted = interrupted
            self._train(saved)
        return StageResult(self.stage.name, key, self.folder, self.stage.steps, self.seconds, reused=False)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other run trains this stage: one that wants it waits, then takes it from its checkpoint."""
        lock = FileLock(self.folder / "lock")
        if self.fabric.is_global_zero:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                print(f"Another run trains {self.folder.name}: waiting for it, to take its result.", flush=True)
                lock.acquire()
        self.fabric.barrier()
        try:
            yield
        finally:
            lock.release()

    def _train(self, saved: dict[str, Any] | None) -> None:
        fabric = self.fabric
        streams = Streams(self.seed, self.stage.name, fabric.device, fabric.global_rank, fabric.world_size)
        self.networks.requires_grad_(True)
        with seeded_init(self.seed, self.stage.name, "weights"):  # modules that only this stage has
            work = self.stage.begin(self.networks, self.data, streams)
        work.to(self.fabric.device)
        self.work, self.streams = work, streams
        if fabric.world_size > 1:
            work.gather = self._gather
        if saved is not None:
            with self._readable():
                self._restore(saved)
        elif fabric.is_global_zero:
            (self.folder / METRICS).write_text("")
        self._keep()
        runner, optimizer = self.fabric.setup(work, work.optimizer)
        every = self.validate_every or max(1, self.stage.steps // 4)
        early = EARLY if self.validate_every is None and every > 1000 else every
        work.train()
        bar = tqdm(
            total=self.stage.steps, initial=self.step, disable=not self.progress or not self.fabric.is_global_zero,
            desc=f"{self.method.title}: {self.stage.name}", unit="step", mininterval=0.5,
        )  # fmt: skip
        started = last_saved = time.monotonic()
        before = self.seconds
        finite: dict[str, Tensor] = {}
        with bar:
            while self.step < self.stage.steps:
                optimizer.zero_grad(set_to_none=True)
                terms = runner(**work.draw())
                self.fabric.backward(terms["total"])
                optimizer.step()
                work.schedule.step()
                work.after_step()
                self.step += 1
                self._keep()
                self.seconds = before + time.monotonic() - started
                for name, term in terms.items():
                    ok = torch.isfinite(term.detach())
                    finite[name] = finite[name] & ok if name in finite else ok
                bar.update()
                last = self.step >= self.stage.steps
                if last or self.step % self.log_every == 0 or self.step == 1:
                    values = self._log(terms, finite, optimizer.param_groups[0]["lr"])
                    bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
                due = last or self.step % every == 0 or self.step == early
                if self.validate is not None and self.stage.uses_labels and due:
                    self._validate()
                    work.train()
                now = time.monotonic()
                if last or self.interrupted.is_set() or now - last_saved > self.checkpoint_seconds:
                    self._check_finite(finite)
                    self._save()
                    last_saved = now
                if self.interrupted.is_set() and not last:
                    raise KeyboardInterrupt(
                        f"stopped at step {self.step} of {self.stage.steps} of {self.stage.name}; the checkpoint is "
                        "written, the same call goes on from there"
                    )

    def _gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes. Each computes the whole loss, so that gradients are those of one process."""
        gathered = self.fabric.all_gather(tensor, sync_grads=tensor.is_floating_point())  # (world, B, ...)
        return cast(Tensor, gathered).flatten(0, 1)

    def _log(self, terms: Mapping[str, Tensor], finite: Mapping[str, Tensor], rate: float) -> dict[str, float]:
        self._check_finite(finite)
        numbers = torch.stack([term.detach().float() for term in terms.values()]).tolist()  # one wait for all terms
        values = dict(zip(terms, numbers, strict=True))
        self._append({"time": round(self.seconds, 3), "lr": rate, **values})
        self._tell({"lr": rate, **values})
        return values

    def _tell(self, terms: Mapping[str, Any]) -> None:
        if self.callback is None:
            return
        try:
            self.callback(self.stage.name, self.step, terms)
        except StopTraining:
            self.interrupted.set()

    def _check_finite(self, finite: Mapping[str, Tensor]) -> None:
        if not finite:
            return
        passed = torch.stack(list(finite.values())).tolist()  # one wait for all terms
        bad = [name for name, ok in zip(finite, passed, strict=True) if not ok]
        if bad:
            culprits = [name for name in bad if name != "total"] or bad
            raise NonFiniteLoss(
                f"loss term {', '.join(culprits)} of {self.method.name}'s stage {self.stage.name!r} became infinite or "
                f"not a number within the {min(self.log_every, self.step)} steps before step {self.step}; a checkpoint "
                f"in {self.folder.name}, if there is one, is from before. A lower learning rate or float32 precision "
                "is the usual cure."
            )

    def _validate(self) -> None:
        assert self.validate is not None
        self.networks.eval()
        predict = predictor(self.method, self.networks, self.fabric)
        numbers = dict(self.validate(predict))
        self._append({"time": round(self.seconds, 3), "val_dice": numbers})
        self._tell({"val_dice": numbers, "predict": predict})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.fabric.is_global_zero:
            with open(self.folder / METRICS, "a") as file:
                file.write(json.dumps({"stage": self.stage.name, "step": self.step, **line}) + "\n")

    def _replay(self) -> None:
        """Show a reused stage's history to the callback, so that its curves are drawn all the same."""
        if self.callback is None:
            return
        for line in StageResult(self.stage.name, "", self.folder, 0, 0.0, True).history():
            terms = {name: value for name, value in line.items() if name not in ("stage", "step", "time")}
            self.callback(self.stage.name, line["step"], terms)

    def _save(self) -> None:
        if not self.fabric.is_global_zero:
            return
        cuda = self.fabric.device.type == "cuda"
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "networks": self.networks.state_dict(),
            "work": self.work.state_dict(),
            "optimizer": self.work.optimizer.state_dict(),
            "schedule": self.work.schedule.state_dict(),
            "streams": self.streams.state_dict(),
            "samplers": {name: sampler.waiting for name, sampler in self.work.samplers.items()},
            "dropout": torch.get_rng_state(),
            "dropout_cuda": torch.cuda.get_rng_state(self.fabric.device) if cuda else None,
        }
        if self.step >= self.stage.steps:  # done: only what later stages and readers need
            weights = [tensor for tensor in self.networks.state_dict().values() if tensor.is_floating_point()]
            if not torch.stack([torch.isfinite(tensor).all() for tensor in weights]).all():
                raise NonFiniteLoss(
                    f"{self.method.name}'s stage {self.stage.name!r} ended with weights that are infinite or not a "
                    "number, and was not kept. A lower learning rate is the usual cure."
                )
            state = {name: state[name] for name in ("step", "seconds", "networks")}
        _save(state, self.folder / CHECKPOINT)

    def _keep(self) -> None:
        if self.step in self.keep and self.fabric.is_global_zero:
            _save({"networks": self.networks.state_dict()}, self.folder / _kept(self.step))

    def _load(self) -> dict[str, Any] | None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        with self._readable():
            saved: dict[str, Any] = torch.load(path, map_location=self.fabric.device, weights_only=True)
            whole = {"step": int, "seconds": float, "networks": dict}
            if isinstance(saved.get("step"), int) and saved["step"] < self.stage.steps:
                whole |= dict.fromkeys(("work", "optimizer", "schedule", "streams", "samplers"), dict)
            if wrong := [name for name, kind in whole.items() if not isinstance(saved.get(name), kind)]:
                raise ValueError(f"it lacks {', '.join(sorted(wrong))}")
        return saved

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Inside, whatever goes wrong is the checkpoint's fault."""
        try:
            yield
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise RuntimeError(
                f"the checkpoint {self.folder / CHECKPOINT} cannot be read ({reason}); "
                "delete its folder to train this stage anew"
            ) from error

    def _restore(self, saved: dict[str, Any]) -> None:
        self.work.load_state_dict(saved["work"])
        self.networks.load_state_dict(saved["networks"])
        self.work.optimizer.load_state_dict(saved["optimizer"])
        self.work.schedule.load_state_dict(saved["schedule"])
        # generator states live on the host, whatever device they draw on
        self.streams.load_state_dict({name: state.cpu() for name, state in saved["streams"].items()})
        for name, waiting in saved["samplers"].items():
            self.work.samplers[name].waiting = waiting
        torch.set_rng_state(saved["dropout"].cpu())
        if saved["dropout_cuda"] is not None:
            torch.cuda.set_rng_state(saved["dropout_cuda"].cpu(), self.fabric.device)
        self.step, self.seconds = saved["step"], saved["seconds"]
        lines = StageResult(self.stage.name, "", self.folder, 0, 0.0, False).history()
        kept = [json.dumps(line) for line in lines if line["step"] <= self.step]
        with written_whole(self.folder / METRICS) as unfinished:
            unfinished.write_text("".join(line + "\n" for line in kept))


@contextlib.contextmanager
def _own_randomness(seed: int, stage: str, device: torch.device) -> Iterator[None]:
    """Dropout and everything else that can only draw from the global state does so from a stream of this stage."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(stream_seed(seed, stage, "dropout"))
        yield


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Inside, Ctrl-C and SIGTERM only raise a flag, so that no step is cut in half; a second Ctrl-C stops at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _object(text: str) -> dict[str, Any]:
    """The JSON object in ``text``; an empty one where there is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _kept(step: int) -> str:
    return f"step-{step}.pt"


def _save(state: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, whole or not at all, and equal states as equal files: PyTorch would write a path into them."""
    with written_whole(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(state, file)
