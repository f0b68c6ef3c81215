"""Which part of a model of `transformers` reads captions, and with which tokenizer.

The library takes seconds to import, so functions do.
"""

from pathlib import Path
from typing import Any

from ecdit_ds.data.encoders.stored_weights import LOCAL, opening
from ecdit_ds.errors import DataError

_POSITIONS = ("max_position_embeddings", "max_encoder_position_embeddings")
"""What configurations call the number of positions, the second that of an LED."""
_LETTERS = ("a", "b", "1", ".", "д", "中", "あ", "한", "م", "अ")
"""Letters of which any tokenizer tells some apart."""


def text_class(config: Any) -> Any:
    """Return the class of the library that reads captions, with as little else as it can be loaded with."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    if config.model_type in ("clip", "clip_text_model"):
        return transformers.CLIPTextModel
    # These classes do not know their weights in a folder of several towers, as a Llama 4, and that of a T5Gemma refuses
    # one with a decoder, as all that were published are.
    is_whole = hasattr(config, "text_config") or (config.model_type == "t5gemma" and config.is_encoder_decoder)
    if config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES and not is_whole:
        return transformers.AutoModelForTextEncoding
    if config.model_type in MODEL_MAPPING_NAMES:
        return transformers.AutoModel
    # A tower saved alone, as a SiglipTextModel, which the library has and does not list.
    named = (getattr(transformers, str(name), None) for name in config.architectures or ())
    models = (kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel))
    return next(models, transformers.AutoModel)


def encoder_of(model: Any, who: str) -> Any:
    """Return what of a model reads captions alone: of several towers that of text, of an encoder-decoder the encoder.

    Raises:
        DataError: its encoder reads no captions.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as WITHOUT_DECODER

    # A model of pictures too, as a SigLIP, would want a picture.
    if getattr(model.config, "text_config", None) is not None and hasattr(model, "text_model"):
        return model.text_model
    language_model = getattr(model, "language_model", None)
    # Where the whole says the width itself, as a PaliGemma, it reads captions itself, with positions of its own.
    if language_model is not None and not _says_width_of(model, language_model):
        return encoder_of(getattr(language_model, "model", language_model.base_model), who)
    has_decoder = model.config.is_encoder_decoder or hasattr(model, "decoder")
    if not has_decoder or type(model).__name__ in WITHOUT_DECODER.values():
        return model
    encoder = model.get_encoder()  # the model itself where it has none, as an OPT
    is_missing = encoder is model and model.config.is_encoder_decoder
    if is_missing or getattr(encoder, "main_input_name", None) != "input_ids":
        raise DataError(
            f"{who}: is a {type(model).__name__}, whose encoder ({type(encoder).__name__}) cannot read captions "
            "alone; name a model of text, such as a T5, a CLIP or a BART"
        )
    return encoder


def _says_width_of(model: Any, tower: Any) -> bool:
    return getattr(model.config, "hidden_size", None) == getattr(tower.config, "hidden_size", 0)


def positions_of(model: Any) -> int | None:
    """Return how many tokens a model has positions for; None where it has no such limit."""
    from torch import nn

    # In RoBERTa and its kin those of tokens begin after that of padding, and count as `max_position_embeddings` all.
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padded = [table for table in tables if isinstance(table, nn.Embedding) and table.padding_idx is not None]
    told = (getattr(model.config, name, None) for name in _POSITIONS)
    limits = [table.num_embeddings - int(table.padding_idx or 0) - 1 for table in padded]
    limits += [int(limit) for limit in told if limit and limit > 0]  # -1 of an XLNet: none
    return min(limits, default=None)


def has_pooler(model: Any) -> bool:
    """Return whether a model gives a vector for the whole caption; CLIP does so without a layer of that name."""
    return model.config.model_type in ("clip", "clip_text_model") or getattr(model, "pooler", None) is not None


def load_tokenizer(folder: Path, who: str) -> Any:
    """Load the tokenizer of a text model, to pad on the right.

    Raises:
        DataError: there is none, or none that tells letters apart or can pad.
    """
    with opening(f"{who}: has no tokenizer that can be loaded", DataError):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), **LOCAL)
        read = {tuple(tokenizer(letter)["input_ids"]) for letter in _LETTERS}
    # transformers 5 makes an empty tokenizer where a folder has none, and every caption would read the same.
    if len(read) == 1:
        raise DataError(f"{who}: has no tokenizer, so it cannot read captions; save_pretrained one there")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # then any other mark serves, since the mask hides it
        tokenizer.pad_token = tokenizer.eos_token or next(iter(tokenizer.all_special_tokens), None)
    if tokenizer.pad_token is None:
        raise DataError(f"{who}: its tokenizer has no mark to pad with; name a pad_token in its tokenizer_config.json")
    return tokenizer
