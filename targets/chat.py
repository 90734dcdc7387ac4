"""The chat template as literal pieces, for runtimes that have no Jinja."""

from __future__ import annotations

from typing import Any

from pq_export.errors import PqExportError

ROLES = ("system", "user", "assistant")
MARK = "\u2060{}\u2060"  # no template and no text has word joiners around a letter


def chat_pieces(tokenizer: Any) -> dict[str, Any]:
    """The literal pieces of a Hugging Face tokenizer's chat template.

    Returns ``{"bos": str, "system": [before, after] | None, "default_system": str, "user": [before, after],
    "assistant": [before, after], "generation": str, "strip": bool}``: a conversation is ``bos``, then
    ``default_system`` unless it begins with a system message, then each message's content between its role's two
    pieces, then ``generation``. ``system`` is None where the template refuses such messages, or changes its other
    pieces by them; ``strip`` says that white space around contents goes. Raises PqExportError when the template is
    not of this kind: the pieces are put together to conversations of several turns and compared with what the
    template makes of them.
    A date that the template takes from the clock is the day of the export.
    """
    if not tokenizer.chat_template:
        raise PqExportError("the tokenizer has no chat template")
    pieces = _cut(tokenizer, with_system=True) or _cut(tokenizer, with_system=False)
    if pieces is None:
        raise PqExportError("the chat template is not a sequence of fixed pieces around each message")
    return pieces


def format_chat(pieces: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """What the C++ runner does with the pieces."""
    text = str(pieces["bos"])
    if messages[0]["role"] != "system":
        text += pieces["default_system"]
    for message in messages:
        before, after = pieces[message["role"]]
        text += before + (message["content"].strip() if pieces["strip"] else message["content"]) + after
    return text + str(pieces["generation"])


def _render(tokenizer: Any, roles: str, contents: list[str], generation: bool = True) -> str | None:
    """A conversation, roles as "suau"; None where the template refuses it."""
    names = {name[0]: name for name in ROLES}
    messages = [{"role": names[role], "content": content} for role, content in zip(roles, contents, strict=True)]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except Exception:  # a template raises what it likes
        return None


def _cut(tokenizer: Any, with_system: bool) -> dict[str, Any] | None:
    marks = [MARK.format(letter) for letter in "abcde"]
    one, five = _render(tokenizer, "u", marks[:1]), _render(tokenizer, "uauau", marks)
    bare = _render(tokenizer, "u", marks[:1], generation=False)
    if one is None or five is None or bare is None or not one.startswith(bare):
        return None
    generation = one[len(bare) :]
    try:
        start, user_after = bare.split(marks[0])
        middle = five.split(marks[1])[1].split(marks[2])[0]  # behind the first answer, before the second question
        to_assistant = five.split(marks[0])[1].split(marks[1])[0].removeprefix(user_after)
        # `middle` is the assistant's end, which a conversation that ends there shows, and the user's beginning.
        answered = _render(tokenizer, "ua", marks[:2], generation=False)
        end = answered.split(marks[1])[1] if answered else ""
        user_before = middle.removeprefix(end) if end and middle.startswith(end) else _common_suffix(start, middle)
        if not start.endswith(user_before):
            user_before = _common_suffix(start, middle)
    except (ValueError, IndexError):
        return None
    head = start[: len(start) - len(user_before)]
    assistant_after = middle[: len(middle) - len(user_before)]
    bos = tokenizer.bos_token or ""
    if not bos or not head.startswith(bos) or user_before.startswith(bos):  # the last: it marks roles
        bos = ""
    pieces: dict[str, Any] = {
        "bos": bos,
        "system": None,
        "default_system": head.removeprefix(bos),
        "user": [user_before, user_after],
        "assistant": [to_assistant, assistant_after],
        "generation": generation,
        "strip": _render(tokenizer, "u", [f" {marks[0]}\n"]) == one,
    }
    if with_system:
        system = _render(tokenizer, "su", marks[:2])
        parts = system.split(marks[0]) if system else []
        if len(parts) != 2:
            return None
        before = parts[0].removeprefix(bos)
        after = parts[1].split(marks[1])[0].removesuffix(user_before)
        pieces["system"] = [before, after]
    return pieces if _holds(tokenizer, pieces) else None


def _common_suffix(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[len(a) - 1 - length] == b[len(b) - 1 - length]:
        length += 1
    return a[len(a) - length :]


def _holds(tokenizer: Any, pieces: dict[str, Any]) -> bool:
    """Whether the pieces make what the template makes, of conversations that end with the user."""
    words = ["Hi!", "Say 'x' & <y>", "  two\n lines ", "{{ 1 }} {% if %}", "naïve 日本 🙂", "ok"]
    kinds = ["u", "uau", "uauau"] + (["su", "suau", "suauau"] if pieces["system"] else [])
    names = {name[0]: name for name in ROLES}
    for kind in kinds:
        for shift in range(len(words)):
            contents = [words[(shift + i) % len(words)] for i in range(len(kind))]
            messages = [{"role": names[r], "content": c} for r, c in zip(kind, contents, strict=True)]
            if _render(tokenizer, kind, contents) != format_chat(pieces, messages):
                return False
    return True
