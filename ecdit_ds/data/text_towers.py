"""Which part of a model of `transformers` reads captions. The library takes seconds to import, so functions do."""

from typing import Any

from ecdit_ds.errors import DataError


def text_class(config: Any) -> Any:
    """Return the class that reads captions alone: the encoder of T5, the text tower of CLIP."""
    import transformers

    if config.model_type in ("clip", "clip_text_model"):
        return transformers.CLIPTextModel
    known = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    return transformers.AutoModelForTextEncoding if config.model_type in known else transformers.AutoModel


def encoder_of(model: Any, who: str) -> Any:
    """Return what of a model reads captions alone: of two towers that of text, of an encoder and decoder the encoder.

    Raises:
        DataError: its encoder reads no captions.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as WITHOUT_DECODER

    # A model of pictures too, as a SigLIP, would want a picture.
    if getattr(model.config, "text_config", None) is not None and hasattr(model, "text_model"):
        return model.text_model
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


def has_pooler(model: Any) -> bool:
    """Return whether a model gives a vector for the whole caption; CLIP does so without a layer of that name."""
    return model.config.model_type in ("clip", "clip_text_model") or getattr(model, "pooler", None) is not None
