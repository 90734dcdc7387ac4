"""Tiny random models of every supported family, and calibrations of them. Nothing here needs a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import Calibration
from pq_export.decoder import Decoder, DecoderConfig
from pq_export.export import fp_graph
from pq_export.plan import Plan
from pq_export.precision import Precision
from pq_export.stages import Stages

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
settings.register_profile("repeatable", derandomize=True, database=None)  # the same examples in every run
settings.load_profile("repeatable")

VOCAB = 320
BOS, EOS = 1, 2
PLANTED_TOKEN, PLANTED_LAYER, PLANTED_CHANNEL = 77, 1, 5

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
_LLAMA = {**_SIZES, "head_dim": 16}


def _rope(**scaling: object) -> dict[str, object]:
    return {"rope_scaling": {"rope_theta": 10000.0, **scaling}}


_CONFIGS: dict[str, tuple[type, type, dict[str, object]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {**_LLAMA, "tie_word_embeddings": True}),
    "llama-bias": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-mha": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {**_LLAMA, "num_key_value_heads": 4}),
    "llama-rope-linear": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {**_LLAMA, **_rope(rope_type="linear", factor=4.0)},
    ),
    "llama-rope-llama3": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {
            **_LLAMA,
            **_rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        },
    ),
    "llama-rope-yarn": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {**_LLAMA, **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)},
    ),
    # head_dim is derived: 12, which is no power of two.
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {**_SIZES, "sliding_window": None}),
    "qwen2": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {**_SIZES, "bos_token_id": None, "tie_word_embeddings": True},
    ),
    # heads * head_dim = 96 is not hidden_size.
    "qwen3": (
        transformers.Qwen3Config,
        transformers.Qwen3ForCausalLM,
        {**_SIZES, "head_dim": 24, "bos_token_id": None},
    ),
}
FAMILIES = tuple(_CONFIGS)


@pytest.fixture(scope="session", autouse=True)
def exports() -> Iterator[dict[DecoderConfig, bytes]]:
    """torch.onnx.export takes seconds and depends on the configuration alone: once a process for each.

    Whoever tests the export itself empties the dictionary.
    """
    made: dict[DecoderConfig, bytes] = {}
    export = fp_graph._export_structure

    def once(config: DecoderConfig) -> onnx.ModelProto:
        if config not in made:
            made[config] = export(config).SerializeToString()
        return onnx.load_from_string(made[config])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp_graph, "_export_structure", once)
        yield made


def hf_model(family: str, seed: int = 0, **changes: object) -> nn.Module:
    """A random transformers model. Norm gains are not 1 and biases not 0, so that losing one shows."""
    config_class, model_class, arguments = _CONFIGS[family]
    model = model_class(config_class(**{**arguments, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.25 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_((0.3 if name.endswith("bias") else 0.15) * noise)
    return model.eval()


def plant_outlier(model: nn.Module) -> None:
    """Make PLANTED_TOKEN drive one gate/up channel of PLANTED_LAYER, and nothing else drive it.

    Dimension 0 of the residual stream belongs to that token: other embeddings are 0 there and nothing
    before PLANTED_LAYER's MLP writes to it.
    """
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0.0
        embedding[PLANTED_TOKEN] = 0.0
        embedding[PLANTED_TOKEN, 0] = 30.0
        for layer in model.model.layers[: PLANTED_LAYER + 1]:
            layer.self_attn.o_proj.weight[0] = 0.0
        for layer in model.model.layers[:PLANTED_LAYER]:
            layer.mlp.down_proj.weight[0] = 0.0
        mlp = model.model.layers[PLANTED_LAYER].mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[PLANTED_CHANNEL] = 0.0
            linear.weight[PLANTED_CHANNEL, 0] = 8.0


def word_tokenizer(
    bos: bool = True, extra: tuple[str, ...] = (), **special: str
) -> transformers.PreTrainedTokenizerFast:
    """One token a word: ``<unk> <s> </s> w3 w4 ...``; ``wN`` has id N."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB - len(extra))), *extra]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "</s>", **({"bos_token": "<s>"} if bos else {}), **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE without BOS: what transformers makes of any tokenizer beside a Qwen2 config."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([random_words(2000)], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def random_words(count: int, seed: int = 0, planted_share: float = 0.03) -> str:
    """Text of ``count`` words; a share of them is the planted one."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCAB, count)
    ids[ids == PLANTED_TOKEN] += 1
    ids[rng.random(count) < planted_share] = PLANTED_TOKEN
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint_dir("qwen3")`` -> Hugging Face directory of that tiny family, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("checkpoints") / f"tiny-{family}"
            hf_model(family).save_pretrained(made[family])
            tokenizer = byte_tokenizer() if family == "qwen2" else word_tokenizer(bos=family != "qwen3")
            tokenizer.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, tied embeddings, one planted outlier token."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny-llama-outlier"
    model = hf_model("llama", seed=1, num_hidden_layers=3)
    plant_outlier(model)
    model.save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_decoder(tiny_llama_dir: Path) -> Decoder:
    """A fresh decoder of ``tiny_llama_dir``, not rewritten."""
    return load_checkpoint(str(tiny_llama_dir)).decoder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(random_words(1000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def other_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To evaluate on: shares no 13 words in a row with ``text_file``."""
    path = tmp_path_factory.mktemp("text") / "other-words.txt"
    path.write_text(random_words(1000, seed=1), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_plan(text_file: Path) -> Callable[..., Plan]:
    """``small_plan("w4a4", prefix="none")``: a plan that calibrates a tiny model in a second."""

    def make(name: str, kv: int | None = None, **changes: object) -> Plan:
        plan = Plan(
            Precision.named(name, kv),
            calib_data=str(text_file),
            calib_samples=6,
            seq_len=32,
            search_samples=4,
            search_seq_len=24,
        )
        return dataclasses.replace(plan, **changes)

    return make


@pytest.fixture(scope="session")
def calibrations(
    checkpoint_dir: Callable[[str], Path],
    small_plan: Callable[..., Plan],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Calibration]:
    """``calibrations("w4a4")`` -> calibration of the tiny Llama with a prefix of three tokens, made once each.

    ``family`` takes another tiny model. The result is shared: do not change it in place.
    """
    made: dict[object, Calibration] = {}

    def make(name: str, kv: int | None = None, family: str = "llama", **changes: object) -> Calibration:
        key = (name, kv, family, repr(sorted(changes.items())))
        if key not in made:
            checkpoint = load_checkpoint(str(checkpoint_dir(family)))
            output = tmp_path_factory.mktemp("calibration") / "out"
            plan = small_plan(name, kv, **{"prefix": "w77 w8 w9", **changes})
            made[key] = calibrate(checkpoint, plan, output, Stages())
        return made[key]

    return make
