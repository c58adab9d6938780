"""What the tests of generation share: a tokenizer whose tokens begin and end inside characters."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """All bytes, 90 merges that mind neither words nor characters, and a special token."""
    generator = random.Random(0)
    # Characters that share first bytes, or last ones, so often that letters are joined with parts of them.
    faces = [chr(0x1F600 + number) for number in range(14)]
    accented = [bytes([first, 0xA9]).decode() for first in range(0xC3, 0xD0)]
    characters = [*"aaaaaaaaaaaabbb  日", "abba", "abba", "aab", *faces, *accented]
    texts = ["".join(generator.choices(characters, k=20)) for _ in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 91,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
