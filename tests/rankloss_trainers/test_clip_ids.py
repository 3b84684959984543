"""The loss clip-ids: where ids come from in each trainer, and that they reach the loss."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from named_inputs import inputs_of
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_sentences import embed, step, tiny
from tiny_sentences import pairs as sentences
from tiny_sentences import train as train_sentences
from tiny_sentences import weights as weights_of_sentences
from tiny_transformers import SGD, Pairs, build, clip, column, own_loop, train, weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import rankloss
import rankloss_trainers
from rankloss_trainers.clip_ids import PartnersLog
from rankloss_trainers.pair_ids import hash_tokens
from rankloss_trainers.sentence_transformers import ContrastiveLoss

IDS = torch.tensor([5, 1, 5, 2, 1, 5, 3, 4])
ALONE = rankloss.Gather(rank=0, world_size=1)


@pytest.mark.parametrize("same", ["ignore", "share"])
@pytest.mark.parametrize(
    "others", ["", "+rankclip", "+cyclip", "+rankclip-distill+cyclip+mimicry", "+ranked-lists"]
)
def test_ids_reach_the_base_under_other_terms(others: str, same: str) -> None:
    name = f"clip-ids{others}"
    options = {"clip-ids": {"same_id": same}} if others else {"same_id": same}
    loss = rankloss_trainers.create(name, **options)
    given = inputs_of(name.rpartition("+")[2])
    v, t, s = (given[key] for key in ("image_features", "text_features", "logit_scale"))
    ids = given.pop("pair_ids", IDS)
    for number in (1, 3):
        loss.set_progress(number, 3)
        entries = loss(**given, pair_ids=ids, output_dict=True)
        expected = rankloss.ClipLoss(same_id=same)(v, t, s, pair_ids=ids)
        torch.testing.assert_close(entries["contrastive_loss"], expected)
    with pytest.raises(ValueError, match="pair_ids"):
        loss(**given)
    sigmoid = rankloss_trainers.create(name, rankloss.SigLipLoss(gather=False), gather=ALONE, **options)
    bases = [x for x in sigmoid.modules() if isinstance(x, rankloss.SigLipLoss)]
    assert [x.same_id for x in bases] == [same]


@pytest.mark.parametrize("name", ["clip-ids", "rankclip", "clip-ids+rankclip"])
def test_smoothing_of_the_base_is_kept(name: str) -> None:
    base = rankloss.ClipLoss(label_smoothing=0.2, gather=False)
    loss = rankloss_trainers.create(name, base, gather=ALONE)
    assert [x.label_smoothing for x in loss.modules() if isinstance(x, rankloss.ClipLoss)] == [0.2]


def test_it_does_not_replace_another_loss_nor_smooth_siglips() -> None:
    with pytest.raises(ValueError, match=r"clip-ids.*RankClipLoss"):
        rankloss_trainers.create("clip-ids", rankloss.RankClipLoss())
    with pytest.raises(ValueError, match=r"label_smoothing.*0\.1.*SigLIP"):
        rankloss_trainers.create("clip-ids", rankloss.SigLipLoss(), label_smoothing=0.1)


def test_the_share_of_pairs_with_a_partner_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    loss = rankloss.ClipLoss(same_id="ignore", gather=False)
    for ids, share, warned in ((IDS, 5 / 8, 0), (torch.arange(8), 0.0, 1)):
        log = PartnersLog()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rankloss_trainers"):
            entries = [log(loss, {}, step, {"pair_ids": ids}) for step in range(150)]
        assert {x["pairs_with_partner"].item() for x in entries} == {share}
        assert len(caplog.records) == warned


# --- transformers' Trainer --------------------------------------------------------------------------------


class Grouped(Pairs):
    """Pairs with a column of ids, and some captions twice."""

    def __init__(self, number: int = 16) -> None:
        super().__init__(number)
        self.columns["input_ids"][1::4] = self.columns["input_ids"][::4]
        self.group = [f"picture {n % 5}" for n in range(number)]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "group": self.group[i]}


@pytest.mark.parametrize("key", ["captions", "group"])
@pytest.mark.parametrize("size", [None, 3])
def test_transformers_trains_with_the_ids_of_its_data(tmp_path: Path, key: str, size: int | None) -> None:
    data, model = Grouped(8), clip()
    given = {"loss_options": {"clip-ids": {"key": key}, "rankclip": {"schedule": "constant"}}}
    ended = train(
        tmp_path,
        **{"pairs": data, "loss": "clip-ids+rankclip", "max_steps": 1, "mini_batch_size": size},
        **{"eval_dataset": Pairs(8), "eval_strategy": "steps", "eval_steps": 1},
        **given,
        **SGD,
    )
    ids = torch.tensor([data.group.index(x) for x in data.group])
    if key == "captions":
        ids = hash_tokens(data.columns, None)
    assert 0 < len({*ids.tolist()}) < 8
    data.columns["pair_ids"] = ids
    loss = rankloss.RankClipLoss(rankloss.ClipLoss(same_id="ignore"), schedule="constant")
    own_loop(model, loss, data, [8], steps=1)
    torch.testing.assert_close(weights(ended.model), weights(model), rtol=1e-4, atol=1e-6)
    assert column(ended, "pairs_with_partner")[0] > 0
    assert column(ended, "eval_loss")


@pytest.mark.parametrize(
    ("columns", "key", "message"),
    [
        ({}, "group", "group .*pixel_values"),
        ({"group": [0.5] * 8}, "group", "group .*0.5"),
        ({"group": ["train"] * 8}, "group", "group .*8"),
    ],
)
def test_a_column_of_no_ids_is_refused_before_the_first_step(
    tmp_path: Path, columns: dict[str, Any], key: str, message: str
) -> None:
    data = datasets.Dataset.from_dict({**{x: y.tolist() for x, y in Pairs(8).columns.items()}, **columns})
    model = build("CLIP")
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model=model, pairs=data, loss="clip-ids", loss_options={"key": key}, max_steps=1)
    assert torch.equal(weights(model), before)


def test_ids_are_read_without_the_transform_of_the_data(tmp_path: Path) -> None:
    """Which decodes pictures: those of the first row, and of two batches, as a loader reads ahead."""
    pairs, decoded = Pairs(64), []

    def decode(rows: dict[str, list[Any]], kept: bool = True) -> dict[str, Any]:
        decoded.extend(rows["row"])
        found = {name: [column[row] for row in rows["row"]] for name, column in pairs.columns.items()}
        return {**found, **({"group": rows["group"]} if kept else {})}

    table = datasets.Dataset.from_dict({"row": [*range(64)], "group": [f"{n // 2}" for n in range(64)]})
    given = {"loss": "clip-ids", "loss_options": {"key": "group"}, "remove_unused_columns": False}
    ended = train(tmp_path, pairs=table.with_transform(decode), max_steps=1, **given)
    assert column(ended, "pairs_with_partner") == [1.0]
    assert len(decoded) <= 1 + 2 * 8
    dropping = table.with_transform(functools.partial(decode, kept=False))
    with pytest.raises(ValueError, match=r"group .*transform"):
        train(tmp_path, pairs=dropping, max_steps=1, **given)


# --- sentence-transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["captions", "label"])
def test_sentence_transformers_trains_with_the_ids_of_its_data(tmp_path: Path, bert: Path, key: str) -> None:
    model, own = tiny(bert), tiny(bert)
    rows = sentences().select(range(8)).to_dict()
    rows["text"][1] = rows["text"][6] = rows["text"][0]
    labels = [0, 1, 0, 2, 2, 3, 4, 5]
    data = datasets.Dataset.from_dict({**rows, **({"label": labels} if key == "label" else {})})
    loss = ContrastiveLoss(model, "clip-ids", {"key": key})
    train_sentences(tmp_path, loss, model, train_dataset=data, max_steps=1, learning_rate=0.1)
    ids = torch.tensor(labels if key == "label" else [7, 7, 1, 2, 3, 4, 7, 5])
    step(own, rankloss.ClipLoss(same_id="ignore")(*embed(own, *rows.values()), 20.0, pair_ids=ids))
    torch.testing.assert_close(weights_of_sentences(model), weights_of_sentences(own), rtol=1e-4, atol=1e-5)


def test_equal_captions_are_known_in_bags_of_words() -> None:
    """Of a StaticEmbedding, whose texts stand in one row."""
    words = {word: n for n, word in enumerate(["[UNK]", "a", "b", "c"])}
    static = StaticEmbedding(Tokenizer(WordLevel(words, unk_token="[UNK]")), embedding_dim=8)
    static.tokenizer.pre_tokenizer = Whitespace()
    model = SentenceTransformer(modules=[static], device="cpu")
    texts = ["a b", "b a", "b", "a b", "c"]
    columns = [model.preprocess(x) for x in (["a", "b", "c", "a b c", "c b"], texts)]
    entries = ContrastiveLoss(model, "clip-ids")(columns)
    both = [F.normalize(model(column)["sentence_embedding"], dim=-1) for column in columns]
    owed = rankloss.ClipLoss(same_id="ignore")(*both, 20.0, pair_ids=torch.tensor([1, 2, 3, 1, 4]))
    torch.testing.assert_close(entries["contrastive_loss"], owed)


def test_a_label_of_one_value_is_refused_before_the_first_step(tmp_path: Path, bert: Path) -> None:
    model = tiny(bert)
    before = weights_of_sentences(model)
    data = sentences().add_column("label", [7] * 32)
    loss = ContrastiveLoss(model, "clip-ids", {"key": "label"})
    with pytest.raises(ValueError, match=r"label .*32"):
        train_sentences(tmp_path, loss, model, train_dataset=data)
    assert torch.equal(weights_of_sentences(model), before)


def test_sentence_transformers_hands_no_other_column_to_a_loss(bert: Path) -> None:
    with pytest.raises(ValueError, match=r"^key .*'group'"):
        ContrastiveLoss(tiny(bert), "clip-ids", {"key": "group"})
