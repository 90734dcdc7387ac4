"""What is evaluated: a model that runs tokens after a state, with the facts of its prefix.

Checkpoint, fake-quant model and bundle differ only here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pq_export.bundle import Bundle
from pq_export.calibration import ASSETS_NAME, Calibration
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.runtime import OrtDecoder

# (ids [B, S], mask [B, S], state or None) -> logits [B, S, vocab] on any device, and the state after them.
# The mask marks real tokens with 1: padding may stand in front or behind, and positions count real tokens.
Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Subject:
    """One model and what it takes to give it text.

    context
        Tokens that fit behind the prefix.
    bos_in_prefix
        The prefix inside the model holds the BOS token: it must not be put in front again.
    stop_ids
        Tokens that end a generated answer.
    """

    name: str
    step: Step
    tokenizer: Any
    context: int
    bos_in_prefix: bool
    stop_ids: frozenset[int]

    def logits_of(self, ids: Tensor) -> Tensor:
        """Logits [B, S, vocab] of whole sequences ``ids`` [B, S]."""
        return self.step(ids, torch.ones_like(ids), None)[0]

    def start_id(self) -> int:
        """The token that stands for "a text begins here", to predict a text's first token from.

        BOS, or EOS in models without. Where BOS is in the prefix, a line break: the model holds the prefix's
        keys and values, not the logits behind it, so some token has to be given, and of those a text may
        begin after it is the least surprising (SmolLM2, first 20 tokens of WikiText-2 paragraphs: 106 nats
        after a line break, 115 after BOS in a model without prefix, 117 after a second BOS).
        """
        tokenizer = self.tokenizer
        if self.bos_in_prefix:
            line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
            candidates = [*line_break[-1:], *self._other_than_bos([tokenizer.eos_token_id])]
        else:
            candidates = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        for token in candidates:
            if token is not None:
                return int(token)
        raise PqExportError("its tokenizer has neither BOS nor EOS nor line break", where=self.name)

    def without_second_bos(self, ids: list[int]) -> list[int]:
        """``ids`` without the BOS in front if the prefix holds it; as a role marker (more than one) it stays."""
        bos = self.tokenizer.bos_token_id
        return ids[1:] if self.bos_in_prefix and ids[:1] == [bos] and ids.count(bos) == 1 else ids

    def _other_than_bos(self, ids: Iterable[int | None]) -> list[int | None]:
        return [i for i in ids if i != self.tokenizer.bos_token_id]


def checkpoint_subject(name: str, decoder: Decoder, tokenizer: Any, eos: int | list[int] | None) -> Subject:
    """The floating-point model; ``eos`` is its generation config's."""
    return Subject(
        name, torch_step(decoder), tokenizer, decoder.config.max_position_embeddings, False, _stop_ids(eos, tokenizer)
    )


def calibration_subject(name: str, decoder: Decoder, calibration: Calibration, directory: Path) -> Subject:
    """The fake-quant model ``decoder`` of the calibration that lies in ``directory``."""
    tokenizer = _tokenizer(directory / ASSETS_NAME)
    return Subject(
        name,
        torch_step(decoder),
        tokenizer,
        calibration.decoder.max_position_embeddings - len(calibration.prefix.token_ids),
        calibration.bos_token_id in calibration.prefix.token_ids,
        _stop_ids(_eos_of(directory / ASSETS_NAME), tokenizer),
    )


def bundle_subject(name: str, decoder: OrtDecoder, bundle: Bundle) -> Subject:
    """The graph of ``bundle`` in onnxruntime."""
    tokenizer, prefix = _tokenizer(bundle.directory), bundle.config["prefix"]
    return Subject(
        name,
        ort_step(decoder),
        tokenizer,
        bundle.config["max_position_embeddings"] - prefix["length"],
        bundle.config["bos_token_id"] in prefix["token_ids"],
        _stop_ids(_eos_of(bundle.directory), tokenizer),
    )


def torch_step(decoder: Decoder) -> Step:
    """``decoder`` on the device where it is."""

    @torch.no_grad()
    def step(ids: Tensor, mask: Tensor, state: Any) -> tuple[Tensor, Any]:
        device = decoder.embed_tokens.weight.device
        ids, mask = ids.to(device), mask.to(device)
        past, seen = state or (decoder.empty_past(len(ids)), mask[:, :0])
        seen = torch.cat((seen, mask), 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits, past = decoder(ids, seen, positions, past)
        return logits, (past, seen)

    return step


def ort_step(decoder: OrtDecoder) -> Step:
    """A graph in onnxruntime."""

    def step(ids: Tensor, mask: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state, _ = decoder.step(ids.numpy(), state or decoder.empty(len(ids)), mask=mask.numpy())
        return torch.from_numpy(logits), state

    return step


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _eos_of(folder: Path) -> int | list[int] | None:
    path = folder / "generation_config.json"
    eos: int | list[int] | None = (
        json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    )
    return eos


def _stop_ids(eos: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    return frozenset(int(i) for i in ids if i is not None)
