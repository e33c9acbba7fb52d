"""Conversations as the ids that a model was tuned to read, laid out by the chat template it was published with.

Only the template may write special tokens. A message whose text holds the name of one is refused, since it could
end its own turn and speak as somebody else.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from formery.data.sandbox import BUDGET, STEP, Refusal, Sandbox
from formery.errors import FormeryError

if TYPE_CHECKING:
    from formery.data.tokenizer import Tokenizer


def encode_chat(
    tokenizer: "Tokenizer",
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    template: str = "default",
) -> list[int]:
    """The ids of `messages`, and of the beginning of the assistant's answer if `add_generation_prompt`.

    messages: each has a role ("system", "user", "assistant", or what the template knows) and a content. template:
    which of the tokenizer's chat templates. Raises FormeryError without such a template, for messages that are
    malformed, hold the name of a special token or are refused by the template, and for a template that fails.
    """
    text = render_chat(tokenizer, messages, add_generation_prompt, template)
    # Imported late: a tokenizer knows how to chat, and this module what a tokenizer is.
    from formery.data.tokenizer import library_errors, unicode_text

    with library_errors("the tokenizer cannot encode this conversation"):
        return tokenizer.trusting.encode(unicode_text(text), add_special_tokens=False).ids


def render_chat(
    tokenizer: "Tokenizer",
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    template: str = "default",
) -> str:
    """The text of the conversation, special tokens and all, that `encode_chat` encodes; raises what it raises."""
    source = tokenizer.chat_templates.get(template)
    if source is None:
        known = ", ".join(tokenizer.chat_templates) or "none, since it was not made for conversations"
        raise FormeryError(f"the model has no chat template named {template!r} (it has {known}); give it plain text.")
    checked = _checked(messages)
    _refuse_special(tokenizer, checked, source)
    size = sum(len(text) + STEP for message in checked for text in message.values())
    variables: dict[str, Any] = {kind: name for kind, name in tokenizer.tokens.items() if name is not None}
    variables |= {
        "messages": checked,
        "tools": None,
        "documents": None,
        "add_generation_prompt": bool(add_generation_prompt),
    }
    return render(source, variables, BUDGET + 64 * size)


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages as plain tables of texts, so that a template sees nothing else."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise FormeryError("a conversation is a list of messages, at least one, each with a role and a content.")
    found = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise FormeryError(f"message {number} should have a role and a content, and nothing else.")
        for key, value in message.items():
            if not isinstance(value, str):
                raise FormeryError(f"message {number}: its {key} should be a text, not {type(value).__name__}.")
        if not message["role"]:
            raise FormeryError(f"message {number} has an empty role; give user, assistant or system.")
        found.append({key: str(message[key]) for key in ("role", "content")})
    return found


def _refuse_special(tokenizer: "Tokenizer", messages: Sequence[Mapping[str, str]], source: str) -> None:
    """Refuses a message with the name of a special token, or of another added token that the template writes."""
    inner = tokenizer.inner
    tokens = [
        token
        for token in inner.get_added_tokens_decoder().values()
        if token.special or (token.content in source and not token.content.isspace())
    ]
    fold = inner.normalizer if any(token.normalized for token in tokens) else None
    for number, message in enumerate(messages, start=1):
        for key, text in message.items():
            # Some tokens are found in the normalized text only.
            forms = [text] if fold is None else [text, fold.normalize_str(text)]
            for token in tokens:
                if any(token.content in form for form in forms):
                    raise FormeryError(
                        f"message {number}: its {key} holds {token.content}, which is a special token of this model "
                        "and could forge a turn; take it out."
                    )


def render(template: str, variables: Mapping[str, Any], budget: int = BUDGET) -> str:
    """The text that a chat template makes; raises FormeryError for whatever is wrong with it, in one sentence."""
    try:
        return Sandbox(budget).from_string(template).render(**variables)
    except Refusal as error:
        raise FormeryError(f"the model's chat template refuses these messages: {_line(error)}.") from error
    except jinja2.TemplateSyntaxError as error:
        raise FormeryError(
            f"the model's chat template cannot be read, line {error.lineno}: {_line(error.message)}."
        ) from error
    except RecursionError as error:
        raise FormeryError("the model's chat template cannot be used: it calls itself without an end.") from error
    except Exception as error:  # the template is a program, and may fail as any program does
        reason = _line(error) or type(error).__name__
        raise FormeryError(f"the model's chat template cannot be used: {reason}.") from error


def _line(error: object) -> str:
    """A message on one line, of bearable length, without a full stop at its end."""
    return " ".join(str(error).split())[:300].rstrip(".")
