"""Messages to token ids and back.

The tokenizer's own chat template says how messages are laid out. Two things it cannot do are done here: an answer that
was sampled keeps the very ids that were sampled, and nothing that a scenario or a model says becomes a control token.
(The option `sanitize_control_tokens` of transformers has the second aim, but hides `</think>` from the template, knows
only the control tokens that the template spells out, and tokenizes the words around a spelling apart from it.)
"""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from jinja2 import TemplateError
from tokenizers import Tokenizer

from atp_jax.errors import UserError

# While a template runs, a spelling of added token number j in a message stands as ESCAPE + chr(FIRST + j): private-use
# characters, so that no template mistakes it for anything, and blanks can still be trimmed around it.
ESCAPE = "\U0010fffd"
FIRST = 0x100000

_log = logging.getLogger(__name__)


class Chat:
    """The way from messages to token ids, and back, for one tokenizer.

    Where ids come from:
    - The added tokens of the tokenizer (`<|im_end|>`, `<think>`, ...) come only from what the template itself writes
      and from sampled ids. The same characters in a message are encoded as plain text.
    - All other text is tokenized in whole runs from one added token to the next, template and message together,
      because the two may merge ("\\n" of the template and a blank that begins a message, say). So the ids are those of
      `tokenizer.apply_chat_template(messages, add_generation_prompt=True)` when no message spells an added token.
    - An assistant message with sampled ids is a run of its own, since it began where the prompt ended. If the template
      shows only part of it (a past thought is dropped, blanks are trimmed), the longest stretch of the ids that decodes
      to that part is kept, or the part is tokenized as text if there is none. The stop token at the end of the sampled
      ids is left to the template, which ends every message itself.

    Of a model's answer the template sees the thought tags (added tokens that decoding keeps and the template names), so
    that it can take a past thought out; of all other messages it sees no tag. A template that lays out what surrounds
    an answer by what the answer says cannot be taken apart: then the whole conversation is tokenized as text, sampled
    ids or not, and a warning is logged once. Neither Qwen2.5, Qwen3 nor Llama 3 does so for an answer that is followed
    by a user message.

    tokenizer: a fast tokenizer of transformers, with a chat template. thinking: passed to the template as
    `enable_thinking`, unless None. Raises UserError if the tokenizer is not fast or has no template.
    """

    def __init__(self, tokenizer, thinking: bool | None = None):
        self._tokenizer = tokenizer
        self._where = tokenizer.name_or_path or "the tokenizer"
        self._options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                f"{self._where}: the tokenizer has no chat template (chat_template.jinja, or the key chat_template in "
                "tokenizer_config.json); an instruction-tuned model has one"
            ) from None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"{self._where}: the tokenizer is not a fast one (no tokenizer.json)")

        # The same tokenizer without its added tokens: to it, every text is plain.
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer

        added = {token.content: (index, token.special) for index, token in tokenizer.added_tokens_decoder.items()}
        self._added_ids = {spelling: index for spelling, (index, _) in added.items()}
        self._special_ids = frozenset(index for index, special in added.values() if special)
        thought_tags = [spelling for spelling, (_, special) in added.items() if not special and spelling in template]
        self._added = _any_of(added)
        self._thought_tag = _any_of(thought_tags)
        self._escaped = _any_of([*added, ESCAPE])
        self._escaped_in_answers = _any_of([*(added.keys() - set(thought_tags)), ESCAPE])
        self._spellings = [*added, ESCAPE]
        self._codes = {spelling: ESCAPE + chr(FIRST + j) for j, spelling in enumerate(self._spellings)}
        self._mark = ESCAPE + chr(FIRST + len(self._spellings))

        # Most of a prompt was in the prompt of the round before.
        self._tokenize_run = lru_cache(maxsize=4096)(self._tokenize_run)
        self._sampled = lru_cache(maxsize=4096)(self._sampled)
        self._warned = False

    def encode(self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()) -> list[int]:
        """Token ids of a conversation, ending with the generation prompt.

        messages: {"role", "content"}; those of the assistant may have "tokens", the ids as they were sampled, with or
        without the stop token. tools: schemas of what the assistant may call, for a template that lays them out.
        Raises UserError if the template refuses the messages (some allow no system message).
        """
        contents = [self._escape(message["content"], message["role"]) for message in messages]
        rendered = self._render(messages, contents, tools)
        # What may not simply be tokenized with its surroundings: sampled ids, and answers whose tags the template saw.
        apart = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and (message.get("tokens") or self._thought_tag.search(contents[index]))
        ]
        runs = self._take_apart(rendered, messages, contents, apart, tools)

        ids: list[int] = []
        text = runs[0]
        for index, shown, after in zip(apart, runs[1::2], runs[2::2], strict=False):
            shown = self._unescape(shown)
            sampled = self._sampled(tuple(messages[index].get("tokens") or ()), shown)
            if sampled is None:
                text += self._escape(shown) + after
            else:
                ids += self._tokenize(text)
                ids += sampled
                text = after
        return ids + self._tokenize(text)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer that was never sampled, without what ends it. Thought tags are themselves; any other
        control token that it spells out is plain text."""
        return self._tokenize(self._escape(text, "assistant"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens. Thought tags are kept: they are added tokens, but not special."""
        return self._tokenizer.decode(
            [int(index) for index in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _escape(self, content: str, role: str = "") -> str:
        pattern = self._escaped_in_answers if role == "assistant" else self._escaped
        return pattern.sub(lambda match: self._codes[match[0]], content)

    def _unescape(self, text: str) -> str:
        return re.sub(f"{ESCAPE}(.)", lambda match: self._spellings[ord(match[1]) - FIRST], text, flags=re.DOTALL)

    def _render(self, messages: Sequence[Mapping], contents: Sequence[str], tools: Sequence[Mapping]) -> str:
        conversation = [
            {"role": message["role"], "content": content} for message, content in zip(messages, contents, strict=True)
        ]
        try:
            return self._tokenizer.apply_chat_template(
                conversation, tools=list(tools) or None, add_generation_prompt=True, tokenize=False, **self._options
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"{self._where}: the chat template refuses the roles {roles}: {error}") from None

    def _take_apart(
        self,
        rendered: str,
        messages: Sequence[Mapping],
        contents: Sequence[str],
        apart: Sequence[int],
        tools: Sequence[Mapping],
    ) -> list[str]:
        """[before, what the template shows of message apart[0], between, of apart[1], ..., after]; joined: `rendered`.

        Where the messages begin and end is found by rendering a second time with a mark in their place. If the two
        renderings differ beside the marks, all is returned as one text.
        """
        if not apart:
            return [rendered]
        marked = [self._mark if index in apart else content for index, content in enumerate(contents)]
        surroundings = self._render(messages, marked, tools).split(self._mark)
        runs = [surroundings[0]]
        end = len(surroundings[0])
        for following in surroundings[1:-1]:
            start, end = end, rendered.find(following, end)
            runs += [rendered[start:end], following]
            end += len(following)
        runs += [rendered[end : len(rendered) - len(surroundings[-1])], surroundings[-1]]
        if len(surroundings) == len(apart) + 1 and "".join(runs) == rendered:
            return runs
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s: the chat template lays out what surrounds an answer by what the answer says; "
                "past answers are tokenized as text instead of keeping their sampled ids",
                self._where,
            )
        return [rendered]

    def _sampled(self, tokens: tuple[int, ...], shown: str) -> list[int] | None:
        """The longest stretch of sampled ids that decodes to `shown`; None if there is none, or if nothing was sampled.

        The stretch ends where the ids end, but for a stop token and, failing that, for blanks.
        """
        if not tokens:
            return None
        ids = list(tokens)
        if ids[-1] in self._special_ids:
            ids.pop()
        if self.decode(ids) == shown:
            return ids
        kept = self._suffix(ids, shown)
        if kept is None:
            while ids and self.decode(ids[-1:]).isspace():
                ids.pop()
            kept = self._suffix(ids, shown)
        return kept

    def _suffix(self, ids: list[int], shown: str) -> list[int] | None:
        found = None
        for start in range(len(ids), -1, -1):
            text = self.decode(ids[start:])
            if text == shown:
                found = ids[start:]
            # A character cut in two shows as up to three more; anything longer than that only grows.
            if len(text) > len(shown) + 3:
                break
        return found

    def _tokenize(self, text: str) -> list[int]:
        """Ids of rendered text: added tokens where they are spelled out, and runs of plain text between them."""
        ids: list[int] = []
        end = 0
        for match in self._added.finditer(text):
            ids += self._tokenize_run(text[end : match.start()])
            ids.append(self._added_ids[match[0]])
            end = match.end()
        return ids + self._tokenize_run(text[end:])

    def _tokenize_run(self, text: str) -> list[int]:
        return self._plain.encode(self._unescape(text), add_special_tokens=False).ids


def _any_of(spellings) -> re.Pattern:
    """Matches any of these strings, the longest first as tokenizers do; nothing at all if there are none."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or "(?!)")
