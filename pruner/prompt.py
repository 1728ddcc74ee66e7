"""Prompts as token ids and token ids as text, by the ``tokenizers`` library: transformers takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruner.errors import PruneAttnError, one_line
from pruner.files import read_bounded, read_json
from pruner.text import load_tokenizer

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
_MOST_BYTES = 64 << 20  # of tokenizer.json: Llama 3's has 9 MB
_MOST_TEMPLATE = 1 << 20


class PromptTokenizer:
    """The tokenizer of a checkpoint directory. Raises ``PruneAttnError`` where it has none that works.

    Without a ``tokenizer.json`` transformers has to make it. No code of the directory's is run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._config: dict[str, Any] = {}
        for name in (SPECIAL_TOKENS, TOKENIZER_CONFIG):
            self._config |= read_json(directory / name) if (directory / name).is_file() else {}
        self._tokenizer = _from_file(directory / "tokenizer.json") or _from_transformers(directory)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def ids(self, text: str) -> list[int]:
        """With what the tokenizer adds by itself: BOS, as a rule."""
        return self._tokenizer.encode(text).ids

    def plain_ids(self, text: str) -> list[int]:
        """With nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def chat_ids(self, message: str) -> list[int]:
        """A user's message in the directory's chat template, up to where the answer begins."""
        from jinja2 import TemplateError

        # its sandbox for templates, which strangers write; this imports no torch
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._chat_template()
        tokens: dict[str, Any] = dict(self._special_tokens())
        try:
            rendered: Any = render_jinja_template(  # its texts and where they were generated, whatever its type says
                [[{"role": "user", "content": message}]], chat_template=template, add_generation_prompt=True, **tokens
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise PruneAttnError(
                f"{self.directory}: its chat template fails ({one_line(error, 120)}); leave out --chat"
            ) from None
        return self.plain_ids(rendered[0][0])

    def text(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def eos_id(self) -> int | None:
        """``None`` where the tokenizer names none."""
        token = self._special_tokens().get("eos_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    def _special_tokens(self) -> dict[str, str]:
        tokens = {name: token for name, token in self._config.items() if name.endswith("_token")}
        contents = {name: t.get("content") if isinstance(t, dict) else t for name, t in tokens.items()}
        return {name: content for name, content in contents.items() if isinstance(content, str)}

    def _chat_template(self) -> str:
        path, found = self.directory / CHAT_TEMPLATE, self._config.get("chat_template")
        if path.is_file():
            found = read_bounded(path, _MOST_TEMPLATE).decode(errors="replace")
        elif isinstance(found, list):
            found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
        if not isinstance(found, str):
            raise PruneAttnError(
                f"{self.directory}: has no chat template ({CHAT_TEMPLATE}, or chat_template in {TOKENIZER_CONFIG}); "
                "leave out --chat"
            )
        return found


def _from_file(path: Path) -> tokenizers.Tokenizer | None:
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    data = read_bounded(path, _MOST_BYTES)
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library's own class is Exception
        raise PruneAttnError(
            f"{path}: is no tokenizer that loads ({one_line(error, 120)}); copy the original's"
        ) from None


def _from_transformers(directory: Path) -> tokenizers.Tokenizer:
    try:
        return load_tokenizer(directory).backend_tokenizer
    except AttributeError:
        raise PruneAttnError(f"{directory}: has no tokenizer.json; copy the original's") from None
