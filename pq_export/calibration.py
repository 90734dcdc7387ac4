"""``Calibration``: everything the export needs, and the only thing that passes between the halves.

On disk a directory::

    calibration.json          readable: precision, rotation, prefix, scales, statistics, hashes
    calibration.safetensors   integer weights, scales, floating-point leftovers, prefix KV
    tokenizer/                tokenizer, chat template, config and generation config, copied to bundles

Tensor names in ``calibration.safetensors``:

=============================  ===================  =========================================
name                           dtype, shape         what
=============================  ===================  =========================================
``<linear>.codes``             int8 [out, in], or   transformed weight as integers, 8-bit ones as they
                               uint8 [out·in / 2]   are, 4-bit ones two to a byte, low nibble first
``<linear>.scale``             float32 [out]        per output channel
``<linear>.bias``              float32 [out]        only where the model has one
``embed_tokens.weight`` etc.   float16              not quantized: embedding and lm_head
``*norm.weight``               float32              ones after fusion, unless smoothed or tuned
``*layernorm.bias``            float32 [hidden]     only where centering made one
``*.key_offset``               float32 [G, 1, D]    likewise: added to keys after R3
``layers.N.prefix.key|value``  float16 [G, p, D]    post-RoPE, post-R3; absent without a prefix
=============================  ===================  =========================================
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from pq_export import __version__
from pq_export.decoder import DecoderConfig
from pq_export.errors import IntegrityError, UsageError
from pq_export.precision import KV_BITS, OVERRIDE_BITS, Precision, kv_scales_per_head
from pq_export.quantizer import code_range, pack_int4, unpack_int4

OUTLIER_RATIO = 64.0  # a token is an outlier above this max/median ratio (PrefixQuant, η)

FORMAT = "pq-export/calibration"
SCHEMA_VERSION = 3  # with the offsets of centering
OVERRIDES_SCHEMA_VERSION = 2  # without them
PLAIN_SCHEMA_VERSION = 1  # nor overrides: readers that know none would take 8-bit codes for packed 4-bit ones
JSON_NAME, TENSORS_NAME, ASSETS_NAME = "calibration.json", "calibration.safetensors", "tokenizer"

# Linears of a layer -> the activation site that feeds them. One static scale per site.
SITE_OF_LINEAR = {
    "self_attn.q_proj": "self_attn.qkv_input",
    "self_attn.k_proj": "self_attn.qkv_input",
    "self_attn.v_proj": "self_attn.qkv_input",
    "self_attn.o_proj": "self_attn.o_input",
    "mlp.gate_proj": "mlp.gate_up_input",
    "mlp.up_proj": "mlp.gate_up_input",
    "mlp.down_proj": "mlp.down_input",
}
SITES = tuple(dict.fromkeys(SITE_OF_LINEAR.values()))
KV_SITES = ("self_attn.key", "self_attn.value")


def input_site(linear: str) -> str:
    """``layers.N.<linear>`` -> ``layers.N.<site>``, the activation site that feeds it."""
    _, layer, name = linear.split(".", 2)
    return f"layers.{layer}.{SITE_OF_LINEAR[name]}"


@dataclass(frozen=True)
class Source:
    """The checkpoint this came from. ``sha256`` is over weights, configuration and tokenizer."""

    name: str
    format: str
    architecture: str
    sha256: str


@dataclass(frozen=True)
class Rotation:
    """Which rotations were folded, and which Hadamards the graph must execute.

    ``online`` names R3 (queries and keys after RoPE, over head_dim) and R4 (down_proj input); ``learned`` those of
    ``offline`` that were trained.
    """

    mode: str
    seed: int
    offline: tuple[str, ...] = ()
    online: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prefix:
    """The tokens whose KV is baked into the graph. ``key`` ties the KV to what it was computed with."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Calibration:
    """See the module's docstring for ``tensors``.

    activation_scales
        ``layers.N.<site>`` -> scale of that linear input. Empty at 16-bit activations.
    kv_scales
        ``layers.N.self_attn.key|value`` -> one scale per KV head (4 bit) or a single one (8 bit).
    overrides
        Bits that differ from ``precision``: of a linear's weights (``layers.N.<linear>``: 4 or 8), of an activation
        site (``layers.N.<site>``: 4 or 8; none at 16-bit activations), of a cache (``layers.N.self_attn.key|value``:
        4, 8 or 16). Sensitive linears kept at 8 bits (QFeM, arXiv 2405.14428, section 4.1) and keys whose biases
        4 bits do not hold are told this way.
    fingerprint
        Of plan and checkpoint: the same fingerprint means the same calibration.
    bos_token_id
        What ``generate`` must *not* put in front of a prompt again: the prefix holds it.
    statistics
        For the report only; nothing in the export reads it.
    """

    source: Source
    decoder: DecoderConfig
    precision: Precision
    rotation: Rotation
    prefix: Prefix
    activation_scales: dict[str, float]
    kv_scales: dict[str, tuple[float, ...]]
    tensors: dict[str, np.ndarray]
    plan: dict[str, Any]
    fingerprint: str
    bos_token_id: int | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, int] = field(default_factory=dict)

    def linear_names(self) -> list[str]:
        """Every quantized linear, in the order of execution."""
        return [f"layers.{i}.{name}" for i in range(self.decoder.num_layers) for name in SITE_OF_LINEAR]

    def activation_sites(self) -> list[str]:
        """Every ``layers.N.<site>`` that feeds a linear, quantized or not."""
        return [f"layers.{i}.{site}" for i in range(self.decoder.num_layers) for site in SITES]

    def kv_sites(self) -> list[str]:
        """Every ``layers.N.self_attn.key|value``, quantized or not."""
        return [f"layers.{i}.{site}" for i in range(self.decoder.num_layers) for site in KV_SITES]

    def weight_bits(self, linear: str) -> int:
        """Bits of the weights of ``layers.N.<linear>``: 4 or 8."""
        return self.overrides.get(linear, self.precision.weight_bits)

    def activation_bits(self, site: str) -> int:
        """Bits of ``layers.N.<site>``: 4, 8, or 16 for not quantized."""
        return self.overrides.get(site, self.precision.activation_bits)

    def kv_bits(self, site: str) -> int:
        """Bits of ``layers.N.self_attn.key|value``: 4, 8, or 16 for not quantized."""
        return self.overrides.get(site, self.precision.kv_bits)

    def input_scale(self, linear: str) -> float | None:
        """Static scale of the input of ``layers.N.<linear>``; None at 16-bit activations."""
        return self.activation_scales.get(input_site(linear))

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """(out_features, in_features)."""
        d, name = self.decoder, linear.split(".", 2)[2]
        q, kv = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
        return {
            "self_attn.q_proj": (q, d.hidden_size),
            "self_attn.k_proj": (kv, d.hidden_size),
            "self_attn.v_proj": (kv, d.hidden_size),
            "self_attn.o_proj": (d.hidden_size, q),
            "mlp.gate_proj": (d.intermediate_size, d.hidden_size),
            "mlp.up_proj": (d.intermediate_size, d.hidden_size),
            "mlp.down_proj": (d.hidden_size, d.intermediate_size),
        }[name]

    def weight_codes(self, linear: str) -> np.ndarray:
        """Unpacked int8 codes [out, in]."""
        codes = self.tensors[f"{linear}.codes"]
        return unpack_int4(codes, self.linear_shape(linear)) if self.weight_bits(linear) == 4 else codes

    def store_codes(self, linear: str, codes: np.ndarray) -> np.ndarray:
        """int8 codes of ``layers.N.<linear>`` as they lie in the file."""
        return pack_int4(codes) if self.weight_bits(linear) == 4 else codes

    def prefix_kv(self) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """float16 [G, p, D] key and value of every layer, or None without a prefix."""
        if not self.prefix.token_ids:
            return None
        names = [f"layers.{i}.prefix" for i in range(self.decoder.num_layers)]
        return [(self.tensors[f"{n}.key"], self.tensors[f"{n}.value"]) for n in names]


def prefix_key(
    tensors: dict[str, np.ndarray], token_ids: tuple[int, ...], rotation: Rotation, decoder: DecoderConfig
) -> str:
    """Hash of what a prefix KV goes with: weights, rotation, RoPE and the tokens themselves.

    Not of the KV, which may have been tuned: ``tensors_sha256`` covers that.
    """
    digest = hashlib.sha256()
    rotated = {name: value for name, value in asdict(rotation).items() if name != "learned" or value}
    facts = [list(token_ids), rotated, list(decoder.inv_freq), decoder.rope_scaling]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(n for n in tensors if ".prefix." not in n):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def save_calibration(calibration: Calibration, directory: Path) -> None:
    """Write the file pair into an existing directory (the caller renames it into place)."""
    # safetensors orders tensors by dtype and name, so the bytes depend on the content alone.
    payload = safetensors.numpy.save({n: np.ascontiguousarray(t) for n, t in calibration.tensors.items()})
    (directory / TENSORS_NAME).write_bytes(payload)
    c = calibration
    document = {
        "format": FORMAT,
        "schema_version": _schema_version(c),
        "pq_export": __version__,
        "source": asdict(c.source),
        "precision": str(c.precision),
        "overrides": c.overrides,
        "decoder": c.decoder.to_dict(),
        "rotation": asdict(c.rotation),
        "prefix": asdict(c.prefix),
        "bos_token_id": c.bos_token_id,
        "activation_scales": c.activation_scales,
        "kv_scales": c.kv_scales,
        "plan": c.plan,
        "fingerprint": c.fingerprint,
        "statistics": c.statistics,
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
    }
    (directory / JSON_NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _schema_version(c: Calibration) -> int:
    """The first version whose readers understand ``c``."""
    if c.decoder.centered:
        return SCHEMA_VERSION
    return OVERRIDES_SCHEMA_VERSION if c.overrides else PLAIN_SCHEMA_VERSION


def read_calibration_json(directory: Path) -> dict[str, Any]:
    """The readable half, checked for format and schema version."""
    path = directory / JSON_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(
            "is not a calibration: it has no calibration.json",
            where=directory,
            cure="Give the directory that 'pq-export calibrate -o' wrote.",
        ) from None
    except (OSError, ValueError) as error:
        raise IntegrityError(f"cannot be read: {error}", where=path, cure="Calibrate again.") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise IntegrityError("is not a pq-export calibration", where=path)
    version = document.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise IntegrityError(
            f"has schema version {version}; this pq-export reads up to {SCHEMA_VERSION}",
            where=path,
            cure="Upgrade pq-export or calibrate again.",
        )
    return document


def load_calibration(directory: Path) -> Calibration:
    """Read, and verify that JSON and tensors belong together and are complete."""
    document = read_calibration_json(directory)
    path = directory / TENSORS_NAME
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}", where=path, cure="Calibrate again.") from None
    if hashlib.sha256(payload).hexdigest() != document.get("tensors_sha256"):
        raise IntegrityError(
            "does not match the hash in calibration.json: it was altered or truncated",
            where=path,
            cure="Calibrate again.",
        )
    try:
        calibration = _from_document(document, safetensors.numpy.load(payload))
        check_calibration(calibration, directory)
    except (KeyError, TypeError, ValueError, UsageError, safetensors.SafetensorError) as error:
        raise IntegrityError(
            f"is incomplete or malformed ({type(error).__name__}: {error})", where=directory, cure="Calibrate again."
        ) from None
    return calibration


def _from_document(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> Calibration:
    rotation, prefix = document["rotation"], document["prefix"]
    return Calibration(
        source=Source(**document["source"]),
        decoder=DecoderConfig.from_dict(document["decoder"]),
        precision=Precision.parse(document["precision"]),
        rotation=Rotation(
            rotation["mode"],
            rotation["seed"],
            tuple(rotation["offline"]),
            tuple(rotation["online"]),
            tuple(rotation.get("learned", ())),
        ),
        prefix=Prefix(tuple(prefix["token_ids"]), tuple(prefix["tokens"]), prefix["key"]),
        activation_scales=document["activation_scales"],
        kv_scales={name: tuple(scales) for name, scales in document["kv_scales"].items()},
        tensors=tensors,
        plan=document["plan"],
        fingerprint=document["fingerprint"],
        bos_token_id=document["bos_token_id"],
        statistics=document["statistics"],
        overrides=dict(document.get("overrides", {})),  # absent in files of schema version 1
    )


def check_calibration(calibration: Calibration, where: Path) -> None:
    """Refuse what would make a wrong graph rather than an error: missing or impossible codes, scales and KV."""
    c = calibration
    _check_overrides(c, where)
    for linear in c.linear_names():
        bits, stored = c.weight_bits(linear), c.tensors[f"{linear}.codes"]
        # One layout taken for the other would give codes of the right shape and range.
        if (str(stored.dtype), stored.ndim) != (("uint8", 1) if bits == 4 else ("int8", 2)):
            raise IntegrityError(f"has weight codes that are not stored as {bits}-bit ones", where=f"{where}: {linear}")
        scale, codes, (low, high) = c.tensors[f"{linear}.scale"], c.weight_codes(linear), code_range(bits)
        if scale.shape != c.linear_shape(linear)[:1] or not (np.isfinite(scale).all() and (scale > 0).all()):
            raise IntegrityError("has a weight scale that is not positive and finite", where=f"{where}: {linear}")
        if codes.shape != c.linear_shape(linear) or codes.min() < low or codes.max() > high:
            raise IntegrityError("has weight codes of the wrong shape or range", where=f"{where}: {linear}")
    _check_scales(c, where)
    if c.prefix.key != prefix_key(c.tensors, c.prefix.token_ids, c.rotation, c.decoder):
        raise IntegrityError(
            "has a prefix KV that belongs to other weights, rotation or RoPE", where=where, cure="Calibrate again."
        )
    prefix = (c.decoder.num_kv_heads, len(c.prefix.token_ids), c.decoder.head_dim)
    for index, pair in enumerate(c.prefix_kv() or []):
        if any(t.shape != prefix or t.dtype != np.float16 or not np.isfinite(t).all() for t in pair):
            raise IntegrityError("has a prefix KV of the wrong shape or not finite", where=f"{where}: layer {index}")


def _check_overrides(c: Calibration, where: Path) -> None:
    """Every override names something of this model and gives it bits that it can have."""
    possible: dict[str, tuple[int, ...]] = dict.fromkeys(c.linear_names(), OVERRIDE_BITS)
    # Nothing at 16 bits has a scale, and a site gets its only scale with the model's own precision.
    possible |= dict.fromkeys(c.activation_sites(), OVERRIDE_BITS if c.precision.activation_bits < 16 else ())
    possible |= dict.fromkeys(c.kv_sites(), KV_BITS)
    for name, bits in c.overrides.items():
        if name not in possible:
            raise IntegrityError(f"overrides the bits of {name!r}, which this model does not have", where=where)
        if type(bits) is not int or bits not in possible[name]:
            choice = " or ".join(map(str, possible[name])) or f"only those of {c.precision}"
            raise IntegrityError(
                f"overrides its bits with {bits!r}; possible: {choice}",
                where=f"{where}: {name}",
                cure="Calibrate again without this override.",
            )


def _check_scales(c: Calibration, where: Path) -> None:
    """Every quantizer has its scales, and every scale is positive and finite."""
    sites = {site for site in c.activation_sites() if c.activation_bits(site) < 16}
    kv_sites = {site for site in c.kv_sites() if c.kv_bits(site) < 16}
    if missing := sorted((sites ^ set(c.activation_scales)) | (kv_sites ^ set(c.kv_scales))):
        raise IntegrityError("lacks the scale of a quantizer, or has one too many", where=f"{where}: {missing[0]}")
    for site, group in c.kv_scales.items():
        count = c.decoder.num_kv_heads if kv_scales_per_head(c.kv_bits(site)) else 1
        if len(group) != count:
            raise IntegrityError(
                f"has {len(group)} KV scales; {c.kv_bits(site)} bits take {count}", where=f"{where}: {site}"
            )
    scales = [*c.activation_scales.values(), *(s for group in c.kv_scales.values() for s in group)]
    if not all(np.isfinite(s) and s > 0 for s in scales):
        raise IntegrityError("has an activation or KV scale that is not positive and finite", where=where)
