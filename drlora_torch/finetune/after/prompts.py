"""Turn prompts of a user into tokens, as the rows of the run were."""

from __future__ import annotations

from typing import Any

from drlora_torch.errors import RunError
from drlora_torch.finetune.data.formats import ALPACA, QUESTION

CHATS = ("messages", "conversations", "question", "instruction")
"""First columns of data that a chat template turns into tokens, if there is one."""


class Prompter:
    """Makes the tokens of a prompt.

    Rows of messages, questions and instructions were trained through the chat template, or without
    one with a text around them; then prompts are too. Other rows were trained as they are.

    Args:
        tokenizer: of the run.
        columns: first column that the run read; empty if that is unknown.
        chat: True to use the chat template, False to add nothing to a prompt; None: as trained.
        system: text of a system message.

    Raises:
        RunError: a chat template is asked for, and there is none; or neither the columns nor
            ``chat`` tell how to make a prompt.
    """

    def __init__(
        self, tokenizer: Any, columns: str, chat: bool | None = None, system: str | None = None
    ) -> None:
        if not columns and chat is None:
            raise RunError(
                "the run has no data.json that can be read, which tells the form of its prompts; "
                "add --chat to use the chat template, or --plain to add nothing"
            )
        self._tokenizer, self._columns, self._system = tokenizer, columns, system
        self._as_trained = chat is None
        template = bool(getattr(tokenizer, "chat_template", None))
        self.chat: bool = template and columns in CHATS if chat is None else chat
        if self.chat and not template:
            raise RunError("--chat: the tokenizer of this run has no chat template")
        if system is not None and not self.chat:
            hint = "add --chat" if template else "the tokenizer of this run has none"
            raise RunError(f"--system needs the chat template: {hint}")
        _check_text("--system", system or "")

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            RunError: there are none, the prompt is no UTF-8, or the chat template refuses it.
        """
        _check_text("the prompt", prompt)
        if self.chat:
            tokens = self._render(prompt)
        else:
            tokens = list(self._tokenizer(self._around(prompt))["input_ids"])
        if not tokens:
            raise RunError(f"the prompt {prompt!r} has no tokens; write at least one character")
        return tokens

    def stop_tokens(self, model: Any) -> list[int]:
        """Return the tokens that end a text: of the model, the tokenizer and the chat template."""
        ends = model.generation_config.eos_token_id
        found = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        found += [self._tokenizer.eos_token_id, self._end_of_turn() if self.chat else None]
        return sorted({int(token) for token in found if token is not None})

    def _around(self, prompt: str) -> str:
        if self._as_trained and self._columns == "question":
            return QUESTION.format(question=prompt)
        if self._as_trained and self._columns == "instruction":
            return ALPACA.format(instruction=prompt, input="")
        return prompt

    def _render(self, prompt: str, *answer: dict[str, str]) -> list[int]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        try:
            made = self._tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": prompt}, *answer],
                add_generation_prompt=not answer,
                tokenize=True,
                return_dict=True,
            )
        except Exception as error:  # templates raise errors of Jinja's and of their own
            reason = " ".join(str(error).split())
            raise RunError(f"the chat template refuses the messages: {reason}") from error
        return list(made["input_ids"])

    def _end_of_turn(self) -> int | None:
        """The special token with which the template ends an answer, if it does."""
        before = self._render("a")
        turn = self._render("a", {"role": "assistant", "content": "b"})
        special = set(self._tokenizer.all_special_ids)
        after = (token for token in reversed(turn[len(before) :]) if token in special)
        return next(after, None)


def _check_text(name: str, text: str) -> None:
    """Refuse bytes that are not UTF-8, which Python keeps as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RunError(f"{name} is not UTF-8: {text!r}") from error
