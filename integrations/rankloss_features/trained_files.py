"""Files of weights that open_clip's trainer wrote: how it built the model and prepared the pictures.

A file of weights says neither. The trainer writes its options beside the checkpoints, in the run's
``params.txt``; with others a model computes other features, without an error. A ``--model local-dir:…`` or
``hf-hub:…`` of the run has a configuration of its own, ``open_clip_config.json``, which says the rest.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankloss_features.folder import read_json
from rankloss_features.opening import is_tag, open_clip_name

_OF_PICTURES = {
    "image_mean": "mean",
    "image_std": "std",
    "image_interpolation": "interpolation",
    "image_resize_mode": "resize_mode",
}
"""The trainer's options of prepared pictures, and open_clip's names of them beside known weights."""
_REPLACED_BIAS = -10.0  # the trainer's first bias of --siglip
_OF_THE_MODEL = ("force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length")
_CONFIGURATION = "open_clip_config.json"
_OF_TRAINING = (
    "patch_dropout",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "hf_model_pretrained",
)
"""Fields of a tower's configuration that change nothing once the model has its weights and is evaluated."""

_WAY_OF_A_FOLDER = (
    "copy that file into a new folder, and the weights beside it as open_clip_pytorch_model.bin, and give "
    "--model local-dir:FOLDER without --pretrained"
)


def options_of(model: str, weights: str) -> dict[str, Any]:
    """The options by which open_clip builds a model for the weights in a file as its trainer built it.

    They are the options of the file's run. A model of ``local-dir:…`` or ``hf-hub:…`` adds the activation and
    the preparation of pictures in its configuration; where both have one, the option of the run counts.

    Args:
        model: The name of ``--model``, one of open_clip's own models.
        weights: A file, ``RUN/checkpoints/epoch_5.pt``, whose options stand in ``RUN/params.txt``. For a tag
            none are returned: open_clip knows them.

    Raises:
        ValueError: The run trained another model; or the configuration of its model is not found; or nothing
            says how the pictures were prepared, and all known weights of the model want them otherwise than
            open_clip prepares them by default.
    """
    if is_tag(model, weights) or not Path(weights).is_file():
        return {}
    name = open_clip_name(model)
    run = options_of_run(Path(weights))
    options = {option: run[option] for option in (*_OF_PICTURES, *_OF_THE_MODEL) if run.get(option)}
    if run.get("siglip"):  # its models have a bias, which open_clip adds where it is given a value of it
        options["init_logit_bias"] = _REPLACED_BIAS  # by the one in the file of weights

    trained = str(run.get("model", ""))
    if not trained:
        _check_default_pictures(name, weights)
        return options
    is_built_in = ":" not in trained
    if not is_built_in:
        return {**_as_configured(name, run, weights), **options}
    if open_clip_name(trained) != name:
        raise ValueError(f"the weights {weights} are of --model {trained}, as their params.txt says")
    return {**_pictures_of_first_weights(name, run), **options}


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
    return _options_of_pictures(open_clip.get_pretrained_cfg(name, tag))  # empty for no tag of the model's


def _options_of_pictures(preparation: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's options for a preparation of pictures by open_clip's names, as far as it says them."""
    return {
        option: preparation[key] for option, key in _OF_PICTURES.items() if preparation.get(key) is not None
    }


def _as_configured(name: str, run: dict[str, Any], weights: str) -> dict[str, Any]:
    """The options of the activation and of pictures in the configuration of a run's own model.

    Args:
        name: The built-in model that is to be opened.
        run: The options of the run, whose ``model`` is a ``local-dir:…`` or ``hf-hub:…``.
        weights: The file of weights, for the errors.

    Raises:
        ValueError: The configuration is not found, or it is of another model than ``name``.
    """
    import open_clip

    trained = f"the weights {weights} are of --model {run['model']}"
    configuration = _configuration_of(str(run["model"]), run.get("cache_dir"))
    if configuration is None:
        raise ValueError(
            f"{trained}, whose {_CONFIGURATION} is not found, and nothing else says its activation and how "
            f"pictures were prepared: {_way_to_configuration(str(run['model']))}"
        )
    of_run, built_in = configuration["model_cfg"], open_clip.get_model_config(name) or {}
    overridden = {field for field in ("image_size", "context_length") if run.get(f"force_{field}")}
    differences = _differences_of_towers(of_run, built_in, without={*_OF_TRAINING, *overridden})
    if differences:
        raise ValueError(
            f"{trained}, whose {_CONFIGURATION} differs from {name} in {', '.join(differences)}: "
            f"{_WAY_OF_A_FOLDER}"
        )
    options = _options_of_pictures(configuration.get("preprocess_cfg") or {})
    quick_gelu = bool(of_run.get("quick_gelu"))
    if quick_gelu != bool(built_in.get("quick_gelu")) and not run.get("force_quick_gelu"):
        options["quick_gelu"] = quick_gelu  # in place of the built-in model's
    return options


def _way_to_configuration(trained: str) -> str:
    """The remedy where the configuration of a ``local-dir:…`` or ``hf-hub:…`` is not found."""
    if trained.startswith("hf-hub:"):
        return f"`hf download {trained.removeprefix('hf-hub:')} {_CONFIGURATION}` brings it"
    return f"put it back there; or {_WAY_OF_A_FOLDER}"


def _configuration_of(trained: str, cache: str | None) -> dict[str, Any] | None:
    """The content of the ``open_clip_config.json`` of a run's own model; None where it is not found.

    Nothing is downloaded: of a hub's model it is found where the trainer, or the user, has put it.

    Args:
        trained: ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``, as the run's ``--model`` was.
        cache: The run's ``--cache-dir``, in which a hub's files are looked for before the usual folder.

    Raises:
        ValueError: The file has no configuration of a model.
    """
    scheme, _, place = trained.partition(":")
    files = [Path(place, _CONFIGURATION)] if scheme == "local-dir" else _cached_files(place, cache)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("model_cfg"), dict):
        raise ValueError(f"{file} has no 'model_cfg'")
    return content


def _cached_files(repository: str, cache: str | None) -> list[Path]:
    """The configurations of a hub's model that are cached, in this folder first and then in the usual one."""
    from huggingface_hub import try_to_load_from_cache

    folders = [str(cache), None] if cache else [None]
    cached = [try_to_load_from_cache(repository, _CONFIGURATION, cache_dir=folder) for folder in folders]
    return [Path(path) for path in cached if isinstance(path, str)]  # no text where it is not cached


def _differences_of_towers(of_run: dict[str, Any], built_in: dict[str, Any], without: set[str]) -> list[str]:
    """The fields in which the towers of two models differ, such as ``text_cfg.heads (4, not 8)``.

    Few of them change the shape of a weight, so a file can fit a model that computes something else.

    Args:
        of_run: ``model_cfg`` of the run's own model.
        built_in: That of the model to be opened.
        without: Fields that are not compared.
    """
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    differences = []
    for tower, defaults in (("vision_cfg", CLIPVisionCfg()), ("text_cfg", CLIPTextCfg())):
        fields_of_run = {**vars(defaults), **(of_run.get(tower) or {})}
        fields_of_built_in = {**vars(defaults), **(built_in.get(tower) or {})}
        for field in sorted({*fields_of_run, *fields_of_built_in} - without):
            value, other = fields_of_run.get(field), fields_of_built_in.get(field)
            if value != other:
                differences.append(f"{tower}.{field} ({value}, not {other})")
    return differences


def _check_default_pictures(name: str, weights: str) -> None:
    """Raise a ValueError if all known weights of a model want other pictures than open_clip's default.

    Args:
        name: The model's name.
        weights: The file of weights, for the error.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    tags = open_clip.list_pretrained_tags_by_model(name)
    default = vars(PreprocessCfg())

    def wants_default(tag: str) -> bool:
        wanted = {**default, **open_clip.get_pretrained_cfg(name, tag)}
        return all(wanted[key] == default[key] for key in _OF_PICTURES.values())

    if tags and not any(wants_default(tag) for tag in tags):
        raise ValueError(
            f"nothing says how pictures were prepared for {weights}, and {name} wants others than the "
            "default: leave the file in its run, whose params.txt says it, or give local-dir:FOLDER"
        )
