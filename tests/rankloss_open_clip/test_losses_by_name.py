"""Every loss by its name, through the unmodified command; ALIP with its data, accumulation and resume."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cpu_ddp
import pytest
import torch
from trainer_runs import SAMPLES, STEPS, TORCHRUN, Run, Runs, Trainer

RANK_TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
CYCLIC_TERMS = ["contrastive_loss", "cyclic_cross_modal_loss", "cyclic_in_modal_loss"]
ALIP_TERMS = ["contrastive_loss", "caption_contrastive_loss"]
HISTORIES = ["alip_text_caption", "alip_image_text", "alip_image_caption"]

# One step an epoch on the whole set, and no random crops: what does not depend on the order of the samples.
WHOLE = ["--batch-size", str(SAMPLES), "--aug-cfg", "scale=(1.0,1.0)"]

# Two trainings in one process: the first by the arguments in JSON, the second by the others.
TWO_TRAININGS = """
import json, sys
from open_clip_train.main import main
main(json.loads(sys.argv[1]))
main(sys.argv[2:])
"""


def two_captions(trainer: Trainer) -> tuple[Path, Path]:
    """The trainer's data with a second caption of each picture: as a CSV file and as a shard."""
    header, *rows = (trainer.directory / "data.csv").read_text().splitlines()
    table, shard = trainer.directory / "two.csv", trainer.directory / "two.tar"
    lines = [f"{header}\tsynthetic"]
    with tarfile.open(shard, "w") as tar:
        for i, row in enumerate(rows):
            file, title = row.split("\t")
            synthetic = f"there are {i % 7} apples, {i % 5} pears and {i % 3} plums"
            lines.append(f"{row}\t{synthetic}")
            members = {"png": Path(file).read_bytes(), "txt": title.encode(), "blip.txt": synthetic.encode()}
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{i:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    table.write_text("\n".join(lines) + "\n")
    return table, shard


@pytest.fixture(scope="module")
def by_name(trainer: Trainer) -> Iterator[Runs]:
    table, shard = two_captions(trainer)
    runs = Runs()

    def add(name: str, loss: str, *options: str) -> None:
        runs.add(name, trainer.run, name, "--loss", loss, *options)

    constant = ["--rankclip-schedule", "constant", "--epochs", "1"]
    csv = ["--alip-caption-key", "synthetic", "--train-data", str(table)]
    tar = ["--alip-caption-key", "blip.txt", "--train-data", str(shard), "--dataset-type", "webdataset"]
    add("alip", "alip", *csv, *WHOLE, "--epochs", "3", "--val-data", str(table))
    add("alip webdataset", "alip", *tar, *WHOLE, "--epochs", "2", "--train-num-samples", str(SAMPLES))
    add("alip accumulation", "alip", *csv, *WHOLE, "--epochs", "2", "--batch-size", "32", "--accum-freq", "2")
    add("cyclip", "cyclip", "--epochs", "1", "--accum-freq", "2")
    add("cyclip siglip", "cyclip", "--epochs", "1", "--siglip", "--cyclip-lambda-in", "0")
    add("rankclip-cross", "rankclip-cross", *constant)
    add("rankclip-in", "rankclip-in", *constant)
    torchrun = (*TORCHRUN, "2", "--")
    both = ["--local-loss", "--gather-with-grad"]
    for name, *options in (
        ("alip, two processes", "--batch-size", "32", "--gather-with-grad"),
        ("alip, two processes, accumulation", "--batch-size", "16", "--accum-freq", "2", *both),
    ):
        options = ["--loss", "alip", *csv, *WHOLE, "--epochs", "2", *options]
        runs.add(name, trainer.run, name, *options, command=(*torchrun, cpu_ddp.__file__))
    runs["alip"]  # its first checkpoint is resumed from
    checkpoint = trainer.directory / "logs/alip/checkpoints/epoch_1.pt"
    add("alip resumed", "alip", *csv, *WHOLE, "--epochs", "3", "--resume", str(checkpoint))
    alip = ["--loss", "alip", *csv, *WHOLE]
    resumed = trainer.arguments("alip, first", *alip, "--epochs", "2", "--resume", str(checkpoint))
    two = ("-c", TWO_TRAININGS, json.dumps(resumed))
    runs.add("alip, second", trainer.run, "alip, second", *alip, "--epochs", "1", command=two)
    yield runs
    runs.close()


def start_line(run: Run) -> str:
    (line,) = re.findall(r"Loss: [a-z].*", run.log)
    assert run.log.index(line) < run.log.index("Train Epoch")
    return str(line)


def assert_loss_is_the_sum(run: Run, terms: list[str], metrics: list[str]) -> None:
    shown = run.scalars
    assert {name for name in shown if name.endswith("_loss") and "/" not in name} == set(terms)
    assert {*metrics} <= shown.keys()
    for step, loss in shown["loss"].items():
        assert loss == pytest.approx(sum(shown[term][step] for term in terms), rel=1e-6)
    for line in run.train_lines():
        assert {name.capitalize() for name in (*terms, *metrics)} <= line.keys()


# --- CyCLIP and the ablations ---------------------------------------------------------------------------


def test_cyclip_trains_with_its_terms(by_name: Runs) -> None:
    run = by_name["cyclip"]
    assert re.search(
        r"cyclip \(rankloss .*\) on ClipLoss, weights 0.25 cross-modal and 0.25 in-modal", start_line(run)
    )
    assert len(run.train_lines()) == STEPS // 2  # two micro-batches a step
    assert_loss_is_the_sum(run, CYCLIC_TERMS, [])
    assert all(value > 0 for term in CYCLIC_TERMS for value in run.scalars[term].values())
    assert run.params["cyclip_lambda_in"] == "0.25"


def test_cyclip_stands_on_the_sigmoid_loss(by_name: Runs) -> None:
    run = by_name["cyclip siglip"]
    assert "on SigLipLoss, weights 0.25 cross-modal and 0 in-modal" in start_line(run)
    assert len(run.train_lines()) == STEPS
    assert_loss_is_the_sum(run, CYCLIC_TERMS, [])
    assert set(run.scalars["cyclic_in_modal_loss"].values()) == {0.0}
    assert all(value > 0 for value in run.scalars["cyclic_cross_modal_loss"].values())


@pytest.mark.parametrize(("name", "gone"), [("rankclip-cross", "in"), ("rankclip-in", "cross")])
def test_ablations_train_with_one_term(by_name: Runs, name: str, gone: str) -> None:
    run = by_name[name]
    scales = (1, 0) if gone == "in" else (0, 1)
    assert f"lambda scale {scales[0]} cross-modal and {scales[1]} in-modal" in start_line(run)
    assert start_line(run).startswith(f"Loss: {name} ")
    assert_loss_is_the_sum(run, RANK_TERMS, ["rank_lambda"])
    kept = "cross" if gone == "in" else "in"
    assert set(run.scalars[f"{gone}_modal_loss"].values()) == {0.0}
    assert all(value > 0 for value in run.scalars[f"{kept}_modal_loss"].values())
    assert run.params[f"rankclip_lambda_{gone}"] == "0.0"


# --- ALIP -----------------------------------------------------------------------------------------------


def histories(run: Run, epoch: int) -> torch.Tensor:
    path = run.directory / "checkpoints" / f"epoch_{epoch}.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)["optimizer"]["rankloss_open_clip"]
    assert state["loss"] == "alip"
    value = state["state_dict"]["histories"]
    assert isinstance(value, torch.Tensor)
    return value


def test_alip_trains_on_two_captions(by_name: Runs) -> None:
    run = by_name["alip"]
    assert "alip (rankloss" in start_line(run)
    assert "in place of ClipLoss, second caption 'synthetic'" in start_line(run)
    assert len(run.train_lines()) == 3
    assert_loss_is_the_sum(run, ALIP_TERMS, HISTORIES)
    for name in ALIP_TERMS:
        assert all(value > 0 for value in run.scalars[name].values())
    assert run.scalars[ALIP_TERMS[0]][0] != run.scalars[ALIP_TERMS[1]][0]
    assert run.params["alip_caption_key"] == "synthetic"


def test_histories_come_down_once_a_step_and_are_checkpointed(by_name: Runs) -> None:
    run = by_name["alip"]
    for i, name in enumerate(HISTORIES):
        shown = [1.0, *run.scalars[name].values()]
        assert len(shown) == 4
        for before, after in itertools.pairwise(shown):
            mean = (after - 0.99 * before) / 0.01  # of the cosines of one batch
            assert -1 <= mean < 1
            assert after < before
        for epoch in (1, 2, 3):
            assert histories(run, epoch)[i].item() == pytest.approx(shown[epoch], abs=1e-7)


def test_validation_sees_one_caption(by_name: Runs) -> None:
    run = by_name["alip"]
    losses = [float(x) for x in re.findall(r"clip_val_loss: ([\d.]+)", run.log)]
    assert len(losses) == 3
    assert all(1 < loss < 6 for loss in losses)


def test_webdataset_gives_what_the_table_gives(by_name: Runs) -> None:
    table, shard = by_name["alip"].scalars, by_name["alip webdataset"].scalars
    for name in ("loss", *ALIP_TERMS, *HISTORIES):
        assert shard[name] == pytest.approx({step: table[name][step] for step in (0, 1)}, rel=1e-3), name
        assert shard[name][0] == pytest.approx(table[name][0], rel=1e-5), name


def test_accumulated_step_is_the_step_of_the_whole_batch(by_name: Runs) -> None:
    """The trainer calls the loss twice a step; the histories move once."""
    whole, accumulated = by_name["alip"].scalars, by_name["alip accumulation"].scalars
    assert len(by_name["alip accumulation"].train_lines()) == 2
    for name in ("loss", *ALIP_TERMS, *HISTORIES):
        assert accumulated[name][0] == pytest.approx(whole[name][0], rel=1e-5), name
        # The trainer's own gradient of the scale is twice as large under accumulation.
        assert accumulated[name][1] == pytest.approx(whole[name][1], rel=1e-2), name


def test_two_processes_are_one(by_name: Runs) -> None:
    whole, two = by_name["alip"].scalars, by_name["alip, two processes"].scalars
    for name in ("loss", *ALIP_TERMS, *HISTORIES):
        assert two[name][0] == pytest.approx(whole[name][0], rel=1e-5), name
        assert two[name][1] == pytest.approx(whole[name][1], rel=1e-3), name


def test_two_processes_that_accumulate_have_the_histories_of_the_whole_batch(by_name: Runs) -> None:
    whole, two = by_name["alip"].scalars, by_name["alip, two processes, accumulation"].scalars
    for name in HISTORIES:
        assert two[name][0] == pytest.approx(whole[name][0], rel=1e-6), name
        assert two[name][1] == pytest.approx(whole[name][1], rel=1e-3), name


def test_resumed_run_goes_on_with_its_histories(by_name: Runs) -> None:
    whole, resumed = by_name["alip"], by_name["alip resumed"]
    assert len(resumed.train_lines()) == 2
    assert "starts anew" not in resumed.log
    for epoch in (2, 3):
        torch.testing.assert_close(histories(resumed, epoch), histories(whole, epoch), rtol=1e-6, atol=0)
    for step in (1, 2):
        assert resumed.scalars["loss"][step] == pytest.approx(whole.scalars["loss"][step], rel=1e-5)


def test_two_trainings_of_one_process_have_histories_of_their_own(by_name: Runs) -> None:
    whole, second = by_name["alip"], by_name["alip, second"]
    first = Run(0, "", second.directory.parent / "alip, first")
    # The first goes on with the histories that it was resumed with; the second begins anew.
    torch.testing.assert_close(histories(first, 2), histories(whole, 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(histories(second, 1), histories(whole, 1), rtol=1e-6, atol=0)
    assert not torch.allclose(histories(second, 1), histories(first, 2), rtol=1e-3)
