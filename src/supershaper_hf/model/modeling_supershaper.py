# Copyright 2026 The supershaper-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""SuperShaper: BERT with elastic hidden sizes, as a supernet and as the subnets cut from it.

The same classes serve both, and the configuration tells them apart. Embeddings, pooler and heads stay at `hidden_size`.
The encoder between them is in `elastic.py`. In reading order: embeddings, what every model can do, bare model, heads.
"""

from collections.abc import Sequence
from json import JSONDecodeError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_supershaper import SuperShaperConfig
from .elastic import SuperShaperCodeMap, SuperShaperEncoder, SuperShaperLayer, SuperShaperSelfAttention
from .narrowing import subnet_tensors, tensors_of


IGNORE_INDEX = -100  # label of positions that do not count in the loss, as everywhere in transformers


class SuperShaperEmbeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised: (batch, length) -> (batch, length, hidden_size)."""

    def __init__(self, config: SuperShaperConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length, positions = words.shape[1], self.position_embeddings.num_embeddings
        if position_ids is None:
            if length > positions:
                raise ValueError(
                    f"The input is {length} tokens long, but the model has max_position_embeddings={positions}. "
                    f"Truncate it: tokenizer(..., truncation=True, max_length={positions})."
                )
            position_ids = torch.arange(length, device=words.device).unsqueeze(0)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        embeddings = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


class SuperShaperPooler(nn.Module):
    def __init__(self, config: SuperShaperConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


class SuperShaperPreTrainedModel(PreTrainedModel):
    """What every SuperShaper model can do: load, start from a BERT, be cut into a subnet, be published.

    Every `forward` takes the arguments of BERT and `shape`, see `SuperShaperModel.forward`.
    """

    config: SuperShaperConfig
    base_model_prefix = "bert"
    _keys_to_ignore_on_load_unexpected = [r"^cls\."]  # the masked-LM head of a supernet, which other heads replace
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SuperShaperEmbeddings", "SuperShaperLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        # The embeddings, then every layer at its own width. transformers puts last_hidden_state in place of the last.
        "hidden_states": [
            OutputRecorder(SuperShaperEmbeddings, index=0, capture_initial_hidden_state=False),
            OutputRecorder(SuperShaperLayer, index=0, capture_initial_hidden_state=False),
        ],
        "attentions": SuperShaperSelfAttention,
    }
    model_tags = ["supershaper"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "starts_as_identity", False):
            init.eye_(module.weight)
        elif isinstance(module, SuperShaperCodeMap):
            init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a supernet or a subnet from a folder or the Hub, as `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: If a weight file, or the index of several, is cut short or damaged.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (SafetensorError, JSONDecodeError) as error:
            raise OSError(
                f"The weights of {str(pretrained_model_name_or_path)!r} are damaged or cut short ({error}). Copy the "
                "file again; if it came from the Hub, pass force_download=True once."
            ) from error

    @classmethod
    def from_bert(cls, source: Any, **kwargs: Any) -> Any:
        """Make a supernet from a BERT checkpoint or model: see `supershaper_hf.from_bert`.

        Example:
            >>> supernet = SuperShaperForMaskedLM.from_bert("google-bert/bert-base-cased")  # doctest: +SKIP
        """
        return installed_package("from_bert").from_bert(cls, source, **kwargs)

    @classmethod
    def from_original(cls, source: Any, config: SuperShaperConfig, **kwargs: Any) -> Any:
        """Make a supernet from a checkpoint of the 2021 repository: see `supershaper_hf.from_original`."""
        return installed_package("from_original").from_original(cls, source, config, **kwargs)

    @torch.no_grad()
    def extract_subnet(
        self, shape: Sequence[int], repo_id: str | None = None, calibration: Any = None, **push_kwargs: Any
    ) -> Any:
        """Cut the standalone subnet at `shape` out of this supernet.

        The result is a model of the same class with merged bottlenecks. Its outputs equal `supernet(..., shape=shape)`,
        unless `calibration` is given. It has the supernet's device and dtype, and memory of its own. As after loading,
        it is in evaluation mode and all its parameters are trainable, those that are frozen in the supernet included.

        Args:
            shape: One hidden size per layer out of `config.width_choices`; 0 drops the layer.
            repo_id: If given, `"user/name"`, the subnet is also published there.
            calibration: Batches of text. Then `supershaper_hf.polish` brings the subnet nearer to the largest shape.
            **push_kwargs: Passed to `push_to_hub`: `private`, `token`, `revision`, `tokenizer`, ...

        Raises:
            TypeError: If `shape` is not a sequence of integers, or `push_kwargs` are given without `repo_id`.
            ValueError: If a width is not allowed, all layers are dropped, or this model is itself a subnet.

        Example:
            >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
            >>> subnet = SuperShaperForMaskedLM(config).extract_subnet([40, 16])
            >>> subnet.config.hidden_sizes
            [40, 16]
        """
        if push_kwargs and repo_id is None:
            raise TypeError(f"extract_subnet: {sorted(push_kwargs)} only make sense with repo_id='user/name'.")
        shape = self.config.normalize_shape(shape)
        subnet = empty_model(type(self), self.config.subnet_config(shape))
        if getattr(self, "pooler", True) is None:
            subnet.pooler = None
        tensors = subnet_tensors(subnet, self.config, shape, tensors_of(self))  # some are views of the supernet's
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors}
        subnet.load_state_dict(own, assign=True, strict=False)
        subnet.eval().tie_weights()
        if calibration is not None:
            installed_package("extract_subnet with calibration").polish(subnet, self, shape, calibration)
        if repo_id is not None:
            subnet.push_to_hub(repo_id, **push_kwargs)
        return subnet

    def push_to_hub(self, repo_id: str, *, tokenizer: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Publish a complete repository, card and code included: see `supershaper_hf.push_to_hub`.

        Without the package this is `PreTrainedModel.push_to_hub`, without a tokenizer. Both return a `CommitInfo`.
        """
        try:
            import supershaper_hf
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "supershaper_hf":
                raise
            if tokenizer is not None:
                raise TypeError("Without the package, publish the tokenizer with tokenizer.push_to_hub.") from error
            return super().push_to_hub(repo_id, **kwargs)
        return supershaper_hf.push_to_hub(self, repo_id, tokenizer=tokenizer, **kwargs)


class SuperShaperModel(SuperShaperPreTrainedModel):
    """The bare encoder. `last_hidden_state` is (batch, length, hidden_size), `pooler_output` (batch, hidden_size)."""

    def __init__(self, config: SuperShaperConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = SuperShaperEmbeddings(config)
        self.encoder = SuperShaperEncoder(config)
        self.pooler = SuperShaperPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode `input_ids` (batch, length) with the layers narrowed to `shape`; `None` is the model's own full shape.

        `Trainer.predict` passes no `shape`: give it `extract_subnet(shape)`. With `output_hidden_states=True`,
        `hidden_states` are the embeddings (batch, length, hidden_size), then the output (batch, length, w) of each kept
        layer at its own width w. The last kept layer is an exception: its entry is `last_hidden_state` (batch, length,
        hidden_size). States of different widths cannot be stacked. In a supernet the bottleneck out of layer i maps its
        state to hidden_size:

            state = model.base_model.encoder.leave(i, state)

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, the input is longer than
                `max_position_embeddings`, or `shape` is not allowed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        shape = self.config.hidden_sizes if shape is None else self.config.normalize_shape(shape)
        embeddings = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=embeddings, attention_mask=attention_mask)
        hidden_states = self.encoder(embeddings, mask, shape, **kwargs)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class SuperShaperPredictionTransform(nn.Module):
    def __init__(self, config: SuperShaperConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden_states)))


class SuperShaperPredictions(nn.Module):
    def __init__(self, config: SuperShaperConfig):
        super().__init__()
        self.transform = SuperShaperPredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))


class SuperShaperForMaskedLM(SuperShaperPreTrainedModel):
    """Masked language modelling, the task of super pre-training. Logits are (batch, length, vocab_size)."""

    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    _keys_to_ignore_on_load_unexpected = [r"^bert\.pooler\."]  # which a file may hold for other heads

    def __init__(self, config: SuperShaperConfig):
        super().__init__(config)
        self.bert = SuperShaperModel(config, add_pooling_layer=False)
        self.cls = nn.ModuleDict({"predictions": SuperShaperPredictions(config)})  # named as in BERT
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls["predictions"].decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cls["predictions"].decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shape: Sequence[int] | None = None,
        sparse_prediction: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Predict tokens. `labels` (batch, length) hold the token to predict, or -100 at positions without a label.

        With `sparse_prediction` and labels, the head runs on labelled positions only, and the logits are (labelled
        positions, vocab_size). Training and evaluation use this, because it saves most of the head's work.
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, shape, return_dict=True, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        if sparse_prediction and labels is not None:
            labelled = labels != IGNORE_INDEX
            hidden_states, labels = hidden_states[labelled], labels[labelled]
        logits = self.cls["predictions"](hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def classifier_dropout(config: SuperShaperConfig) -> nn.Dropout:
    """Return the dropout before a task's classifier: `config.classifier_dropout`, or the hidden dropout as in BERT."""
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class SuperShaperForSequenceClassification(SuperShaperPreTrainedModel):
    """One label, several labels or a score per sequence, by `config.problem_type`. Logits are (batch, num_labels)."""

    def __init__(self, config: SuperShaperConfig):
        super().__init__(config)
        self.bert = SuperShaperModel(config)
        self.dropout = classifier_dropout(config)
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Classify sequences. `labels` are (batch,) class indices or scores, or (batch, num_labels) floats."""
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, shape, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss, num_items = None, kwargs.get("num_items_in_batch")
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            if num_items is not None and self.config.problem_type != "single_label_classification":
                # For regression and several labels, transformers takes the mean over this batch only.
                loss = loss * labels.ne(IGNORE_INDEX).sum() / num_items  # the Trainer counts labels like this
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class SuperShaperForTokenClassification(SuperShaperPreTrainedModel):
    """A label per token, as in named-entity recognition. Logits are (batch, length, num_labels)."""

    def __init__(self, config: SuperShaperConfig):
        super().__init__(config)
        self.bert = SuperShaperModel(config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Classify tokens. `labels` are (batch, length) class indices, or -100 at positions without a label."""
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, shape, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class SuperShaperForQuestionAnswering(SuperShaperPreTrainedModel):
    """Extractive question answering: start and end logits, each (batch, length)."""

    def __init__(self, config: SuperShaperConfig):
        super().__init__(config)
        self.bert = SuperShaperModel(config, add_pooling_layer=False)
        self.num_labels = config.num_labels
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Score answer spans. `start_positions` and `end_positions` are (batch,) token indices."""
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, shape, return_dict=True, **kwargs
        )
        start_logits, end_logits = (part.contiguous() for part in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


class SuperShaperForMultipleChoice(SuperShaperPreTrainedModel):
    """Choice among candidate sequences. Inputs are (batch, choices, length), logits (batch, choices)."""

    def __init__(self, config: SuperShaperConfig):
        super().__init__(config)
        self.bert = SuperShaperModel(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """Score each choice. `labels` are the (batch,) indices of the right choices."""
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        inputs = (None if tensor is None else tensor.flatten(0, 1) for tensor in given)  # (batch * choices, length)
        outputs = self.bert(*inputs, shape, return_dict=True, **kwargs)
        num_choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, num_choices)
        loss = None if labels is None else fixed_cross_entropy(logits, labels, **kwargs)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def installed_package(method: str) -> Any:
    """Return the package. The modules that `method` needs do not travel with a model."""
    try:
        import supershaper_hf
    except ImportError as error:
        raise ImportError(f"{method} needs the package: pip install supershaper-hf") from error
    return supershaper_hf


def empty_model(model_class: type, config: SuperShaperConfig) -> Any:
    """Build a model on the meta device: its tensors have names and shapes, and no memory."""
    with torch.device("meta"):
        return model_class(config)


__all__ = [
    "SuperShaperForMaskedLM",
    "SuperShaperForMultipleChoice",
    "SuperShaperForQuestionAnswering",
    "SuperShaperForSequenceClassification",
    "SuperShaperForTokenClassification",
    "SuperShaperModel",
    "SuperShaperPreTrainedModel",
]
