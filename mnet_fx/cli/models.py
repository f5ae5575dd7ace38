"""What MODEL can be on the command line.

torchvision:resnet101               torchvision.models.get_model, random weights
timm:vit_tiny_patch16_224           timm.create_model, random weights
hf:GPT2LMHeadModel, hf:GPT2Config   a class of transformers, with --kwargs for its config, random weights
hf:path/to/folder                   a saved config; with weights beside it, these
package.module:factory              a class or function that makes the model, or the model itself
file.py:factory                     the same in a file
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from click import BadParameter

__all__ = ["Loaded", "called", "found", "keywords", "load"]

_FORMS = "torchvision:NAME, timm:NAME, hf:CLASS-OR-PATH, package.module:factory or file.py:factory"


@dataclass(frozen=True)
class Loaded:
    """A model.

    Attributes:
        model: the torch.nn.Module.
        name: what the user called it.
        inputs: texts, as of --input, of a call that it surely takes; empty where none is known.
    """

    model: Any
    name: str
    inputs: tuple[str, ...] = ()


def keywords(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments from texts such as "depth=4", "name=tiny", "sizes=[1, 2]" or '{"depth": 4}'.

    Raises:
        BadParameter: a text is neither.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if text.lstrip().startswith("{"):
            try:
                found |= json.loads(text)
            except ValueError as error:
                raise BadParameter(f"{text!r} is no JSON object: {error}", param_hint="--kwargs") from error
        elif not equals or not name.strip().isidentifier():
            raise BadParameter(f"must be name=value or a JSON object, got {text!r}", param_hint="--kwargs")
        else:
            found[name.strip()] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "null": None, "none": None}.get(text.lower(), text)


def load(text: str, kwargs: dict[str, Any]) -> Loaded:
    """Makes a model.

    Args:
        text: MODEL, as above.
        kwargs: arguments of what makes it.

    Raises:
        BadParameter: there is no such model, or it cannot be made; the message says what was found instead.
    """
    from torch import nn

    kind, colon, name = text.partition(":")
    if not colon or not name:
        raise _bad(f"{text!r} names no model: it must be {_FORMS}")
    known: dict[str, Callable[[str, dict[str, Any]], Loaded]] = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}
    loaded = known[kind](name, kwargs) if kind in known else Loaded(called(found(text, "MODEL"), kwargs, text, "MODEL"), text)
    if not isinstance(loaded.model, nn.Module):
        raise _bad(f"{text} gave a {type(loaded.model).__name__}, and not a torch.nn.Module")
    return loaded


def _bad(message: str, hint: str = "MODEL") -> BadParameter:
    return BadParameter(message, param_hint=hint)


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _bad(f"{package} is not installed ({error}): pip install {package}") from error


def _unknown(name: str, where: str, names: Iterable[str]) -> BadParameter:
    close = get_close_matches(name, list(names), n=3, cutoff=0.5)
    return _bad(f"{where} has no model {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))


def _torchvision(name: str, kwargs: dict[str, Any]) -> Loaded:
    models = _imported("torchvision").models
    if name not in models.list_models():
        raise _unknown(name, "torchvision", models.list_models())
    make = models.get_model_builder(name)
    size = {"inception_v3": 299}.get(name, 224)
    image = (f"2x3x{size}x{size}",) if make.__module__.startswith("torchvision.models.") and "." not in make.__module__[19:] else ()
    return Loaded(called(make, kwargs, name, "MODEL"), f"torchvision:{name}", image)


def _timm(name: str, kwargs: dict[str, Any]) -> Loaded:
    timm = _imported("timm")
    if not timm.is_model(name):
        raise _unknown(name, "timm", timm.list_models())
    model = called(timm.create_model, {"model_name": name, **kwargs}, name, "MODEL")
    size = getattr(model, "default_cfg", {}).get("input_size")
    return Loaded(model, f"timm:{name}", (f"2x{'x'.join(map(str, size))}",) if size else ())


def _hugging_face(name: str, kwargs: dict[str, Any]) -> Loaded:
    transformers = _imported("transformers")
    if Path(name).exists():
        model = _saved(transformers, name, kwargs)
    else:
        made = getattr(transformers, name, None) if name.isidentifier() else None
        if not isinstance(made, type):
            names = [known for known in dir(transformers) if known.endswith(("Config", "Model", "LM", "Classification", "LMHeadModel"))]
            raise _unknown(name, "transformers, nor this machine as a path,", names)
        config = made if issubclass(made, transformers.PretrainedConfig) else getattr(made, "config_class", None)
        if config is None:
            raise _bad(f"{name} of transformers is neither a config nor a model, such as GPT2Config or GPT2LMHeadModel")
        configured = called(config, kwargs, name, "MODEL")
        make = transformers.AutoModel.from_config if made is config else made
        model = called(lambda: make(configured), {}, name, "MODEL")
    return Loaded(model, f"hf:{name}", _words(getattr(model, "config", None)))


def _words(config: Any) -> tuple[str, ...]:
    """Inputs of a model of words; none for others."""
    words, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if not isinstance(words, int):
        return ()
    length = min(64, positions) if isinstance(positions, int) and positions > 0 else 64
    names = ("input_ids", "decoder_input_ids") if getattr(config, "is_encoder_decoder", False) else ("input_ids",)
    return tuple(f"{name}=2x{length}:int64:0-{words - 1}" for name in names)


def _saved(transformers: Any, path: str, kwargs: dict[str, Any]) -> Any:
    """A model from a folder, or a config.json, of the class that its config names."""
    folder = Path(path).parent if Path(path).is_file() else Path(path)

    def make() -> Any:
        config = transformers.AutoConfig.from_pretrained(path, **kwargs)
        named = next(iter(getattr(config, "architectures", None) or []), "")
        made = getattr(transformers, named, None)
        if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
            return (made or transformers.AutoModel).from_pretrained(folder, config=config)
        return transformers.AutoModel.from_config(config) if made is None else made(config)

    return called(make, {}, path, "MODEL")


def found(text: str, hint: str) -> Any:
    """What `package.module:name` or `file.py:name` names; the name may have dots.

    Raises:
        BadParameter: the file, the module or the name is not there, or fails when it is imported.
    """
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise _bad(f"{text!r} must be package.module:name or file.py:name", hint)
    module = _of_file(where, hint) if where.endswith(".py") else _of_name(where, hint)
    value = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = [known for known in vars(value) if not known.startswith("_")] if hasattr(value, "__dict__") else []
            close = get_close_matches(part, known, n=3, cutoff=0.5)
            raise _bad(f"{where} has no {part!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""), hint)
        value = getattr(value, part)
    return value


def _of_file(path: str, hint: str) -> Any:
    file = Path(path).resolve()
    if not file.is_file():
        raise _bad(f"there is no file {path!r}", hint)
    name = file.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))  # as where Python runs the file
    shadowed = name in sys.modules
    if not shadowed:
        sys.modules[name] = module  # so that its classes can be found again, as pickle and dataclasses do
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _failed(f"{path} fails when it is imported", error, hint) from error
    return module


def _of_name(name: str, hint: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _failed(f"{name} fails when it is imported", error, hint) from error
        raise _bad(f"there is no module {error.name!r}; a model is {_FORMS}", hint) from error
    except Exception as error:
        raise _failed(f"{name} fails when it is imported", error, hint) from error


def called(make: Any, kwargs: dict[str, Any], name: str, hint: str) -> Any:
    """What a factory gives; a module that is there already is taken as it is.

    Raises:
        BadParameter: it fails.
    """
    from torch import nn

    if isinstance(make, nn.Module):
        if kwargs:
            raise BadParameter(f"{name} is a model already, and takes none, got {', '.join(kwargs)}", param_hint="--kwargs")
        return make
    if not callable(make):
        raise _bad(f"{name} is a {type(make).__name__}: neither a model nor a function or class that makes one", hint)
    try:
        return make(**kwargs)
    except TypeError as error:
        raise _failed(f"{name}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())})", error, f"{hint} or --kwargs") from error
    except Exception as error:
        raise _failed(f"{name} could not be made", error, hint) from error


def _failed(what: str, error: Exception, hint: str) -> BadParameter:
    text = str(error).strip() or "no message"
    return _bad(f"{what}: {type(error).__name__}: {text}", hint)
