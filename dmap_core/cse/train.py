"""Train a CSE from the command line, on one machine or many.

    python -m dmap_core.cse.train --checkpoint 512-base-ema.safetensors --pictures photos/ \\
        --operator '{"operator": "SuperResolution", "scale": 8}' --out sr8.safetensors
    accelerate launch --num_processes 4 -m dmap_core.cse.train --config training.yaml

The defaults are the paper's (B.2). batch_size counts the pictures of one optimiser step in all processes together, so the result does not
depend on how many there are. The same command goes on with a training that was cut; a finished one is prolonged by more --steps. Beside
OUT it writes OUT's name with .training (to go on from), and a folder with .logs (TensorBoard, validation pictures). A config file is YAML
with the names of the options, without dashes; what is given on the command line comes first. Distribution (processes, GPUs, machines) is
accelerate's: see `accelerate config`.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import MISSING, VALIDATED, parse, read_operator
from .settings import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dmap.cse")
PRECISION_OF_ACCELERATE = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def main(argv: Sequence[str] | None = None) -> None:
    try:
        _main(argv)
    except KeyboardInterrupt:  # during the imports, too, which take seconds
        sys.exit(128 + signal.SIGINT)


def _main(argv: Sequence[str] | None) -> None:
    args = parse(argv, __doc__)
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import tensorboard  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(MISSING.format(error.name))
    from ..errors import Diverged

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        settings = TrainingSettings(**{name: getattr(args, name) for name in TrainingSettings.names()})
        train(args, settings)
    except (ValueError, Diverged, OSError) as error:
        sys.exit(f"error: {error}")


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C goes to the processes that read pictures, too; they have to live until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _alone(accelerator: Any, out: Path) -> Iterator[None]:
    """Only the processes of one launch write to `out`. Raises ValueError in all of them if others are at it."""
    from accelerate.utils import broadcast_object_list

    from .checkpoint import training_files

    with ExitStack() as stack:
        refused: list[str | None] = [None]
        if accelerator.is_main_process:
            try:
                stack.enter_context(training_files(out))
            except (ValueError, OSError) as error:
                refused = [str(error)]
        if broadcast_object_list(refused)[0]:
            raise ValueError(refused[0])
        yield


def train(args: argparse.Namespace, settings: TrainingSettings) -> None:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import ProjectConfiguration

    logs = args.out.with_suffix(".logs")
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.accumulation,
        mixed_precision=PRECISION_OF_ACCELERATE[settings.precision],
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(logs), logging_dir=str(logs)),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    with _alone(accelerator, args.out):
        _train(args, settings, accelerator)


def _train(args: argparse.Namespace, settings: TrainingSettings, accelerator: Accelerator) -> None:
    import torch
    from torch.utils.data import DataLoader, Subset
    from tqdm.auto import tqdm

    from ..backends.diffusers_files import open_base
    from ..backends.keys import to_ldm
    from ..errors import Diverged
    from ..pictures import centred, file_identity, folder_files, ignored_files, named, open_rgb, to_tensor
    from .checkpoint import STATE_SUFFIX, read_cse, resuming, state_of, write_cse, write_state
    from .data import Examples, collate
    from .loss import batch_loss
    from .metadata import CSEMetadata
    from .network import initial_controlnet
    from .validation import sheet, validation_loss

    logs = args.out.with_suffix(".logs")
    state_file = args.out.with_suffix(STATE_SUFFIX)
    is_main = accelerator.is_main_process
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    parts = settings.accumulation * accelerator.num_processes
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size is {settings.batch_size}; it must be divisible by accumulation times the number of processes, "
            f"{settings.accumulation} x {accelerator.num_processes}"
        )
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision is 'fp16', which needs a GPU; on the CPU choose bf16 or fp32")
    adam = torch.optim.Adam
    if args.adam_8bit:
        try:
            from bitsandbytes.optim import Adam8bit as adam  # noqa: N813
        except ModuleNotFoundError:
            raise ValueError("adam_8bit needs the package bitsandbytes, which is not installed: pip install bitsandbytes") from None
    if args.out.exists() and not state_file.exists():
        raise ValueError(f"{args.out} exists and there is no {state_file.name} beside it to go on from; choose another name")
    operator = read_operator(args.operator, args.weights).to(accelerator.device)
    operator.check((settings.size, settings.size), settings.batch_size // parts)
    CSEMetadata(operator=operator.spec(), source=args.source, licence=args.licence).write()  # one that no file can hold should be known now
    files, bad = folder_files(args.pictures, args.unreadable)
    if bad:
        log.warning("%d files cannot be read and are left out: %s", len(bad), named(bad))
    if ignored := ignored_files(args.pictures):
        log.info("%s", ignored)
    if args.count is not None and not 0 < args.count <= len(files):
        raise ValueError(f"count is {args.count}, but there are {len(files)} pictures")
    files = files[: args.count]
    examples = Examples(files, settings, timesteps=0)
    seen = folder_files(args.validation, args.unreadable)[0] if args.validation else files
    looked_at = torch.stack([to_tensor(centred(open_rgb(file), settings.size)) for file in seen[:VALIDATED]])

    base = open_base(args.checkpoint, args.prompt, args.prediction)
    examples.timesteps = len(base.sigmas)
    unet = to_ldm(base.unet.state_dict())
    identity = settings.identity() | {
        "operator": operator.spec(),
        "base": base.fingerprint,
        "prediction": base.prediction,
        "prompt": args.prompt,
    }
    identity |= {"pictures": [file_identity(file) for file in files], "ema": args.ema, "adam_8bit": args.adam_8bit}
    controlnet = base.new_controlnet(initial_controlnet(unet, settings.seed))
    optimizer = adam(controlnet.parameters(), lr=settings.learning_rate)
    average = None
    if args.ema:
        average = torch.optim.swa_utils.AveragedModel(controlnet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema))
    step, losses, validations = 0, [], []
    scaler = None
    if state_file.exists():
        state = state_of(state_file, identity)
        with resuming(state_file):
            controlnet.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate  # a training may go on with another
            step, losses, validations, scaler = state["step"], state["losses"], state["validations"], state["scaler"]
            if average:
                average.load_state_dict(state["average"])
        log.info("going on from step %d of %s", step, state_file)
    saved = step
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def diverged(what: str, at: int) -> Diverged:
        return Diverged(
            f"{what} at step {at}: learning_rate {settings.learning_rate:g} is too high, or a precision too low (precision "
            f"{settings.precision}, save_precision {args.save_precision}). "
            f"{f'The weights of step {saved} are in {args.out}' if saved else 'Nothing was saved'}"
        )

    def result() -> dict[str, torch.Tensor]:
        """The weights to write, in the dtype of the file. Raises Diverged for what nobody should get."""
        network = average.module if average else accelerator.unwrap_model(controlnet)
        found = {name: tensor.to("cpu", dtypes[args.save_precision]) for name, tensor in network.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in found.values()):
            raise diverged("weights are not finite, or too large for the file,", step)
        return to_ldm(found)

    def write(weights: dict[str, torch.Tensor]) -> None:
        described = CSEMetadata(
            operator=operator.spec(),
            base=base.name,
            fingerprint=base.fingerprint,
            prediction=base.prediction,
            hint_range=settings.hint_range,
            steps=step,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            size=settings.size,
            seed=settings.seed,
            pictures=len(files),
            source=args.source,
            licence=args.licence,
        )
        write_cse(args.out, weights, described, dtypes[args.save_precision])

    def save() -> None:
        """State first: were there only the other file, a crash between the two would leave nothing to go on from."""
        weights = result()
        state = {"identity": identity, "weights": accelerator.unwrap_model(controlnet).state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": step, "losses": losses, "validations": validations, "average": average.state_dict() if average else None}
        write_state(state_file, state | {"scaler": accelerator.scaler.state_dict() if accelerator.scaler else None})
        write(weights)

    if step >= settings.steps:
        if is_main and not (args.out.exists() and (metadata := read_cse(args.out)[1]) and metadata.steps == step):
            write(result())  # the program ended between its two files
        log.info("%s is trained for %d steps already; give more --steps to go on", args.out, step)
        return
    if args.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
        base.unet.enable_gradient_checkpointing()
    # autocast does the arithmetic; a frozen network needs no weights in full precision
    base.to(accelerator.device, dtypes[settings.precision])
    if average:
        average = accelerator.prepare_model(average, evaluation_mode=True)
    todo = Subset(examples, range(step * settings.batch_size, settings.steps * settings.batch_size))
    loader = DataLoader(todo, settings.batch_size // parts, collate_fn=collate, num_workers=args.workers, worker_init_fn=_ignore_interrupts)
    controlnet, optimizer, loader = accelerator.prepare(controlnet, optimizer, loader)
    if scaler and accelerator.scaler:
        accelerator.scaler.load_state_dict(scaler)
    accelerator.init_trackers("cse")
    looked_at = looked_at.to(accelerator.device)

    def validate() -> None:
        network = average or accelerator.unwrap_model(controlnet)
        value = validation_loss(base, network, operator, looked_at, settings)
        picture = sheet(base, network, operator, looked_at, settings.hint_range)
        validations.append([step, value])
        logs.mkdir(parents=True, exist_ok=True)
        picture.save(logs / f"step-{step:06d}.png")
        accelerator.log({"validation loss": value}, step=step)
        log.info("step %d: validation loss %.5f, pictures in %s", step, value, logs)

    stopping = False

    def stop(*_: Any) -> None:
        nonlocal stopping
        stopping = True  # at the end of the step: in the middle of one there is nothing that could be saved

    bar = tqdm(total=settings.steps, initial=step, disable=not is_main, desc="training")
    total = 0.0
    default = signal.signal(signal.SIGINT, stop)
    try:
        for batch in loader:
            with accelerator.accumulate(controlnet):
                loss = batch_loss(base, controlnet, operator, batch, settings)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(controlnet.parameters(), settings.max_grad_norm)
                    # where there is a scaler, it leaves such a step out by itself
                    if not accelerator.scaler and not math.isfinite(norm):
                        raise diverged("the loss or its gradient is not finite", step + 1)
                optimizer.step()
                optimizer.zero_grad()
            # every process has to stop at the same step
            value, stopped = accelerator.gather(torch.stack((loss.detach(), loss.new_tensor(stopping)))[None]).mean(0).tolist()
            total += value / settings.accumulation
            if not accelerator.sync_gradients:
                continue
            if not math.isfinite(total):
                raise diverged("the loss is not finite", step + 1)
            step += 1
            losses.append(total)
            bar.update()
            bar.set_postfix(loss=f"{total:.4f}", refresh=False)
            accelerator.log({"loss": total}, step=step)
            total = 0.0
            if average:
                average.update_parameters(accelerator.unwrap_model(controlnet))
            is_last = step == settings.steps
            if is_main and args.validate_every and (step % args.validate_every == 0 or is_last):
                validate()
            if is_main and (step % args.save_every == 0 or is_last or stopped):
                save()
                saved = step
            if stopped and not is_last:
                log.info("interrupted: %d steps are saved in %s", step, args.out)
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, default)
        bar.close()
        accelerator.end_training()
    log.info("%s: %d steps", args.out, step)


if __name__ == "__main__":
    main()
