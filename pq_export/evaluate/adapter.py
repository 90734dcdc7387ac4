"""A :class:`Subject` as a language model of lm-eval. Imported only where lm-eval is installed.

Results are those of lm-eval's own Hugging Face class on the same floating-point model, except that BOS is
never put in front twice and text that does not fit is counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from pq_export.errors import PqExportError
from pq_export.evaluate.subject import Subject
from pq_export.stages import Progress, Silent

LOGITS_BYTES = 2**30  # of one batch, in fp32
MAX_NEW_TOKENS = 256  # lm-eval's own default
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

TokenRequest = tuple[Any, list[int], list[int]]


class Adapter(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """Scores and continues text with ``subject``, at most ``batch_size`` sequences at once.

    ``truncated`` counts requests whose beginning was cut off because they did not fit in the context.
    """

    def __init__(self, subject: Subject, batch_size: int = 16, progress: Progress | None = None):
        super().__init__()
        self.subject, self.tokenizer = subject, subject.tokenizer
        self.batch_size = batch_size
        self.truncated = 0
        self._progress = progress or Silent()
        self._start_id = subject.start_id()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """lm-eval's name for the token that an empty context becomes."""
        return self._start_id

    @property
    def tokenizer_name(self) -> str:
        return self.subject.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids. None: with the special tokens that the tokenizer adds by itself, unless BOS is written out."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        return self.subject.without_second_bos(before) or [self._start_id], after

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **options: Any) -> list[tuple[float, bool]]:
        """(sum of log probabilities, is it the greedy answer) of each continuation behind its context.

        Requests that differ in their last token only, such as the letters of a multiple choice, run once.
        """
        inputs: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            whole = self._fitting(context, continuation)
            inputs.setdefault(tuple(whole[:-1]), []).append((index, continuation))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        self._progress.start(f"score {len(requests)} continuations", len(requests))
        for batch in self._batches(list(inputs)):
            ids, mask = padded(batch, behind=True)
            logits, _ = self.subject.step(ids, mask, None)
            for row, sequence in zip(logits, batch, strict=True):
                for index, continuation in inputs[tuple(sequence)]:
                    results[index] = score(row[: len(sequence)], continuation)
                    self._progress.advance(1)
        return results

    def _fitting(self, context: list[int], continuation: list[int]) -> list[int]:
        """Both, cut in front so that all but the last token fit in the context."""
        room = self.subject.context
        if len(continuation) > room:
            raise PqExportError(
                f"a continuation of {len(continuation)} tokens does not fit in the context of {room}",
                where=self.subject.name,
                cure="Leave this task out.",
            )
        whole = context + continuation
        self.truncated += len(whole) - 1 > room
        return whole[-(room + 1) :]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each whole text, every token predicted once, in windows of the context."""
        texts: list[int] = []
        windows: list[TokenRequest] = []
        for index, (text,) in enumerate(request.args for request in requests):
            tokens = self.subject.without_second_bos(self.tok_encode(text, add_special_tokens=False))
            for window in get_rolling_token_windows(tokens, self._start_id, self.subject.context, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                texts.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(texts, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut before its first stop sequence."""
        groups: dict[str, list[int]] = {}  # what is generated alike can run together
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers = [""] * len(requests)
        self._progress.start(f"generate {len(requests)} answers", len(requests))
        for options, members in groups.items():
            until, limit = generation_options(json.loads(options), self.subject)
            prompts: dict[tuple[int, ...], list[int]] = {}
            for index in members:
                prompts.setdefault(tuple(self._prompt(requests[index].args[0], limit)), []).append(index)
            for batch in self._batches(list(prompts)):
                for prompt, answer in zip(batch, self._greedy(batch, limit, until), strict=True):
                    for index in prompts[tuple(prompt)]:
                        answers[index] = answer
                        self._progress.advance(1)
        return answers

    def _prompt(self, text: str, limit: int) -> list[int]:
        ids = self.subject.without_second_bos(self.tok_encode(text)) or [self._start_id]
        room = self.subject.context - limit
        self.truncated += len(ids) > room
        return ids[-room:]

    def _greedy(self, prompts: list[list[int]], limit: int, until: list[str]) -> list[str]:
        """At most ``limit`` tokens behind each prompt, all prompts in one batch through the cache."""
        ids, mask = padded(prompts, behind=False)
        state, answers = None, [Answer() for _ in prompts]
        for _ in range(limit):
            logits, state = self.subject.step(ids, mask, state)
            ids = logits[:, -1:].argmax(-1).cpu()
            mask = torch.ones_like(ids)
            for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
                self._extend(answer, token, until)
            if all(answer.done for answer in answers):
                break
        return [answer.text for answer in answers]

    def _extend(self, answer: Answer, token: int, until: list[str]) -> None:
        if answer.done or token in self.subject.stop_ids:
            answer.done = True
            return
        answer.tokens.append(token)
        text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        cuts = [text.find(stop) for stop in until if stop in text]
        answer.done, answer.text = bool(cuts), text[: min(cuts)] if cuts else text

    def _batches(self, sequences: list[tuple[int, ...]]) -> Iterator[list[list[int]]]:
        """Sequences of like length together, the longest first: if memory is short, it shows at once."""
        ordered = sorted(sequences, key=lambda s: (-len(s), s))
        while ordered:
            fitting = LOGITS_BYTES // (4 * len(self.tokenizer) * len(ordered[0]))
            rows = max(1, min(self.batch_size, fitting))
            yield [list(s) for s in ordered[:rows]]
            ordered = ordered[rows:]


class Answer:
    """A text that grows token by token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text, self.done = "", False


def padded(sequences: list[list[int]], *, behind: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, longest]; the mask is 0 where there is padding, which is token 0."""
    longest = max(map(len, sequences))
    ids, mask = (torch.zeros(len(sequences), longest, dtype=torch.long) for _ in range(2))
    for row, sequence in enumerate(sequences):
        place = slice(len(sequence)) if behind else slice(longest - len(sequence), longest)
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    return ids, mask


def score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Of the last tokens: ``logits`` [S, vocab] at the tokens before them."""
    last = logits[-len(continuation) :].float()
    targets = torch.tensor(continuation, device=logits.device)
    log_probabilities = last.log_softmax(-1).gather(1, targets[:, None])
    return log_probabilities.double().sum().item(), bool((last.argmax(-1) == targets).all())


def generation_options(options: dict[str, Any], subject: Subject) -> tuple[list[str], int]:
    """Stop sequences and the most new tokens that a task asks for; refuses all but greedy decoding."""
    if options.get("do_sample") or options.get("num_beams", 1) != 1:
        raise PqExportError(
            "a task asks for sampling or beams; answers are greedy here",
            where=subject.name,
            cure="Leave this task out.",
        )
    until = options.get("until") or []
    limit = next((int(options[n]) for n in LENGTH_NAMES if options.get(n) is not None), MAX_NEW_TOKENS)
    if limit >= subject.context:
        raise PqExportError(
            f"a task asks for {limit} new tokens; the context holds {subject.context}",
            where=subject.name,
            cure="Leave this task out.",
        )
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop], limit
