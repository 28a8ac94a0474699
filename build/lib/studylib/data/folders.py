"""What a model's folder holds: what counts as its contents, and what is wrong with it before anything is loaded."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import CONFIG_MAPPING

from studylib.config import file_sha256

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".tokenizer")  # by transformers
TEMPLATES = "additional_chat_templates"  # the one folder inside that transformers reads
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
NUMBERS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what weights in full precision are stored in


class FolderError(ValueError):
    """A model's folder that does not hold what it should."""


def contents(folder: Path) -> str:
    """A SHA-256 of all files of the folder that transformers reads, by name: another where any of them is."""
    files = sorted(path for path in [*folder.iterdir(), *(folder / TEMPLATES).glob("*")] if path.suffix in READ)
    parts = [f"{path.relative_to(folder).as_posix()} {file_sha256(path)}" for path in files if path.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check(folder: Path) -> None:
    """FolderError, in one line, for a folder from which a model would not be loaded as it says."""
    described = read_object(folder / CONFIG)
    if (folder / ADAPTER).exists():
        raise FolderError(
            f"model: {str(folder)!r} holds an adapter ({ADAPTER}), which transformers would put into the model; merge "
            "it into the weights, or move it away"
        )
    kind, quantized = described.get("model_type"), described.get("quantization_config")
    if not isinstance(quantized, dict | None):
        raise FolderError(
            f"model: {str(folder / CONFIG)!r} has quantization_config {quantized!r}; use an object or none"
        )
    if "auto_map" in described and kind not in CONFIG_MAPPING:
        raise FolderError(
            f"model: {str(folder)!r} needs code of its own for the model_type {kind!r} (auto_map in its {CONFIG}), and "
            "such code is never run; use an architecture that transformers has"
        )
    tensors = shapes(folder)
    for name in LAYERS:
        layers = described.get(name)
        if isinstance(layers, int | float) and layers > len(tensors):
            raise FolderError(
                f"model: {str(folder / CONFIG)!r} has {name} {layers}, but its safetensors hold {len(tensors)} tensors"
            )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file. FolderError where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise FolderError(f"model: {str(path)!r} is not JSON that can be read ({why})") from error
    if not isinstance(found, dict):
        raise FolderError(f"model: {str(path)!r} holds no JSON object, but a {type(found).__name__}")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads weights from."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise FolderError(f"model: {str(folder)!r} has neither {WEIGHTS} nor {INDEX}")
    named = read_object(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise FolderError(f"model: {str(folder / INDEX)!r} has no weight_map of tensors to files")
    for name in sorted(set(named.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise FolderError(f"model: {str(folder / INDEX)!r} names {name!r}, which is no file of this folder")
    return [folder / name for name in sorted(set(named.values()))]


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the folder's safetensors hold, read from their headers."""
    return {name: tuple(part.get_shape()) for name, part in _tensors(folder)}


def read_tensors(folder: Path, names: set[str]) -> dict[str, Any]:
    """These tensors, of those that are there."""
    return {name: part[:] for name, part in _tensors(folder) if name in names}


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    part = file.get_slice(name)
                    if part.get_dtype() not in NUMBERS:
                        raise FolderError(
                            f"model: {name} in {str(path)!r} is stored as {part.get_dtype()}; use weights in full "
                            "precision"
                        )
                    yield name, part
        except FolderError:
            raise
        except Exception as error:  # safetensors raises errors of many kinds
            raise FolderError(f"model: {str(path)!r} is not a whole safetensors file ({error})") from error
