"""Tiny networks of the classes that rewards load, saved as their checkpoints are."""

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

_LETTERS = [c + end for c in "abcdefghijklmnopqrstuvwxyz-" for end in ("", "</w>")]
_WORDS = ["<|startoftext|>", "<|endoftext|>", *_LETTERS]


def clip_model():
    """A CLIP with two layers a side, 16 wide, for pictures of 32 pixels."""
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**common, "vocab_size": len(_WORDS), "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**common, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    # Fresh biases are zero and norms one, which would hide a wrong assignment.
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_clip(folder, model=None):
    """Save a CLIP and its processor, which crops pictures to 32 pixels."""
    (clip_model() if model is None else model).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(_WORDS)}, merges=[], model_max_length=77)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)
