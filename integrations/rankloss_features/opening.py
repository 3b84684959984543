"""Opens models, tokenizers, data sets and pictures that others made, and runs none of their code.

Files of a model can ask for more than to be read. ``auto_map`` names Python beside the weights,
``tokenizer_kwargs`` and ``model_args`` set the very options of a call that would refuse it, a pickle names
any function. So the options of a call are not enough, and open_clip's text towers have none: within
:func:`without_code` the functions of torch and transformers that run such code refuse it, whatever the files
say.

All of ``rankloss_features`` opens such files here, and nowhere else.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_LOCK = threading.RLock()  # the functions are replaced in the whole process
_SAFE_TORCH = "2.10"
SAFE_FROM = {
    "datasets": "4",  # earlier ones run the script of a folder
    "pillow": "13" if sys.version_info >= (3, 11) else "12.3",  # earlier ones write outside of their memory
    "sentence-transformers": "6.2",  # earlier ones run the Python of a local folder
    "timm": "1.0.27",  # earlier ones run the pickles in a file of weights
}
"""The first versions that open files of others safely: the floors of the extra ``features``."""

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@contextmanager
def without_code() -> Iterator[None]:
    """A context in which no library runs code of the files that it opens.

    ``torch.load`` reads weights alone, and nothing at all below torch 2.10, whose reader of weights can be
    made to write outside of its memory (CVE-2026-24747); any torch reads safetensors. Archives of TorchScript
    are refused. transformers refuses Python beside weights, without a question, and kernels of a hub.

    Raises:
        ValueError: Within the context, a file needs code of its own, or a safer torch.
    """
    with _LOCK:
        replacements = list(_replacements())
        originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
        try:
            for module, name, replacement in replacements:
                setattr(module, name, replacement)
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """The module, the name and the replacement of each function that runs code of files."""
    yield torch, "load", partial(_load_weights, torch.load)
    yield torch.jit, "load", _refuse_archive
    if importlib.util.find_spec("transformers") is None:
        return
    from transformers import dynamic_module_utils
    from transformers.integrations import hub_kernels

    yield dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0  # seconds in which a user may say that code may run
    yield dynamic_module_utils, "get_cached_module_file", _refuse_module
    if hasattr(hub_kernels, "get_kernel"):
        yield hub_kernels, "get_kernel", _refuse_kernel


def _load_weights(
    load: Callable[..., Any], file: Any, *args: Any, weights_only: bool | None = None, **options: Any
) -> Any:
    """``torch.load`` of weights alone, whatever the caller asks for, where torch reads them safely."""
    del weights_only
    if torch.__version__ < _SAFE_TORCH:  # compared as versions: 2.9 is below 2.10
        raise ValueError(
            f"{file} is a pickle, and torch {torch.__version__} does not read one safely (CVE-2026-24747): "
            "convert it to safetensors, or install torch>=2.10"
        )
    return load(file, *args, weights_only=True, **options)


def _refuse_archive(file: Any, *_: Any, **__: Any) -> None:
    raise ValueError(f"{file} is an archive of TorchScript, which is code and is not run: give weights")


def _refuse_module(folder: Any, file: str, *_: Any, **__: Any) -> None:
    raise ValueError(f"{folder} needs code of its own, {file}, which is not run")


def _refuse_kernel(name: str, *_: Any, **__: Any) -> None:
    raise ValueError(f"the model asks for the kernel {name}, which is code of a hub and is not run")


@functools.cache
def check_version(distribution: str) -> None:
    """Compare the installed version with :data:`SAFE_FROM`: another package may have brought an older one.

    Raises:
        ValueError: It is older.
    """
    from packaging.version import Version  # each of them brings it, or a package beside it

    installed = importlib.metadata.version(distribution)
    needed = SAFE_FROM[distribution]
    if Version(installed) < Version(needed):
        raise ValueError(
            f"{distribution} {installed} is installed, which does not open files of others safely: "
            f"pip install '{distribution}>={needed}'"
        )


# --- models ---------------------------------------------------------------------------------------------


def open_clip_name(model: str) -> str:
    """The name by which open_clip knows a built-in model: ``ViT-B-32`` is also written ``ViT-B/32``."""
    return model.replace("/", "-")


def is_tag(model: str, pretrained: str) -> bool:
    """True if open_clip has weights of this tag for a model. It prefers a tag to a file of that name."""
    import open_clip

    return bool(open_clip.get_pretrained_cfg(open_clip_name(model), pretrained))


def open_clip_model(
    name: str, pretrained: str | None, device: torch.device, **options: Any
) -> tuple[Any, Any, Any]:
    """A model of open_clip with its weights, the transform of a picture, and the tokenizer.

    Args:
        name: As ``--model`` has it, also ``local-dir:…`` and ``hf-hub:…``.
        pretrained: A tag or a file of weights; None for the latter two.
        device: The device that it computes on.
        options: Others of open_clip's: of the model, or of the pictures.

    Raises:
        ValueError: It needs code of its own.
        RuntimeError: It is unknown, or has no weights.
    """
    import open_clip

    with without_code():
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained, device=device, require_pretrained=True, weights_only=True, **options
        )
        tokenizer = open_clip.get_tokenizer(name, context_length=options.get("force_context_length"))
        return model.eval(), transform, tokenizer


def timm_model(name: str, *, pretrained: bool = False, **options: Any) -> Any:
    """A model of timm, also ``local-dir:…`` and ``hf-hub:…``, with the hub's weights if it is pretrained."""
    import timm

    check_version("timm")
    with without_code():
        return timm.create_model(name, pretrained=pretrained, **options)


def known_weights(file: Path) -> dict[str, Any]:
    """The weights, in timm's layouts, in a file whose hash the caller has checked.

    So it is read without :func:`without_code`, and below torch 2.10, too.
    """
    from timm.models import load_state_dict

    return dict(load_state_dict(str(file), weights_only=True))


def load_timm_weights(model: nn.Module, file: str, convert: Any) -> tuple[list[str], list[str]]:
    """Load the weights in a file into a model of timm; the keys that are missing, and those left over.

    Args:
        model: The model.
        file: The file.
        convert: timm's conversion of the weights that the model's authors published, or None.
    """
    from timm.models import load_checkpoint

    check_version("timm")
    with without_code():
        missing, unexpected = load_checkpoint(model, file, strict=False, filter_fn=convert, weights_only=True)
    return missing, unexpected


def tensors_of(content: bytes) -> dict[str, Tensor]:
    """The tensors in the content of a file of safetensors, by name.

    Raises:
        ValueError: The content is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def transformers_model(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of transformers, by its folder or its name on a hub, and the report of its weights.

    Raises:
        ValueError: It needs code of its own.
    """
    from transformers import AutoModel

    with without_code():
        model, info = AutoModel.from_pretrained(
            name, output_loading_info=True, weights_only=True, trust_remote_code=False
        )
        return model, info


def text_processor(name: str) -> Any:
    """The tokenizer of a model of transformers.

    Raises:
        ValueError: It needs code of its own.
    """
    from transformers import AutoTokenizer

    with without_code():
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def image_processor(name: str) -> Any:
    """The image processor of a model of transformers.

    Raises:
        ValueError: It needs code of its own.
    """
    import transformers

    # Some releases of transformers have types for it, others not.
    processors: Any = transformers.AutoImageProcessor
    with without_code():
        return processors.from_pretrained(name, trust_remote_code=False)


def sentence_transformers_model(name: str, device: torch.device) -> Any:
    """A model of sentence-transformers, by its folder or its name on a hub.

    Raises:
        ValueError: It needs code of its own.
    """
    from sentence_transformers import SentenceTransformer

    check_version("sentence-transformers")
    # Other types are code, of the folder or of an installed package. sentence-transformers refuses them, too,
    # but its advice is to trust them. A hub's file is not here yet.
    modules = Path(name, "modules.json")
    if modules.is_file():
        kinds = [str(module["type"]) for module in json.loads(modules.read_text(encoding="utf-8"))]
        foreign = [kind for kind in kinds if not kind.startswith("sentence_transformers.")]
        if foreign:
            raise ValueError(f"{modules} names code that is not sentence-transformers', {foreign[0]!r}")
    with without_code():
        return SentenceTransformer(name, device=str(device), trust_remote_code=False)


# --- data -----------------------------------------------------------------------------------------------


def dataset(path: str) -> Any:
    """The ``datasets.Dataset`` or ``DatasetDict`` of a folder: one that was saved, or files of data.

    Raises:
        ValueError: It needs code of its own.
    """
    import datasets

    check_version("datasets")
    files_of_saved = ("state.json", "dataset_dict.json")  # which save_to_disk writes
    is_saved = any(os.path.isfile(os.path.join(path, file)) for file in files_of_saved)
    with without_code():
        return datasets.load_from_disk(path) if is_saved else datasets.load_dataset(path)


@contextmanager
def picture(source: bytes | str) -> Iterator[Any]:
    """A context with a picture of Pillow: AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF or WebP.

    Pillow reads many other formats, which few use and few have checked; its reader of EPS starts Ghostscript.

    Args:
        source: Its file, a URL, or the bytes of one.

    Raises:
        OSError: It is of another format, cut, or no regular file.
        PIL.Image.DecompressionBombError: It has more than twice ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    from PIL import Image, UnidentifiedImageError

    check_version("pillow")
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # AVIF is optional
    try:
        opened = Image.open(io.BytesIO(content_of(source)), formats=formats)
    except UnidentifiedImageError as error:
        name = source if isinstance(source, str) else "its content"
        raise OSError(f"{name} is none of {', '.join(formats)}, or it is damaged") from error
    with opened:
        yield opened


def content_of(source: bytes | str) -> bytes:
    """The bytes of a picture's file, or of a URL.

    Raises:
        OSError: It is not there, or no regular file.
    """
    if isinstance(source, bytes):
        return source
    if "://" in source:
        import fsspec  # which datasets brings

        with fsspec.open(source) as file:
            return bytes(file.read())
    if os.path.exists(source) and not os.path.isfile(source):  # a pipe would be waited for
        raise OSError(f"{source} is no regular file")
    return Path(source).read_bytes()


def stored_array(file: Path) -> NDArray[Any]:
    """The array in an ``.npy`` file, mapped into memory.

    Raises:
        ValueError: It cannot be read: it is a pickle, cut, or no array.
    """
    with _reading(file):
        mapped: NDArray[Any] = np.load(file, mmap_mode="c", allow_pickle=False)
    return mapped


def stored_arrays(file: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The arrays of these names that an ``.npz`` file has.

    Raises:
        ValueError: It cannot be read: it has pickles, is cut, or holds one array.
    """
    with _reading(file):
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError(f"an .npz file of {' and '.join(names)} is needed, not one array")
        with stored:
            return {name: stored[name] for name in names if name in stored.files}


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """A context whose errors are a ValueError that names the array's file.

    Errors of memory are among them, since a header may claim any size.
    """
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no regular file")
        yield
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
