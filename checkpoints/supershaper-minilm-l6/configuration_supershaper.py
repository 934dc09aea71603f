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
"""Configuration of a SuperShaper model: a BERT whose layers each have a hidden size of their own.

One configuration class describes both kinds of model:

* a **supernet** (`merged_bottlenecks=False`) has every layer at full width, a bottleneck into and out of each layer,
  and `width_choices`, the hidden sizes that a layer may be narrowed to at run time;
* a **subnet** (`merged_bottlenecks=True`) is a standalone model cut from a supernet. It stores layer i at
  `hidden_sizes[i]`, and neighbouring bottlenecks multiplied into one map.

This file, `narrowing.py`, `elastic.py` and `modeling_supershaper.py` are copied beside every saved model, so they
import no other module of the package.
"""

import copy
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


PAPER_WIDTH_CHOICES = [120, 240, 360, 480, 540, 600, 768]
# BERT-large has 24 layers. To build a model of 100,000 takes minutes, before any other error would be noticed.
MAX_LAYERS = 1000

# Every saved model lists every head, whichever head it has: `save_pretrained` alone would list only the saved one, and
# loading another Auto class from that folder without the package would fail.
AUTO_MAP = {
    "AutoConfig": "configuration_supershaper.SuperShaperConfig",
    "AutoModel": "modeling_supershaper.SuperShaperModel",
    "AutoModelForMaskedLM": "modeling_supershaper.SuperShaperForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_supershaper.SuperShaperForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_supershaper.SuperShaperForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_supershaper.SuperShaperForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_supershaper.SuperShaperForMultipleChoice",
}


def default_width_choices(hidden_size: int, num_attention_heads: int) -> list[int]:
    """Return the hidden sizes that a layer may be narrowed to when the user names none.

    At hidden size 768 these are the seven of the paper (arXiv 2110.04711, section 3). At any other hidden size they
    rise in six equal steps from about 15 % of the full width to the full width. Matrix products are fastest on
    multiples of 8, so every width is a multiple of `8 * num_attention_heads`. Where this gives fewer than seven
    different widths, 8 is replaced by 4, 2 or 1.

    Example:
        >>> default_width_choices(384, 12)
        [48, 96, 144, 240, 288, 336, 384]
    """
    if hidden_size == 768 and all(width % num_attention_heads == 0 for width in PAPER_WIDTH_CHOICES):
        return list(PAPER_WIDTH_CHOICES)
    targets = [hidden_size * (0.15 + 0.85 * step / 6) for step in range(7)]
    widths: list[int] = []
    for head_multiple in (8, 4, 2, 1):
        unit = num_attention_heads * head_multiple
        narrowed = {max(unit, unit * math.floor(target / unit + 0.5)) for target in targets[:-1]}
        widths = [*sorted(width for width in narrowed if width < hidden_size), hidden_size]
        if len(widths) == 7:
            break
    return widths


def _whole(default: int, most: int | None = None) -> Any:
    """Make a field of the configuration that takes integers from 1 to `most`."""

    def check(value: int) -> None:
        if value < 1 or (most is not None and value > most):
            raise ValueError(
                f"{value} must be an integer from 1 to {most}." if most else f"{value} must be at least 1."
            )

    return validated_field(check, default=default)


def _number(default: float | None, below: float = math.inf) -> Any:
    """Make a field of the configuration that takes finite numbers from 0 up to, but not including, `below`."""

    def check(value: float | None) -> None:
        if value is not None and not 0 <= value < below:  # also refuses NaN
            bound = "" if below == math.inf else f" and below {below:g}"
            raise ValueError(f"{value} must be a finite number of at least 0{bound}.")

    return validated_field(check, default=default)


def _check_activation(name: str) -> None:
    if name not in ACT2FN:
        raise ValueError(f"{name!r} is not an activation of transformers. Allowed: {', '.join(sorted(ACT2FN))}.")


@strict
class SuperShaperConfig(PreTrainedConfig):
    """Configuration of a SuperShaper supernet or subnet. The fields of BERT keep BERT's names and defaults.

    Args:
        hidden_size: Width of the embeddings, the pooler and the heads. It is the largest width of a layer.
        num_hidden_layers: Number of stored layers, at most 1000.
        hidden_sizes: Hidden size of each stored layer, one for each of `num_hidden_layers`. `None` means `hidden_size`
            for every layer.
        width_choices: The hidden sizes that a layer may be narrowed to. They are strictly increasing, each is a
            multiple of `num_attention_heads`, and the last one is `hidden_size`. `None` means `default_width_choices`.
            A subnet has none.
        head_slicing: Which query, key and value channels a layer of width w keeps. `"prefix"`, the paper's way, keeps
            the first w channels and divides them into `num_attention_heads` heads. `"per_head"` keeps the first
            w / heads channels of every head, so that a channel belongs to the same head at every width.
        merged_bottlenecks: Whether each output bottleneck is multiplied with the next input bottleneck, as in a subnet.
        bottlenecks: What the widths of a layer share. With `"shared"`, the paper's way, a narrow layer uses a part of
            the layer's one output bottleneck. With `"by_width"` each narrow width of a layer has an output bottleneck
            of its own, and codes that stand for all channels by the few that it has; see `SuperShaperNarrowWidth`. A
            subnet has neither: these maps are merged with the weights beside them.
        full_head_scale: Whether attention scores are divided by the square root of the full head size at every width,
            as `calibrate` needs it, instead of that of the narrowed head, as in the paper. In a subnet the factor is
            part of the query weights.

    Raises:
        StrictDataclassError: If a value has the wrong type or is out of its range, or the widths, the heads and
            `width_choices` do not fit together.

    Example:
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2)
        >>> config.hidden_sizes
        [96, 96]
        >>> config.width_choices
        [16, 24, 40, 56, 72, 80, 96]
    """

    model_type = "supershaper"

    vocab_size: int = _whole(30522)
    hidden_size: int = _whole(768)
    num_hidden_layers: int = _whole(12, most=MAX_LAYERS)
    num_attention_heads: int = _whole(12)
    intermediate_size: int = _whole(3072)
    hidden_act: str = validated_field(_check_activation, default="gelu")
    hidden_dropout_prob: float | int = _number(0.1, below=1)
    attention_probs_dropout_prob: float | int = _number(0.1, below=1)
    max_position_embeddings: int = _whole(512)
    type_vocab_size: int = _whole(2)
    initializer_range: float | int = _number(0.02)
    layer_norm_eps: float | int = _number(1e-12)
    pad_token_id: int | None = 0
    classifier_dropout: float | int | None = _number(None, below=1)
    tie_word_embeddings: bool = True
    hidden_sizes: list[int] | None = None
    width_choices: list[int] | None = None
    head_slicing: Literal["prefix", "per_head"] = "prefix"
    merged_bottlenecks: bool = False
    bottlenecks: Literal["shared", "by_width"] = "shared"
    full_head_scale: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_sizes is None:
            self.hidden_sizes = [self.hidden_size] * self.num_hidden_layers
        if self.width_choices is None and not self.merged_bottlenecks:
            self.width_choices = default_width_choices(self.hidden_size, self.num_attention_heads)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json. Where there is none, raise an error instead of returning the defaults.

        Raises:
            OSError: If there is no config.json, or it is not JSON.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise OSError(
                f"{str(pretrained_model_name_or_path)!r} has no config.json, so it is not a saved model. Check the "
                "name, or save a model there with save_pretrained."
            )
        return config_dict, kwargs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the configuration of a folder or a repository, as `PreTrainedConfig.from_pretrained`.

        Raises:
            OSError: If there is no config.json, or it is not JSON.
            ValueError: If the configuration does not describe a model. The message names the folder or repository.
        """
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))  # for the errors of `from_dict`
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from a dictionary, as `PreTrainedConfig.from_dict`.

        Raises:
            StrictDataclassError: If the values do not describe a model.
            ValueError: The same for values that `from_pretrained` has read. The message names where they come from.
        """
        source = kwargs.get("name_or_path")
        try:
            return super().from_dict(config_dict, **kwargs)
        # The checks of transformers raise the last four.
        except (StrictDataclassError, ValueError, TypeError, AttributeError, IndexError) as error:
            if source is None:
                raise
            raise ValueError(f"The config.json of {str(source)!r} does not describe a model. {error}") from error

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Write the configuration, as `PreTrainedConfig.to_json_file`, with which `save_pretrained` writes it too.

        Its `auto_map` names only code that lies in the folder: a folder that names missing code cannot be loaded. A
        model saves its code before its configuration. A configuration that is saved alone names only its own class.
        """
        code = {file.stem for file in Path(json_file_path).parent.glob("*.py")}
        names = [*AUTO_MAP.items(), *getattr(self, "auto_map", {}).items()]  # of a loaded model, or of a user's class
        self.auto_map = {auto_class: name for auto_class, name in names if name.split(".")[0] in code}
        super().to_json_file(json_file_path, *args, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to config.json: what differs from the defaults, and of a classifier all labels.

        Transformers leaves out the labels of two classes without names. Clients that are not transformers, such as
        text-embeddings-inference and transformers.js, do not know them otherwise.
        """
        written = super().to_diff_dict()
        if self.id2label and any(name.endswith("Classification") for name in self.architectures or []):
            written["id2label"] = self.id2label
            written["label2id"] = self.label2id or {name: index for index, name in self.id2label.items()}
        return written

    def validate_token_ids(self) -> None:
        """Check that the padding token is in the vocabulary."""
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is not in the vocabulary of vocab_size={self.vocab_size} tokens. "
                f"Use an integer from 0 to {self.vocab_size - 1}, or None."
            )

    def validate_hidden_sizes(self) -> None:
        """Check that the widths of the stored layers fit the model's other sizes."""
        heads, full = self.num_attention_heads, self.hidden_size
        if full % heads:
            raise ValueError(f"hidden_size={full} is not divisible by num_attention_heads={heads}.")
        if self.hidden_sizes is None or len(self.hidden_sizes) != self.num_hidden_layers:
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes} must list one width for each of the "
                f"num_hidden_layers={self.num_hidden_layers} layers."
            )
        for width in self.hidden_sizes:
            if not 0 < width <= full or width % heads:
                raise ValueError(
                    f"hidden_sizes={self.hidden_sizes}: {width} must be a positive multiple of "
                    f"num_attention_heads={heads} and at most hidden_size={full}."
                )
        if not self.merged_bottlenecks and set(self.hidden_sizes) != {full}:
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes}: a supernet (merged_bottlenecks=False) has every layer at "
                f"hidden_size={full}. Cut a narrower model out of it with extract_subnet(shape)."
            )

    def validate_bottlenecks(self) -> None:
        """Check that a subnet has nothing that only a supernet can have."""
        if self.merged_bottlenecks and (self.bottlenecks != "shared" or self.full_head_scale):
            raise ValueError(
                f"bottlenecks={self.bottlenecks!r}, full_head_scale={self.full_head_scale}: a subnet "
                "(merged_bottlenecks=True) has bottlenecks='shared' and full_head_scale=False. Both are properties of "
                "a supernet."
            )

    def validate_width_choices(self) -> None:
        """Check that the width choices are increasing, divisible by the heads, and end at the full width."""
        choices, heads = self.width_choices, self.num_attention_heads
        if self.merged_bottlenecks:
            if choices is not None:
                raise ValueError(f"width_choices={choices}: a subnet (merged_bottlenecks=True) has no width choices.")
            return
        if not choices:
            raise ValueError(f"width_choices={choices} is empty. Leave it out to get the default choices.")
        if any(second <= first for first, second in itertools.pairwise(choices)):
            raise ValueError(
                f"width_choices={choices} must be strictly increasing. Use {sorted(set(choices))} instead."
            )
        if choices[-1] != self.hidden_size:
            raise ValueError(
                f"width_choices={choices} must end with hidden_size={self.hidden_size}, so that the full supernet is "
                "one of its own shapes."
            )
        misfits = [width for width in choices if width <= 0 or width % heads]
        if misfits:
            raise ValueError(
                f"width_choices={choices}: {misfits} must be positive multiples of num_attention_heads={heads}."
            )

    def normalize_shape(self, shape: Sequence[int]) -> list[int]:
        """Return `shape` as a list of Python integers, or raise an error if this supernet cannot take it.

        Args:
            shape: One hidden size per layer out of `width_choices`; 0 drops the layer. It can be a list, a tuple or an
                integer array.

        Raises:
            TypeError: If `shape` is not a sequence of integers.
            ValueError: If the model is a subnet, or the length or a width is not allowed.

        Example:
            >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2)
            >>> config.normalize_shape((40, 0))
            [40, 0]
        """
        if self.width_choices is None:
            raise ValueError(
                f"shape={shape} was given to a subnet with fixed hidden_sizes={self.hidden_sizes}: it is not elastic. "
                "Pass shape to the supernet it was cut from, or leave it out."
            )
        allowed = f"Allowed: {self.width_choices}, or 0 to drop the layer."
        ordered = hasattr(shape, "__getitem__") and getattr(shape, "ndim", 1) > 0 and not isinstance(shape, Mapping)
        if isinstance(shape, (str, bytes)) or not ordered:
            raise TypeError(f"shape={shape!r} must be a list of {self.num_hidden_layers} integers. {allowed}")
        if len(shape) != self.num_hidden_layers:
            raise ValueError(
                f"shape={_as_list(shape)} has {len(shape)} widths, but the supernet has {self.num_hidden_layers} "
                f"layers: give one width for each. {allowed}"
            )
        widths = [_as_width(width, layer, allowed) for layer, width in enumerate(shape, start=1)]
        for layer, width in enumerate(widths, start=1):
            if width != 0 and width not in self.width_choices:
                reason = self._why_not(width)
                raise ValueError(f"shape={widths}: width {width} of layer {layer} {reason}. {allowed}")
        if not any(widths):
            raise ValueError(f"shape={widths} drops every layer: at least one layer must stay. {allowed}")
        return widths

    def has_own_maps(self, width: int) -> bool:
        """Return whether a layer has linear maps that only this width uses; the full width never has."""
        return self.bottlenecks == "by_width" and width < self.hidden_size

    def subnet_config(self, shape: Sequence[int]) -> "SuperShaperConfig":
        """Return the configuration of the subnet cut at `shape`. It has the kept layers only, and the same labels.

        Raises:
            TypeError: If `shape` is not a sequence of integers.
            ValueError: If `shape` is not allowed: see `normalize_shape`.

        Example:
            >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2)
            >>> config.subnet_config([40, 0]).hidden_sizes
            [40]
        """
        config = copy.deepcopy(self)
        config.hidden_sizes = [width for width in self.normalize_shape(shape) if width]
        config.num_hidden_layers = len(config.hidden_sizes)
        config.width_choices = None
        config.merged_bottlenecks = True
        config.bottlenecks, config.full_head_scale = "shared", False  # both are merged into the weights
        config.validate()
        return config

    def _why_not(self, width: int) -> str:
        if width < 0:
            return "is negative"
        if width > self.hidden_size:
            return f"is above hidden_size={self.hidden_size}"
        if width % self.num_attention_heads:
            return f"is not divisible by num_attention_heads={self.num_attention_heads}"
        return "is not one of the width choices"


def _as_list(shape: Any) -> Any:
    return shape.tolist() if hasattr(shape, "tolist") else list(shape)


def _as_width(width: Any, layer: int, allowed: str) -> int:
    """Return an integer, of Python or NumPy, as int. Raise a TypeError for a bool, a float or a string."""
    try:
        if isinstance(width, bool) or str(getattr(width, "dtype", "")) in ("bool", "torch.bool"):
            raise TypeError
        return operator.index(width)
    except TypeError:
        kind = type(width).__name__
        raise TypeError(f"shape: the width of layer {layer} is {width!r} ({kind}), not an integer. {allowed}") from None


__all__ = ["SuperShaperConfig"]
