"""The tiny Stable Diffusion 3 pipeline: every component of SD3.5-Medium, small enough for a CPU."""

from __future__ import annotations

import json

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from . import SIZE
from .prompts import split

TEXT_LENGTH = 10
_CLIP_WIDTH = 32
_JOINT_WIDTH = 2 * _CLIP_WIDTH


def _words() -> list[str]:
    entries = [e for side in (False, True) for group in split(side).values() for e in group]
    return sorted({word for entry in entries for word in entry["prompt"].split()})


def _clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Byte-pair tokenizer in which every word of the world is one token and any other word still has a spelling."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(c + "</w>" for c in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=bpe.get_vocab(), merges=merges, model_max_length=TEXT_LENGTH)


def _t5_tokenizer(words: list[str]) -> T5Tokenizer:
    pieces = ["\u2581" + word for word in words] + ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    scores = dict.fromkeys(pieces, -4.0) | dict.fromkeys(pieces[: len(words)], -2.0)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scores.items()]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)


def _clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_CLIP_WIDTH,
            intermediate_size=2 * _CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=_CLIP_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """An untrained pipeline with random weights drawn from ``seed``: 64 px pictures, 16 image tokens."""
    torch.manual_seed(seed)
    words = _words()
    clip, t5 = _clip_tokenizer(words), _t5_tokenizer(words)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // 8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=_JOINT_WIDTH,
            caption_projection_dim=128,
            pooled_projection_dim=2 * _CLIP_WIDTH,
            pos_embed_max_size=SIZE // 16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 32, 32),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
            sample_size=SIZE,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        ),
        text_encoder=_clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=_clip_encoder(clip),
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=_JOINT_WIDTH,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_3=t5,
    )
