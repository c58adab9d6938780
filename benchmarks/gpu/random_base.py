"""A base of BERT-base's shape with random weights: how fast it is does not depend on what it has learnt."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["WORDS", "number_texts", "write_random_base", "write_random_decoder"]

WORDS = 2000
"""The texts' vocabulary: numbers below this, a token each."""
VOCABULARY = 30_522
GPT2_VOCABULARY = 50_257
END, UNKNOWN = "<|endoftext|>", "<|unknown|>"
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


def write_random_decoder(folder: Path, *, is_tiny: bool = False) -> Path:
    """The same of GPT-2's shape: 12 layers of width 768."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokens = {token: index for index, token in enumerate([END, UNKNOWN, *map(str, range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    sizes = {"vocab_size": GPT2_VOCABULARY}
    if is_tiny:
        sizes = {"vocab_size": len(tokens), "n_embd": 64, "n_layer": 4, "n_head": 4}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def number_texts(count: int, words: int, seed: int) -> list[str]:
    """Texts of half to one and a half times ``words`` words, drawn by Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, WORDS + 1)
    lengths = torch.randint(max(1, words // 2), words + words // 2 + 1, (count,), generator=generator)
    draws = torch.multinomial(weights, int(lengths.sum()), replacement=True, generator=generator)
    return [" ".join(map(str, draw.tolist())) for draw in draws.split(lengths.tolist())]
