"""Puts our classes behind the Auto classes of transformers."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto import tokenization_auto

from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
)
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

# As the published config.json files map them: AutoModel is the model that chats.
MODELS = {
    AutoModel: ChatGLMForConditionalGeneration,
    AutoModelForCausalLM: ChatGLMForConditionalGeneration,
    AutoModelForSeq2SeqLM: ChatGLMForConditionalGeneration,
    AutoModelForSequenceClassification: ChatGLMForSequenceClassification,
}


def register() -> None:
    """Makes the Auto classes load "chatglm" folders with our code, even with trust_remote_code.

    Registering again changes nothing.
    """
    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    for auto_class, model_class in MODELS.items():
        auto_class.register(ChatGLMConfig, model_class, exist_ok=True)
    _register_tokenizer()


def _register_tokenizer() -> None:
    # AutoTokenizer.register would enter the class in a second table too, and for the classes there
    # AutoTokenizer prefers the folder's own code when called with trust_remote_code=True. In this
    # one alone it is found by the tokenizer_class of tokenizer_config.json and wins every time. The
    # table is no documented interface: a test holds it on the oldest and newest transformers.
    tokenization_auto.REGISTERED_TOKENIZER_CLASSES[ChatGLMTokenizer.__name__] = ChatGLMTokenizer
