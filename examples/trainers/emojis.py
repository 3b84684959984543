"""Emojis with captions, and small models with random weights: what the examples beside this file train.

``python examples/trainers/emojis.py FOLDER`` writes the pictures and ``pairs.csv`` into a folder.
"""

import json
import sys
from pathlib import Path

import open_clip
import torch
from openmoji_demo.data import Emoji, draw, load_emojis, read_svg
from PIL import Image
from torch.utils.data import TensorDataset

MODEL = Path(__file__).parents[1] / "demo/model"  # the demo's

SHORT_RUN = {
    **{"per_device_train_batch_size": 32, "learning_rate": 1e-3, "dataloader_drop_last": True},
    **{"logging_steps": 1, "save_strategy": "no", "report_to": "none"},
}
"""Arguments of Hugging Face's Trainer."""


def chosen() -> list[Emoji]:
    """The animals, some 130."""
    return [emoji for emoji in load_emojis() if emoji.subgroup.startswith("animal")]


def caption_of(emoji: Emoji) -> str:
    """The name and the first keywords."""
    return ", ".join((emoji.name, *emoji.tags[:3]))


def picture_of(emoji: Emoji) -> Image.Image:
    """The emoji in colour, 72 pixels wide."""
    return draw(read_svg(emoji.hexcode))


def write(folder: Path) -> Path:
    """Write the pictures and ``pairs.csv``, of a picture, its caption and its class, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["filepath\ttitle\tclass"]
    for emoji in chosen():
        path = folder / f"{emoji.hexcode}.png"
        picture_of(emoji).save(path)
        lines.append(f"{path}\t{caption_of(emoji)}\t{emoji.subgroup}")
    table = folder / "pairs.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def tensors() -> TensorDataset:
    """The pictures as :func:`clip` takes them, ``[N, 3, 64, 64]``, and the tokens of the captions."""
    preprocess = open_clip.image_transform(64, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    emojis, tokenizer = chosen(), open_clip.get_tokenizer(f"local-dir:{MODEL}")
    images = torch.stack([preprocess(picture_of(emoji)) for emoji in emojis])
    return TensorDataset(images, tokenizer([caption_of(emoji) for emoji in emojis]))


def clip() -> torch.nn.Module:
    """A CLIP of open_clip, which returns unit-norm features of pictures and tokens, and the scale."""
    torch.manual_seed(0)
    config = json.loads((MODEL / "open_clip_config.json").read_text(encoding="utf-8"))
    return open_clip.CLIP(**config["model_cfg"])


def table():
    """The pictures and captions as a table of ``datasets``."""
    from datasets import Dataset

    rows = [{"image": picture_of(emoji), "caption": caption_of(emoji)} for emoji in chosen()]
    return Dataset.from_list(rows)


def hugging_face_clip(folder: Path):
    """A CLIP of transformers and its processor, whose vocabulary goes to a folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    known = open_clip.get_tokenizer(f"local-dir:{MODEL}")
    words = [*list(known.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}), encoding="utf-8")
    merges.write_text("\n".join(["#version: 0.2", *map(" ".join, known.bpe_ranks)]), encoding="utf-8")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=24)
    pictures = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 24, "eos_token_id": len(words) - 1}
    vision = {**tower, "image_size": 64, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    return model, CLIPProcessor(pictures, tokenizer)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
