"""The second caption: joined, tokenized separately, encoded in one call, and split again."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import open_clip_train.data
import pytest
import torch
from open_clip_train.params import parse_args
from torch import Tensor, nn

from rankloss_open_clip import command_line, companions
from rankloss_open_clip.captions import SecondCaption
from rankloss_open_clip.companions import JoinedTokenizer


def join_csv(dataset: Any, path: str, separator: str, key: str) -> None:
    companions.join_csv(dataset, path, separator, SecondCaption(key))


def joined_samples(read: Any, key: str, text_key: str = "txt") -> companions.JoinedSamples:
    return companions.JoinedSamples(read, SecondCaption(key), text_key)


def split_features(model: nn.Module) -> None:
    companions.split_features(model, SecondCaption("syn"))


# --- reading --------------------------------------------------------------------------------------------


def shard(*samples: dict[str, Any]) -> Any:
    """A reader of what it is called with, as webdataset's readers are."""

    def read(source: str, handler: str) -> Iterator[dict[str, Any]]:
        assert (source, handler) == ("source", "handler")
        for i, sample in enumerate(samples):
            yield {"__key__": str(i), "__url__": "a.tar", "jpg": b"...", **sample}

    return read


def texts(reader: companions.JoinedSamples, text_key: str = "txt") -> list[bytes | None]:
    return [sample.get(text_key) for sample in reader("source", handler="handler")]


def test_text_file_is_joined_to_the_caption() -> None:
    read = shard(
        {"txt": b"raw \xc3\xa9", "syn.txt": b"made\x1fup"}, {"txt": b"left out"}, {"syn.txt": b"dropped"}
    )
    assert texts(joined_samples(read, "Syn.TXT")) == ["raw é\x1fmade up".encode()]


def test_field_of_the_json_is_joined_to_the_caption() -> None:
    read = shard(
        {"txt": b"a", "json": json.dumps({"blip": "b", "url": "u"}).encode()},
        {"txt": b"c", "json": b'{"other": "d"}'},
        {"txt": b"e", "json": b"not json"},
        {"txt": b"f"},
        {"txt": b"g", "json": b'{"blip": 7}'},
    )
    assert texts(joined_samples(read, "json:blip")) == [b"a\x1fb", b"g\x1f7"]


def test_first_caption_is_the_one_the_trainer_prefers() -> None:
    read = shard({"caption": b"a", "syn": b"b"}, {"txt": b"c", "caption": b"d", "syn": b"e"})
    samples = list(joined_samples(read, "syn", "txt;caption")("source", handler="handler"))
    assert samples[0]["caption"] == b"a\x1fb"
    assert (samples[1]["txt"], samples[1]["caption"]) == (b"c\x1fe", b"d")


@pytest.mark.parametrize("count", [1, 99, 100, 1000])
def test_wrong_key_is_an_error_that_shows_a_sample(count: int) -> None:
    read = shard(*[{"txt": b"a", "json": b"{}"}] * count)
    shown = min(count, 100)
    message = (
        f"none of {shown} samples has a second caption 'syn'; the last one, '{shown - 1}', has jpg, txt, json"
    )
    with pytest.raises(ValueError, match=message):
        texts(joined_samples(read, "syn"))


def test_late_second_captions_are_no_error() -> None:
    read = shard(*[{"txt": b"a"}] * 99, {"txt": b"a", "syn": b"b"}, *[{"txt": b"a"}] * 200)
    assert texts(joined_samples(read, "syn")) == [b"a\x1fb"]
    assert texts(joined_samples(shard(), "syn")) == []


def csv(path: Path, text: str) -> tuple[Any, str]:
    file = path / "data.csv"
    file.write_text(text)
    dataset = open_clip_train.data.CsvDataset(str(file), None, "filepath", "title", sep=";")
    return dataset, str(file)


def test_column_is_joined_to_the_captions(tmp_path: Path) -> None:
    dataset, file = csv(tmp_path, "filepath;title;syn\n1.png;raw;made\n2.png;5;NULL and void\n")
    join_csv(dataset, file, ";", "syn")
    assert list(dataset.captions) == ["raw\x1fmade", "5\x1fNULL and void"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filepath;title\n1.png;raw\n", "has no column 'syn' for the second caption; it has filepath, title"),
        (
            "filepath;title;syn\n1.png;a;b\n2.png;c;\n3.png;d;\n",
            "in 2 rows: column 'syn' is empty, first in row 2",
        ),
    ],
)
def test_missing_captions_are_named(tmp_path: Path, text: str, message: str) -> None:
    dataset, file = csv(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        join_csv(dataset, file, ";", "syn")


# --- tokenizing -----------------------------------------------------------------------------------------


def test_pair_tokenizer_is_the_tokenizer_of_each() -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    pairs = JoinedTokenizer(tokenizer, SecondCaption("syn"))
    tokens = pairs(["a cat\x1fa small animal", "\x1fa dog"])
    assert tokens.shape == (2, 2, 12)
    assert torch.equal(tokens[:, 0], tokenizer(["a cat", ""]))
    assert torch.equal(tokens[:, 1], tokenizer(["a small animal", "a dog"]))
    assert torch.equal(pairs("a cat\x1fa small animal"), tokens[:1])
    assert torch.equal(pairs("a\x1fb", context_length=5)[0], tokenizer(["a", "b"], context_length=5))
    assert pairs.context_length == 12
    for other in (copy.deepcopy(pairs), pickle.loads(pickle.dumps(pairs))):
        assert torch.equal(other("a\x1fb"), pairs("a\x1fb"))
    with pytest.raises(ValueError, match=r"joined with a second caption 'syn', got 1 parts: \['only one'\]"):
        pairs(["a\x1fb", "only one"])


# --- the trainer's readers ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("loss", [[], ["--loss", "alip", "--alip-caption-key", "syn"]])
def test_only_training_data_of_a_loss_that_needs_them_have_pairs(
    tmp_path: Path, is_train: bool, loss: list[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    _, file = csv(tmp_path, f"filepath;title;syn\n{tmp_path}/1.png;raw;made\n")
    data = ["--train-data", file, "--val-data", file, "--csv-separator", ";", "--batch-size", "1"]
    args = parse_args([*loss, *data, "--workers", "0"])
    args.distributed = False
    info = open_clip_train.data.get_csv_dataset(
        args, lambda image: image.load(), is_train, tokenizer=open_clip.SimpleTokenizer(context_length=9)
    )
    _, tokens = info.dataloader.dataset[0]
    assert tokens.shape == ((2, 9) if is_train and loss else (9,))


def test_reader_of_shards_is_put_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = open_clip_train.data.tarfile_to_samples_nothrow
    args = parse_args(
        ["--loss", "alip", "--alip-caption-key", "syn", "--train-data", str(tmp_path / "0.tar")]
    )
    args.world_size = 1
    with pytest.raises(RuntimeError, match="number of dataset samples must be specified"):
        open_clip_train.data.get_wds_dataset(args, None, is_train=True, tokenizer=None)
    assert open_clip_train.data.tarfile_to_samples_nothrow is original


# --- the model ------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    tower = {"width": 32, "layers": 1}
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 8, "head_width": 16, **tower},
        text_cfg={"context_length": 8, "vocab_size": 50, "heads": 2, **tower},
        output_dict=True,
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    return images, torch.randint(1, 50, (3, 2, 8), generator=generator)


@pytest.mark.parametrize("named", [False, True])
def test_two_captions_are_encoded_in_one_call_of_the_model(named: bool) -> None:
    clip, plain = model().double(), model().double()
    for _ in range(2):
        split_features(clip)
    calls: list[int] = []
    clip.transformer.register_forward_hook(lambda *_: calls.append(1))
    images, pairs = batch()
    images = images.double()
    output = clip(image=images, text=pairs) if named else clip(images, pairs)
    assert calls == [1]
    first, second = (plain(images, pairs[:, i]) for i in range(2))
    assert list(output) == [*first, "caption_features"]
    torch.testing.assert_close(output["image_features"], first["image_features"])
    torch.testing.assert_close(output["text_features"], first["text_features"])
    torch.testing.assert_close(output["caption_features"], second["text_features"])
    # Gradients flow from both captions into the one text tower.
    (output["text_features"].sum() + 3 * output["caption_features"].sum()).backward()
    (first["text_features"].sum() + 3 * second["text_features"].sum()).backward()
    for (name, a), b in zip(clip.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert clip.state_dict().keys() == plain.state_dict().keys()


def test_what_has_one_caption_passes_untouched() -> None:
    clip, plain = model().eval(), model().eval()
    split_features(clip)
    images, pairs = batch()
    for given in ((images, pairs[:, 0]), (images, None), (None, pairs[:, 0]), (images,)):
        output, expected = clip(*given), plain(*given)
        assert list(output) == list(expected)
        for name, value in expected.items():
            assert value is None or torch.equal(output[name], value), name
    for prompts in (pairs[:, 0], torch.cat([pairs[:, 0]] * 2)):
        assert torch.equal(clip.encode_text(prompts), plain.encode_text(prompts))


def test_wrapped_models_are_reached() -> None:
    clip = model()
    wrapped = torch.compile(nn.ModuleDict({"module": clip})["module"], backend="eager")
    split_features(SimpleModule(wrapped))
    images, pairs = batch()
    assert clip(images, pairs)["caption_features"].shape == (3, 16)


class SimpleModule(nn.Module):
    """What DDP looks like: the model is its ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


# The compiler reads .grad of tensors that are not leaves, which warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_model_gives_the_same() -> None:
    clip, plain = model(), model()
    compiled = torch.compile(clip, backend="eager")
    split_features(compiled)
    split_features(plain)
    images, pairs = batch()
    output, expected = compiled(images, pairs), plain(images, pairs)
    assert list(output) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value)
    assert list(compiled(images, pairs[:, 0])) == list(plain(images, pairs[:, 0]))
    torch.compiler.reset()


def test_namespace_of_arguments_without_a_loss_needs_no_captions() -> None:
    assert command_line.companion_of(SimpleNamespace()) is None
    assert command_line.companion_of(parse_args(["--loss", "cyclip"])) is None
