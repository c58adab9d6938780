"""A base of BERT-base's shape with random weights: how fast it is does not depend on what it has learnt."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["WORDS", "number_texts", "write_random_base"]

WORDS = 2000
"""The texts' vocabulary: numbers below this, a token each."""
VOCABULARY = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_random_base(folder: Path, *, is_tiny: bool = False) -> Path:
    """Saves the model and its tokenizer in transformers' format, and returns the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokens = {token: index for index, token in enumerate([*SPECIAL, *map(str, range(WORDS))])}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, tokens[token]) for token in ("[CLS]", "[SEP]")]
    )
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"vocab_size": VOCABULARY}
    if is_tiny:
        sizes = {
            "vocab_size": len(tokens),
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        }
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    return folder


def number_texts(count: int, words: int, seed: int) -> list[str]:
    """Texts of half to one and a half times ``words`` words, drawn by Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, WORDS + 1)
    lengths = torch.randint(max(1, words // 2), words + words // 2 + 1, (count,), generator=generator)
    draws = torch.multinomial(weights, int(lengths.sum()), replacement=True, generator=generator)
    return [" ".join(map(str, draw.tolist())) for draw in draws.split(lengths.tolist())]
