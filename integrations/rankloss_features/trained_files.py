"""Files of weights that open_clip's trainer wrote: how it built the model and prepared the pictures.

A file of weights says neither. The trainer writes its options beside the checkpoints, in the run's
``params.txt``; with others a model computes other features, without an error.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from rankloss_features.opening import open_clip_name

_OF_PICTURES = {
    "image_mean": "mean",
    "image_std": "std",
    "image_interpolation": "interpolation",
    "image_resize_mode": "resize_mode",
}
"""The trainer's options of prepared pictures, and open_clip's names of them beside known weights."""
_REPLACED_BIAS = -10.0  # the trainer's first bias of --siglip
_OF_THE_MODEL = ("force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length")


def options_of(model: str, weights: str) -> dict[str, Any]:
    """The options by which open_clip builds a model for the weights in a file as its trainer built it.

    The run's own options are obeyed, whatever its ``--model`` was. The configuration that a ``local-dir:…``
    or ``hf-hub:…`` brings beside them is not read.

    Args:
        model: The name of ``--model``.
        weights: A file, ``RUN/checkpoints/epoch_5.pt``, whose options stand in ``RUN/params.txt``; of a tag
            open_clip knows them.

    Raises:
        ValueError: The run trained another model; or nothing says how the pictures were prepared, and all
            known weights of the model want them otherwise than open_clip prepares them by default.
    """
    if not Path(weights).is_file():
        return {}
    name = open_clip_name(model)
    run = options_of_run(Path(weights))
    trained = str(run.get("model", ""))
    is_built_in = trained != "" and ":" not in trained
    if is_built_in and open_clip_name(trained) != name:
        raise ValueError(f"the weights {weights} are of --model {trained}, as their params.txt says")

    options = {option: run[option] for option in (*_OF_PICTURES, *_OF_THE_MODEL) if run.get(option)}
    if run.get("siglip"):  # its models have a bias, which open_clip adds where it is given a value of it
        options["init_logit_bias"] = _REPLACED_BIAS  # by the one in the file of weights
    if is_built_in:
        return {**_pictures_of_first_weights(name, run), **options}
    _check_default_pictures(name, weights, options)
    return options


def options_of_run(weights: Path) -> dict[str, Any]:
    """The options of the run that a checkpoint is of, by name; empty if it is of none."""
    record = weights.resolve().parent.parent / "params.txt"
    if not record.is_file():
        return {}
    options = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        name, separator, value = line.partition(": ")
        if separator:
            options[name] = _parsed(value)
    return options


def _parsed(text: str) -> Any:
    """The value of an option: a number, a list or None; any other text is itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _pictures_of_first_weights(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """The options of pictures that belong to the published weights with which a run began, if it did."""
    import open_clip

    tag = str(run.get("pretrained") or "")
    about_weights = open_clip.get_pretrained_cfg(name, tag)  # empty where the tag is none of the model's
    return {
        option: about_weights[key]
        for option, key in _OF_PICTURES.items()
        if about_weights.get(key) is not None
    }


def _check_default_pictures(name: str, weights: str, options: dict[str, Any]) -> None:
    """Raise a ValueError if all known weights of a model want other pictures than open_clip's default.

    Args:
        name: The model's name.
        weights: The file of weights, for the error.
        options: Options of the file's run; those of pictures are known, so their default is not compared.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    unknown_keys = [key for option, key in _OF_PICTURES.items() if option not in options]
    tags = open_clip.list_pretrained_tags_by_model(name)
    default = vars(PreprocessCfg())

    def wants_default(tag: str) -> bool:
        wanted = {**default, **open_clip.get_pretrained_cfg(name, tag)}
        return all(wanted[key] == default[key] for key in unknown_keys)

    if tags and not any(wants_default(tag) for tag in tags):
        raise ValueError(
            f"nothing says how pictures were prepared for {weights}, and {name} wants others than the "
            "default: leave the file in its run, whose params.txt says it, or give local-dir:FOLDER"
        )
