"""The decoder that the generation benchmark serves: a given one, or one of random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["base_model"]

VOCABULARY = 8_192
POSITIONS = 256


def base_model(model: Path | None, corpus: Sequence[str], folder: Path, *, is_quick: bool) -> Path:
    """Returns ``model``, or the folder of a GPT-2 of 8 layers of width 384 that it makes in ``folder``.

    Its tokenizer is trained on ``corpus``, its weights are random: costs do not depend on them.
    """
    if model is not None:
        return model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=400 if is_quick else VOCABULARY,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    layers, width, heads = (4, 32, 4) if is_quick else (8, 384, 6)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=POSITIONS,
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
