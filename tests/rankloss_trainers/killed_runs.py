"""A training that is killed and resumed, in forks of a process that has imported a trainer.

Called with the trainer, a folder, the number of kills and their kind: ``random`` moments, or ``writes``, the
middle of a file that a save is writing. Prints a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

END = "end.pt"  # the tensors at the end of a training
WRITES = "writes.json"  # the number of files that it wrote
NEVER = 10**9  # more writes than a training has
Training = Callable[[Path], dict[str, Tensor]]


def transformers() -> Training:
    """The Trainer, whose loss has a state, with a checkpoint after each step."""
    from test_transformers import Remembering, average, linear
    from tiny_pairs import Pairs
    from tiny_transformers import logged_values, train, weights

    def run(folder: Path) -> dict[str, Tensor]:
        given: dict[str, Any] = {"pairs": Pairs(48), "save_strategy": "steps", "save_steps": 1}
        trained = train(folder, loss=linear(base=Remembering()), resume=whole_checkpoint(folder), **given)
        lambdas = torch.tensor(logged_values(trained, "rank_lambda"))
        return {
            "weights": weights(trained.model),
            "state": torch.tensor(average(trained), dtype=torch.float64),
            "lambdas": lambdas,
        }

    return run


def sentence_transformers() -> Training:
    """The SentenceTransformerTrainer, with a checkpoint after each step."""
    from tiny_sentences import rank_clip, tiny_model, train, weights

    def run(folder: Path) -> dict[str, Tensor]:
        given = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
        model = tiny_model()
        trained = train(folder, rank_clip(model), model, resume=whole_checkpoint(folder), **given)
        lambdas = [line["rank_lambda"] for line in trained.state.log_history if "loss" in line]
        return {"weights": weights(model), "lambdas": torch.tensor(lambdas)}

    return run


def whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that transformers has written whole: it writes the state of the trainer last."""

    def step(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix("checkpoint-"))

    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


def lightning() -> Training:
    """Lightning, with a checkpoint after each epoch, of four steps."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from test_lightning import Progress, Remembering, fit

    def run(folder: Path) -> dict[str, Tensor]:
        module = Remembering()
        saving = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        saved = {int(file.stem.removeprefix("step=")): file for file in folder.glob("step=*.ckpt")}
        latest = saved[max(saved)] if saved else None
        given = {"callbacks": [Progress("step"), saving], "max_epochs": 4, "enable_checkpointing": True}
        fit(folder, module, resume=latest, **given)
        return module.state_dict()

    return run


def loop() -> Training:
    """A loop of one's own, with a checkpoint after each step."""
    from test_named_losses import N, Towers, loss_of_rows

    import rankloss_trainers

    name, steps = "tiny-caption", 12

    def run(folder: Path) -> dict[str, Tensor]:
        model, loss = Towers().double(), rankloss_trainers.create(f"{name}+rankclip")
        optimizer = torch.optim.AdamW(model.parameters())
        parts = {"model": model, "loss": loss, "optimizer": optimizer}
        first, file = 1, folder / "checkpoint.pt"
        if file.exists():
            saved = torch.load(file, weights_only=True)
            first = saved.pop("step") + 1
            for key, state in saved.items():
                parts[key].load_state_dict(state)
        for step in range(first, steps + 1):
            loss.set_progress(step, steps)
            optimizer.zero_grad()
            loss_of_rows(name, model, slice(0, N), loss, step=None).backward()
            optimizer.step()
            states = {key: part.state_dict() for key, part in parts.items()}
            torch.save({"step": step, **states}, folder / "new.pt")
            (folder / "new.pt").replace(file)
            time.sleep(0.05)  # so that a kill finds it
        return {**model.state_dict(), **loss.state_dict()}

    return run


TRAINERS: dict[str, Callable[[], Training]] = {
    "transformers": transformers,
    "sentence_transformers": sentence_transformers,
    "lightning": lightning,
    "loop": loop,
}


def end_at_write(number: int, folder: Path) -> list[str]:
    """Kill this process in the middle of the n-th file that it writes below a folder.

    Files that are opened by Python, or moved into place, are seen by an audit hook, the others in the two
    functions that open theirs elsewhere.

    Returns:
        The files that are written, which goes on growing.
    """
    written: list[str] = []

    def count_write(path: Any) -> None:
        """Note a write below the folder; at the n-th, leave half of the file and die."""
        if not isinstance(path, str) or not os.path.abspath(path).startswith(str(folder)):
            return
        written.append(path)
        if len(written) == number:
            if os.path.exists(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, _flags = arguments
            if mode is not None and any(letter in mode for letter in "wax"):
                count_write(path)
        elif event == "shutil.move":
            _source, destination = arguments
            count_write(destination)

    def counting(save: Callable[..., Any]) -> Callable[..., Any]:
        """A function that writes the file of its second argument, of which no event tells."""

        def saved(content: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
            result = save(content, file, *args, **kwargs)
            count_write(os.fspath(file) if isinstance(file, os.PathLike) else file)
            return result

        return saved

    sys.addaudithook(hook)
    torch.save = counting(torch.save)
    if models := sys.modules.get("transformers.modeling_utils"):
        models.safe_save_file = counting(models.safe_save_file)  # type: ignore[attr-defined]
    return written


def forked(run: Training, folder: Path, last_write: int) -> int:
    """Start a training in a fork, which is killed at its n-th write; the process's id.

    One that is not killed leaves its tensors and the number of its writes in the folder.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        folder.mkdir(exist_ok=True)
        written = end_at_write(last_write, folder)
        end = run(folder)
        number = len(written)
        torch.save(end, folder / END)
        (folder / WRITES).write_text(json.dumps(number))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(process: int) -> int:
    """The exit code of a process, for whose end it waits."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_at_moment(run: Training, folder: Path, seconds: float) -> int:
    """A training that is killed from outside, some time after its start; its exit code."""
    process = forked(run, folder, NEVER)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return ended(process)


def main(trainer: str, place: str, kills: str, kind: str) -> None:
    run, folder, count = TRAINERS[trainer](), Path(place), int(kills)
    begin = time.monotonic()
    assert ended(forked(run, folder / "whole", NEVER)) == 0
    duration = time.monotonic() - begin
    expected = torch.load(folder / "whole" / END, weights_only=True)
    writes = json.loads((folder / "whole" / WRITES).read_text())
    for number in range(count):
        place_of_kill = folder / f"{number}"
        moment: float
        if kind == "random":
            moment = random.uniform(0.1, 1.0) * duration
            killed = killed_at_moment(run, place_of_kill, moment)
        else:  # the writes at which the trainings are killed are spread over a training
            moment = 1 + (number * (writes - 1)) // max(count - 1, 1)
            killed = ended(forked(run, place_of_kill, moment))
        files = sorted(x.name for x in place_of_kill.glob("*"))
        resumed = ended(forked(run, place_of_kill, NEVER))
        actual = torch.load(place_of_kill / END, weights_only=True) if resumed == 0 else {}
        unequal = [key for key, x in expected.items() if key not in actual or not torch.equal(x, actual[key])]
        result = {"at": moment, "killed": killed, "files": files, "resumed": resumed, "unequal": unequal}
        print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
