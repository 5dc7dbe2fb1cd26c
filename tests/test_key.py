"""Keys as people type them, and what they prove."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.errors import UsageError
from sdrpc.key import BITS, LETTERS, Key, fingerprint, nonce, same, transcript

KEY = Key(bytes(12))


@given(st.integers(0, 2**BITS - 1))
def test_a_key_is_read_as_it_is_written(number: int) -> None:
    key = Key(number.to_bytes(12, "big"))
    assert re.fullmatch(rf"([{LETTERS}]{{5}}-){{3}}[{LETTERS}]{{5}}", key.code)
    assert Key.parse(key.code) == key
    assert Key.parse(" " + key.code.upper().replace("-", " ") + "\n") == key


def test_letters_that_look_alike_are_one() -> None:
    key = next(key for key in iter(Key.new, None) if {"0", "1"} <= set(key.code))
    assert Key.parse(key.code.replace("0", "O").replace("1", "l")) == key


def test_most_mistyped_keys_are_told_and_none_is_repeated() -> None:
    code = Key.new().code
    said = [
        fault(code[:at] + wrong + code[at + 1 :])
        for at, right in enumerate(code)
        for wrong in (LETTERS if right != "-" else "")
        if wrong != right
    ]
    assert len(said) == 31 * 20
    assert sum(map(bool, said)) >= 0.9 * len(said), "one in 32 is not told"
    assert code[:5] not in "".join(said)


def fault(code: str) -> str:
    """What is wrong with ``code``; nothing for a key."""
    try:
        Key.parse(code)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("code", ["", "-", "abc", "u" * 20, "0" * 19, "0" * 21, "ä" * 20, "0" * 10_000])
def test_what_is_no_key(code: str) -> None:
    with pytest.raises(UsageError, match="20 letters and digits"):
        Key.parse(code)


def test_new_keys_differ_and_use_all_their_bits() -> None:
    keys = [Key.new() for _ in range(200)]
    assert len({key.code for key in keys}) == 200
    seen = 0
    for key in keys:
        seen |= int.from_bytes(key.secret, "big")
    assert seen == 2**BITS - 1


def test_a_key_is_not_shown_by_accident() -> None:
    key = Key.new()
    for text in (repr(key), str(key), f"{key}", repr([key]), f"{key!r}"):
        assert key.code not in text
        assert key.secret.hex() not in text
        assert repr(key.secret) not in text


def test_a_proof_is_of_one_side_one_key_and_one_conversation() -> None:
    said = transcript(fingerprint(b"certificate"), nonce(), nonce())
    other = transcript(fingerprint(b"another"), said[32:64], said[64:])
    proofs = [KEY.server_proof(said), KEY.client_proof(said), KEY.server_proof(other), Key.new().server_proof(said)]
    assert len(set(proofs)) == len(proofs)
    assert same(proofs[0], KEY.server_proof(said))
    assert not any(same(proofs[0], proof) for proof in proofs[1:])
