"""Decisions read where the answers are: what `decisions.read_decision` finds in them, as a function of arrays.

An automaton goes over the bytes of an answer. It is exact wherever the answer spells at most one brace "{", no
backslash, no thought tag, texts alone as values of its JSON object, names and blanks in ASCII, and no token is longer
than 32 bytes. Beyond that (nested objects, numbers, escapes, letters whose case only Unicode knows) it may take an
answer for unparsed, or miss which of several objects counts: whoever uses it compares what follows with what the host
reads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atp_jax.decisions import DECISIONS, normalise

COMPLY, VIOLATE, UNPARSED = range(len(DECISIONS))
WIDEST = 32  # bytes of a token that are looked at; only runs of blanks or dashes are longer

# What the automaton has just read. NAME + n: the first n letters of the name "choice"; NAME_LEFT: of another name.
OUTSIDE, OPENED, COMMA, NAME_LEFT, NAMED, NAMED_CHOICE, VALUE, CHOICE, IN_VALUE, IN_CHOICE, AFTER, NAME = range(12)
_KEY = b"choice"
_STATES = NAME + len(_KEY) + 1


def _table() -> np.ndarray:
    """The next state: uint8 [states, 256]."""
    table = np.zeros((_STATES, 256), np.uint8)  # where nothing else is said the object is broken: OUTSIDE
    inside = [byte for byte in range(0x20, 256) if byte not in b'"\\']  # JSON texts hold no control characters

    def go(state: int, read: bytes | list[int], to: int) -> None:
        table[state, list(read)] = to

    names = [NAME_LEFT, *range(NAME, _STATES)]
    for state in range(_STATES):
        go(state, b"{", OPENED)
    for state in (OPENED, COMMA, NAMED, NAMED_CHOICE, VALUE, CHOICE, AFTER):
        go(state, b" \t\n\r", state)
    for state in (OPENED, COMMA):
        go(state, b'"', NAME)
    for state in names:
        go(state, inside, NAME_LEFT)
        go(state, b'"', NAMED)
    for letter, byte in enumerate(_KEY):
        go(NAME + letter, [byte], NAME + letter + 1)
    go(NAME + len(_KEY), b'"', NAMED_CHOICE)
    for named, value, within in ((NAMED, VALUE, IN_VALUE), (NAMED_CHOICE, CHOICE, IN_CHOICE)):
        go(named, b":", value)
        go(value, b'"', within)
        go(within, inside, within)
        go(within, b'"', AFTER)
    go(AFTER, b",", COMMA)
    return table


_TABLE = _table()


class Spelling(struct.PyTreeNode):
    """How the tokens of a vocabulary V are spelled."""

    letters: jax.Array  # uint8 [V, L], the bytes of each, filled up with 0
    count: jax.Array  # int32 [V], how many these are


def spelling(tokenizer, size: int) -> Spelling:
    """Of a model with so many tokens. Special tokens are spelled by nothing, as in the text of an answer."""
    ids = [[index] for index in range(min(size, len(tokenizer)))]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    spelled = [text.encode()[:WIDEST] for text in texts] + [b""] * (size - len(ids))
    return Spelling(_padded(spelled), np.array([len(one) for one in spelled], np.int32))


def options(names: list[tuple[str, str]]) -> np.ndarray:
    """The names of the two options (comply, violate) of each of B answers: uint8 [B, 2, K], filled up with 0."""
    found = _padded([normalise(name).encode() for pair in names for name in pair])
    return found.reshape(len(names), 2, -1)


def _padded(texts: list[bytes]) -> np.ndarray:
    width = max(map(len, texts))
    return np.frombuffer(b"".join(text.ljust(width, b"\0") for text in texts), np.uint8).reshape(len(texts), width)


def read(tokens: jax.Array, count: jax.Array, named: jax.Array, spelled: Spelling) -> jax.Array:
    """The decision of each answer, int32 [B], as `envs.types` counts them.

    tokens int32 [B, n], the first count [B] of each; named: as `options` gives them.
    """
    text = _text(tokens, count, spelled)
    table, begin = jnp.asarray(_TABLE), jnp.full(len(text), OUTSIDE, jnp.uint8)

    def one(state, byte):
        state = table[state, byte]
        return state, state

    _, states = jax.lax.scan(one, begin, text.T, unroll=8)
    after = states.T
    before = jnp.concatenate([begin[:, None], after[:, :-1]], axis=1)
    places = jnp.arange(text.shape[1])

    def last(happened):
        return jnp.where(happened, places, -1).max(axis=1, keepdims=True)

    # The last object that was closed, where it began, and the value of the last "choice" in it.
    close = last((before == AFTER) & (text == ord("}")))
    opened = last((after == OPENED) & (text == ord("{")) & (places < close))
    end = last((before == IN_CHOICE) & (after == AFTER) & (places > opened) & (places < close))
    first = last((before == CHOICE) & (after == IN_CHOICE) & (places < end)) + 1
    letters = (places >= first) & (places < end) & (text > ord(" "))
    stop = last(letters) + 1
    first = jnp.where(letters, places, text.shape[1]).min(axis=1, keepdims=True)

    at = first + jnp.arange(named.shape[2])
    value = jnp.where(at < stop, jnp.take_along_axis(text, at, axis=1, mode="clip"), 0)
    value = jnp.where((value >= ord("A")) & (value <= ord("Z")), value + 32, value)
    same = (value[:, None] == named).all(axis=2) & (stop - first <= named.shape[2])
    return jnp.where(same[:, COMPLY], COMPLY, jnp.where(same[:, VIOLATE], VIOLATE, UNPARSED)).astype(jnp.int32)


def _text(tokens: jax.Array, count: jax.Array, spelled: Spelling) -> jax.Array:
    """Answers as bytes, uint8 [B, n * L], behind zeros: their ends stand in line."""
    (rows, most), width = tokens.shape, spelled.letters.shape[1]
    lengths = jnp.where(jnp.arange(most) < count[:, None], spelled.count[tokens], 0)
    ends = most * width - jnp.cumsum(lengths[:, ::-1], axis=1)[:, ::-1] + lengths
    letter = jnp.arange(width)
    at = jnp.where(letter < lengths[..., None], (ends - lengths)[..., None] + letter, most * width)
    text = jnp.zeros((rows, most * width), jnp.uint8)
    return text.at[jnp.arange(rows)[:, None, None], at].set(spelled.letters[tokens], mode="drop")
