"""Load a checkpoint (Hugging Face directory, hub id or GGUF file) as a :class:`pq_export.decoder.Decoder`.

transformers reads the files; its own model runs a few tokens beside ours, so that a wrong mapping is an
error here and not a bad perplexity later. Pickles are never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pq_export.calibration import Source
from pq_export.decoder import Decoder, DecoderConfig
from pq_export.errors import PqExportError, UsageError
from pq_export.hadamard import hadamard_factors

# Families whose decoder is exactly pq_export.decoder. Each is compared with transformers on loading.
SUPPORTED = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HF_LOGITS_TOLERANCE = 1e-3  # of the largest logit; fp32, 30-80 layers deep


@dataclass
class Checkpoint:
    """A loaded model: ``decoder`` is fp32 and untied; ``hf_config`` and ``generation_config`` go to the bundle."""

    decoder: Decoder
    tokenizer: Any
    hf_config: Any
    generation_config: Any
    source: Source


def load_checkpoint(
    model: str, *, num_layers: int | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> Checkpoint:
    """Read ``model`` and return it in fp32 on ``device``.

    Raises :class:`PqExportError` naming what is wrong with the files: missing, truncated, pickled,
    unsupported, without tokenizer, or with NaN or Inf in a weight.
    """
    location = locate(model, trust_remote_code)
    with _quiet_transformers():
        config = _read(location, transformers.AutoConfig, "configuration")
        architecture = check_supported(config, location.name)
        tokenizer = _read(location, transformers.AutoTokenizer, "tokenizer")
        hf, loading = _read(
            location,
            transformers.AutoModelForCausalLM,
            "weights",
            dtype=torch.float32,
            config=config,
            output_loading_info=True,
            **({} if location.gguf else {"use_safetensors": True}),
        )
        if missing := sorted(loading["missing_keys"]):  # transformers would go on with random values
            raise PqExportError(
                f"tensor {missing[0]} is missing from the weights",
                where=location.name,
                cure="Download the model again.",
            )
        generation_config = hf.generation_config
        if num_layers is not None:
            _truncate(hf, num_layers)
        decoder = decoder_from_hf(hf.eval().requires_grad_(False))
    check_finite(decoder, location.name)
    check_equal_to_hf(decoder, hf, location.name)
    source = Source(location.name, location.format, architecture, location.sha256())
    return Checkpoint(decoder.to(device), tokenizer, hf.config, generation_config, source)


@dataclass(frozen=True)
class Location:
    """Where a checkpoint lies: ``name`` for people, ``arguments`` for ``from_pretrained``."""

    name: str
    format: str
    arguments: dict[str, Any]
    directory: Path | None = None
    gguf: Path | None = None

    def sha256(self) -> str:
        """Over the contents of the weights, the configuration and the tokenizer."""
        digest = hashlib.sha256()
        if self.gguf:
            files = [self.gguf]
        else:
            assert self.directory is not None
            names = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
            others = (self.directory / name for name in names)
            files = [*sorted(self.directory.glob("*.safetensors")), *(p for p in others if p.is_file())]
        for path in files:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()


def locate(model: str, trust_remote_code: bool) -> Location:
    """Tell a GGUF file, a local directory and a hub id apart, and refuse what can be refused by looking."""
    path = Path(model)
    common = {"trust_remote_code": trust_remote_code}
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise PqExportError(
                "is a file but not a .gguf",
                where=path,
                cure="Give a .gguf file, a Hugging Face model directory, or a hub id.",
            )
        _check_gguf(path)
        arguments = {"pretrained_model_name_or_path": str(path.parent or "."), "gguf_file": path.name, **common}
        return Location(path.name, "gguf", arguments, gguf=path)
    if path.is_dir():
        _check_directory(path)
        return Location(
            path.resolve().name, "safetensors", {"pretrained_model_name_or_path": str(path), **common}, path
        )
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".gguf")
    if looks_like_path or not model or any(c.isspace() for c in model):
        raise PqExportError(
            "no such file or directory",
            where=model or "MODEL",
            cure="Give a .gguf file, a Hugging Face model directory, or a hub id such as org/name.",
        )
    return Location(model, "hub", {"pretrained_model_name_or_path": model, **common}, _download(model))


def _download(repository: str) -> Path:
    """Fetch config, tokenizer and safetensors of a hub id (no pickles) and return the snapshot's folder."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with _quiet_transformers():
            folder = Path(
                huggingface_hub.snapshot_download(
                    repository, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
                )
            )
    except HFValidationError:
        raise PqExportError(
            "no such path, and not a valid hub id",
            where=repository,
            cure="Give a .gguf file, a Hugging Face model directory, or a hub id such as org/name.",
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            raise PqExportError(
                f"the hub answered {error.response.status_code}",
                where=repository,
                cure="Check the id, and your HF_TOKEN if the model is gated.",
            ) from None
        raise PqExportError(
            "no such path here, and the hub cannot be reached to look for it",
            where=repository,
            cure="Check the spelling, the network, or download the model and give its directory.",
        ) from None
    _check_directory(folder)
    return folder


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        cure = "Give the directory that holds config.json and *.safetensors."
        if ggufs := sorted(path.glob("*.gguf")):
            cure = f"To use the GGUF in it, give the file: {ggufs[0]}"
        raise PqExportError("has no config.json, so it is not a Hugging Face model directory", where=path, cure=cure)
    weights = sorted(path.glob("*.safetensors"))
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if not weights and pickles:
        raise PqExportError(
            f"holds only pickled weights ({pickles[0]}), which can run code when opened and are refused",
            where=path,
            cure="Convert it once where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR).",
        )
    if not weights:
        raise PqExportError("holds no *.safetensors weights", where=path, cure="Download the model completely.")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise PqExportError(
                f"is not a valid weight index ({error})", where=index, cure="Download it again."
            ) from None
        if missing := sorted(needed - {w.name for w in weights}):
            raise PqExportError(f"lacks {missing[0]}, which its index names", where=path, cure="Download it again.")
    for weight in weights:
        _check_safetensors(weight)


def _check_safetensors(path: Path) -> None:
    """Header parses and the file is as long as it says: the two ways a download breaks."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise PqExportError(f"is truncated or corrupt ({error})", where=path, cure="Download it again.") from None


def _check_gguf(path: Path) -> None:
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception as error:  # the reader raises whatever its parsing hits: IndexError, ValueError, struct.error
        raise PqExportError(
            f"is truncated or corrupt ({error or type(error).__name__})", where=path, cure="Download it again."
        ) from None
    if end == 0 or end > path.stat().st_size:
        raise PqExportError("is truncated: it ends before its last tensor", where=path, cure="Download it again.")


def _read(location: Location, auto_class: Any, what: str, **extra: Any) -> Any:
    """``auto_class.from_pretrained`` with its many exceptions turned into one line."""
    arguments = dict(location.arguments)
    if location.format == "hub":
        arguments["pretrained_model_name_or_path"] = str(location.directory)
    try:
        return auto_class.from_pretrained(**arguments, **extra)
    except MemoryError:
        raise PqExportError(f"not enough memory to load the {what}", where=location.name) from None
    except Exception as error:  # transformers raises every kind here; the message is what helps
        message = " ".join(str(error).split())[:300] or type(error).__name__
        cures = {
            "configuration": f"Supported: {', '.join(SUPPORTED)}. Own code needs --trust-remote-code.",
            "tokenizer": "Put tokenizer.json and tokenizer_config.json beside the weights.",
            "weights": "Download the model again.",
        }
        missing = what == "tokenizer" and location.directory and not any(location.directory.glob("tokenizer*"))
        what_failed = "has no tokenizer" if missing else f"its {what} cannot be loaded ({message})"
        raise PqExportError(what_failed, where=location.name, cure=cures[what]) from None


def describe_checkpoint(model: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Facts from the configuration alone, without reading weights. Raises as :func:`load_checkpoint`."""
    location = locate(model, trust_remote_code)
    with _quiet_transformers():
        config = _read(location, transformers.AutoConfig, "configuration")
    architecture = check_supported(config, location.name)
    c = decoder_config(config)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "kind": "checkpoint",
        "name": location.name,
        "format": location.format,
        "architecture": architecture,
        "layers": c.num_layers,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "heads": c.num_heads,
        "kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "context": c.max_position_embeddings,
        "tied_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "hadamard": {
            name: f"{f.left_order}x{f.right_order} {f.construction}"
            for name, f in (("R1", hadamard_factors(c.hidden_size)), ("R4", hadamard_factors(c.intermediate_size)))
        },
        "linear_parameters_per_layer": 2 * c.hidden_size * (q + kv) + 3 * c.hidden_size * c.intermediate_size,
    }


def check_supported(config: Any, name: str) -> str:
    """The architecture's name, or an error that lists what is supported."""
    architectures = list(getattr(config, "architectures", None) or [])
    supported_types = {model_type: arch for arch, model_type in SUPPORTED.items()}
    if not architectures and config.model_type in supported_types:  # GGUF files do not name a class
        architectures = [supported_types[config.model_type]]
    found = architectures[0] if architectures else f"model_type '{config.model_type}'"
    if found not in SUPPORTED:
        raise PqExportError(
            f"architecture {found} is not supported", where=name, cure=f"Supported: {', '.join(SUPPORTED)}."
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise PqExportError(f"activation '{config.hidden_act}' is not supported", where=name, cure="Supported: silu.")
    rope = _rope(config)
    if rope["rope_type"] not in STATIC_ROPE:
        raise PqExportError(
            f"RoPE scaling '{rope['rope_type']}' changes with the sequence and cannot be static",
            where=name,
            cure=f"Supported: {', '.join(STATIC_ROPE)}.",
        )
    windows = getattr(config, "layer_types", None) or []
    if "sliding_attention" in windows or (config.model_type == "mistral" and getattr(config, "sliding_window", None)):
        raise PqExportError(
            "sliding-window attention is not supported: the prefix would leave the window",
            where=name,
            cure="Set sliding_window to null in config.json if the context fits in one window.",
        )
    return found


def _rope(config: Any) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_type": "default", **parameters}


def decoder_config(config: Any) -> DecoderConfig:
    """Sizes from a transformers config; head_dim is read, never derived where it is given."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = _rope(config)
    if rope["rope_type"] == "default":
        base = rope.get("rope_theta") or config.rope_theta
        inv_freq, scaling = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim), 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    qwen2 = config.model_type == "qwen2"
    return DecoderConfig(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.rms_norm_eps),
        max_position_embeddings=config.max_position_embeddings,
        inv_freq=tuple(inv_freq.tolist()),
        rope_scaling=float(scaling),
        qkv_bias=qwen2 or bool(getattr(config, "attention_bias", False)),
        o_bias=not qwen2 and bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=config.model_type == "qwen3",
    )


def decoder_from_hf(hf: Any) -> Decoder:
    """Our decoder over the tensors of a transformers model. A tied lm_head gets a tensor of its own.

    Untying comes before everything: fusing the final norm into a tied lm_head would scale the embedding
    too, and R1 would rotate it twice.
    """
    config = decoder_config(hf.config)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.rotary = type(decoder.rotary)(config)
    state = {name.removeprefix("model."): tensor.float() for name, tensor in hf.state_dict().items()}
    embedding = state["embed_tokens.weight"]
    head = state.get("lm_head.weight", embedding)
    state["lm_head.weight"] = head.clone() if head.data_ptr() == embedding.data_ptr() else head
    wanted = {name for name, _ in decoder.named_parameters()}
    if difference := sorted(wanted ^ {n for n in state if not n.endswith("inv_freq")}):
        raise PqExportError(
            f"tensor {difference[0]} is {'missing' if difference[0] in wanted else 'unexpected'}",
            where=hf.config.model_type,
            cure="The checkpoint does not fit its config.json.",
        )
    decoder.load_state_dict(state, assign=True, strict=False)
    return decoder.eval().requires_grad_(False)


def _truncate(hf: Any, num_layers: int) -> None:
    total = hf.config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise UsageError(f"--num-layers {num_layers} is not between 1 and {total}")
    hf.model.layers = hf.model.layers[:num_layers]
    hf.config.num_hidden_layers = num_layers
    if getattr(hf.config, "layer_types", None):
        hf.config.layer_types = hf.config.layer_types[:num_layers]


def check_finite(decoder: Decoder, name: str) -> None:
    """Refuse NaN and Inf weights, naming the tensor."""
    for tensor_name, tensor in decoder.named_parameters():
        if not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "Inf"
            raise PqExportError(f"tensor {tensor_name} holds {kind}", where=name, cure="The checkpoint is damaged.")


@torch.no_grad()
def check_equal_to_hf(decoder: Decoder, hf: nn.Module, name: str) -> None:
    """Our logits are transformers' on a few arbitrary tokens."""
    ids = probe_ids(decoder.config.vocab_size)
    ours, theirs = full_logits(decoder, ids), hf(input_ids=ids).logits.float()
    error, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not error <= HF_LOGITS_TOLERANCE * size:
        raise PqExportError(
            f"our decoder's logits differ from transformers' by {error:.3g} (largest logit {size:.3g})",
            where=name,
            cure="This checkpoint uses something its config does not say; please report it.",
        )


def probe_ids(vocab_size: int, length: int = 24) -> torch.Tensor:
    """Arbitrary fixed token ids [1, length] for equality checks."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, vocab_size, length))[None]


@torch.no_grad()
def full_logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, vocab] of ``ids`` [B, S] with an empty cache."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return decoder(ids, torch.ones_like(ids), positions, decoder.empty_past(len(ids)))[0]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers while we load: our own progress is on the screen."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
