"""Models of both modalities of transformers: texts have the length that the model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teacher import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

from rankloss_features import transformers_clip
from rankloss_features.data import Sample

POSITIONS = 8
"""Tokens of a text that the model takes."""
TEXTS = {"shorter": WORDS[0], "longer": " ".join(WORDS[:5] * 4)}
"""A text of fewer tokens than that, and one of more."""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a bound, as SigLIP 2's: it pads to a length, and cuts, where it is told one."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_input_names=["input_ids"]
    )


@pytest.fixture
def siglip(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> tuple[Path, SiglipModel]:
    """A folder of a tiny SigLIP beside that tokenizer, and the model."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    of_texts = {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, "projection_size": 16}
    of_images = {"image_size": 32, "patch_size": 16}
    config = SiglipConfig(text_config={**tower, **of_texts}, vision_config={**tower, **of_images})
    model = SiglipModel(config).eval()
    for part in (model, SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer):
        part.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_siglip_reads_as_many_tokens_as_it_was_trained_with(
    text: str, siglip: tuple[Path, SiglipModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, model = siglip
    tokens = tokenizer([text])["input_ids"][0]
    padding = [tokenizer.pad_token_id] * POSITIONS
    padded = [*tokens, *padding][:POSITIONS]  # or cut, where the text is longer
    with torch.no_grad():
        expected = model.text_model(torch.tensor([padded])).pooler_output
    torch.testing.assert_close(features_of_text(folder, text), expected)


def features_of_text(folder: Path, text: str) -> Tensor:
    """The features that a command computes."""
    encoder: Any = transformers_clip.load(str(folder), torch.device("cpu")).encoders["text_features"]
    with torch.no_grad():
        features: Tensor = encoder.encode(encoder.prepare([Sample(0, "", text)]))
    return features
