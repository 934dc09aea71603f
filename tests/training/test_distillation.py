import doctest
import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from conftest import assert_same, randomize, tiny_batch, tiny_model
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    GPT2Config,
    GPT2Model,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.modeling_outputs import MaskedLMOutput

from supershaper_hf import SuperShaperForMaskedLM, SuperShaperModel
from supershaper_hf.training import distillation
from supershaper_hf.training.distillation import (
    Largest,
    LayerActivations,
    Objective,
    alpha_divergence,
    attention_loss,
    pooled_loss,
    relation_loss,
    soft_cross_entropy,
    state_loss,
    watch_layers,
    watch_state,
)
from supershaper_hf.training.sandwich import sandwich_step
from supershaper_hf.training.teacher import OutsideTeacher


FULL, NARROW, DROPPED = [48, 48, 48], [20, 36, 8], [8, 0, 36]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def softmax(scores):
    return [math.exp(score) / sum(map(math.exp, scores)) for score in scores]


def labelled_batch(**kwargs):
    """A batch in which every second real token is labelled."""
    batch = tiny_batch(**kwargs)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, ::2] = -100
    return batch


def test_examples_run():
    results = doctest.testmod(distillation)
    assert results.failed == 0
    assert results.attempted > 0


def all_hooks(model):
    """Return the identifiers of all hooks."""
    return [key for module in model.modules() for key in (*module._forward_hooks, *module._forward_pre_hooks)]


class TestWatchLayers:
    @pytest.mark.parametrize("shape", [FULL, NARROW, DROPPED])
    def test_keeps_what_the_subnet_computes(self, elasticity, shape):
        """In a subnet the projections run as modules of their own, so hooks on them see the real thing."""
        supernet, batch = tiny_model(**elasticity), tiny_batch()
        subnet = supernet.extract_subnet(shape)
        seen = []
        for layer in subnet.bert.encoder.layer:
            attention = layer.attention.self
            for module in (attention.query, attention.key, attention.value, layer):
                module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        subnet(**batch)
        with watch_layers(supernet, range(3)) as activations:
            supernet(**batch, shape=shape)
        assert list(activations) == [layer for layer, width in enumerate(shape) if width]
        actual = [x for layer in activations.values() for x in (layer.query, layer.key, layer.value, layer.state)]
        assert_same(actual, seen)

    def test_subnet(self):
        supernet, batch = tiny_model(), tiny_batch()
        subnet = supernet.extract_subnet(DROPPED)
        with watch_layers(supernet, [2]) as expected:
            supernet(**batch, shape=DROPPED)
        with watch_layers(subnet, [1]) as activations:
            subnet(**batch)
        assert_same(vars(activations[1]), vars(expected[2]))
        assert activations[1].num_heads == 4

    @pytest.mark.parametrize("shape", [FULL, NARROW, DROPPED])
    def test_attention_views_give_the_models_attention(self, elasticity, shape):
        model, batch = tiny_model(**elasticity, attn_implementation="eager"), tiny_batch()
        with watch_layers(model, [0, 1, 2]) as activations:
            attentions = model(**batch, shape=shape, output_attentions=True).attentions
        for layer, expected in zip(activations.values(), attentions, strict=True):
            query, key = layer.attention()
            scores = query @ key.mT / math.sqrt(query.shape[-1])
            scores = scores.masked_fill(batch["attention_mask"][:, None, None] == 0, -math.inf)
            assert_same(scores.softmax(-1), expected)

    @pytest.mark.parametrize("layers", [None, []])
    def test_nothing_asked_for_costs_nothing(self, layers):
        model = tiny_model()
        with watch_layers(model, layers) as activations:
            assert all_hooks(model) == []
            model(**tiny_batch())
        assert activations == {}

    def test_only_the_layers_asked_for(self):
        model = tiny_model()
        with watch_layers(model, [1]) as activations:
            model(**tiny_batch())
        assert list(activations) == [1]

    def test_hooks_are_removed(self):
        model = tiny_model()
        before = all_hooks(model)
        with watch_layers(model, [0, 1, 2]):
            assert len(all_hooks(model)) == len(before) + 6
        assert all_hooks(model) == before
        with pytest.raises(KeyboardInterrupt), watch_layers(model, [0, 1, 2]):
            raise KeyboardInterrupt
        assert all_hooks(model) == before

    def test_wrapped_model(self):
        model, batch = tiny_model(), tiny_batch()
        with watch_layers(nn.ModuleDict({"module": model}), [2]) as activations:
            model(**batch)
        assert list(activations) == [2]

    def test_other_models_are_refused(self):
        with pytest.raises(ValueError, match=r"Linear has no SuperShaperEncoder\. Give a SuperShaper model\."):
            watch_layers(nn.Linear(2, 2), [0]).__enter__()

    def test_watching_changes_neither_outputs_nor_dropout(self):
        model, batch = tiny_model().train(), labelled_batch()
        losses = []
        for layers in ([], [0, 1, 2]):
            torch.manual_seed(1)
            with watch_layers(model, layers):
                losses.append(model(**batch, shape=NARROW).loss)
        assert_same(*losses, atol=0)

    def test_gradients_flow_through_attention(self, head_slicing):
        """Against the divergence of the attention that the model itself returns."""
        model = tiny_model(head_slicing=head_slicing, attn_implementation="eager")
        batch = tiny_batch()
        teacher = model(**batch, output_attentions=True).attentions[0].detach()
        with watch_layers(model, [0]) as largest:
            model(**batch)
        model.zero_grad()
        student = model(**batch, shape=NARROW, output_attentions=True).attentions[0]
        real = batch["attention_mask"].bool()
        terms = (torch.xlogy(teacher, teacher) - torch.xlogy(teacher, student.clamp(min=1e-30))).sum(-1).mean(1)
        expected = gradients(model, terms[real].mean())
        with watch_layers(model, [0]) as activations:
            model(**batch, shape=NARROW)
        loss = attention_loss([activations[0].attention()], [largest[0].attention()], batch["attention_mask"])
        assert_same(gradients(model, loss), expected, atol=1e-6)

    def test_gradients_flow_through_states(self):
        model, batch = tiny_model(), tiny_batch()
        expected = gradients(
            model, model(**batch, shape=NARROW, output_hidden_states=True).hidden_states[2].square().sum()
        )
        with watch_layers(model, [1]) as activations:
            model(**batch, shape=NARROW)
        assert_same(gradients(model, activations[1].state.square().sum()), expected, atol=1e-5)


class TestWatchState:
    @pytest.mark.parametrize("shape", [None, NARROW, [8, 20, 0]], ids=str)
    def test_keeps_what_the_bare_model_returns(self, model_class, shape):
        model, batch = tiny_model(model_class), tiny_batch(model_class)
        with watch_state(nn.ModuleDict({"module": model})) as states:
            model(**batch, shape=shape)
        inputs = {name: tensor.flatten(0, -2) for name, tensor in batch.items()}
        assert_same(states, [model.base_model(**inputs, shape=shape).last_hidden_state], atol=0)

    def test_nothing_asked_for_costs_nothing(self):
        model = tiny_model()
        with watch_state(model, False) as states:
            assert all_hooks(model) == []
            model(**tiny_batch())
        assert states == []

    def test_hook_is_removed(self):
        model = tiny_model()
        before = all_hooks(model)
        with watch_state(model):
            assert len(all_hooks(model)) == len(before) + 1
        assert all_hooks(model) == before
        with pytest.raises(KeyboardInterrupt), watch_state(model):
            raise KeyboardInterrupt
        assert all_hooks(model) == before

    def test_other_models_are_refused(self):
        with pytest.raises(ValueError, match=r"Linear has no SuperShaperEncoder\. Give a SuperShaper model\."):
            watch_state(nn.Linear(2, 2)).__enter__()

    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # that nothing writes to
    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("model_class", [SuperShaperModel, SuperShaperForMaskedLM])
    def test_sharded_model_gives_the_same_gradients(self, model_class, checkpointing):
        """Nothing but the state has a loss, in bfloat16 too, where FSDP2 returns a cast copy of what the model does."""
        batch = {name: tensor for name, tensor in tiny_batch().items() if name != "token_type_ids"}
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        teacher = OutsideTeacher(randomize(BertModel(BertConfig(**{**WIDE, "hidden_size": 48})), seed=1))
        objective = Objective(teacher=teacher, state_weight=1.0, labels=False)
        results = []
        for sharded in (False, True):
            model = tiny_model(model_class, **NO_DROPOUT).train()
            checkpoint_layers(model, checkpointing)
            if sharded:
                distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
            try:
                if sharded:
                    options = {"mesh": distributed.init_device_mesh("cpu", (1,)), "reshard_after_forward": True}
                    options["mp_policy"] = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
                    for layer in model.base_model.encoder.layer:
                        fully_shard(layer, **options | {"mp_policy": MixedPrecisionPolicy()})
                    fully_shard(model, **options)
                sandwich_step(Accelerator(), model, [batch], [FULL, DROPPED], objective)
                grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                results.append({name: grad.full_tensor() if sharded else grad for name, grad in grads.items()})
            finally:
                if sharded:
                    distributed.destroy_process_group()
        assert_same(*results, atol=1e-6)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SIZES = {"vocab_size": 61, "max_position_embeddings": 24}
WIDE = {**SIZES, "hidden_size": 72, "num_hidden_layers": 5, "num_attention_heads": 6, "intermediate_size": 32}
TEACHERS = {
    "bert": (BertForMaskedLM, BertConfig(**WIDE), "bert.encoder.layer.{}.attention.self", ("query", "key", "value")),
    "roberta": (
        RobertaForMaskedLM,
        RobertaConfig(**WIDE),
        "roberta.encoder.layer.{}.attention.self",
        ("query", "key", "value"),
    ),
    "electra": (
        ElectraForMaskedLM,
        ElectraConfig(**WIDE, embedding_size=16),
        "electra.encoder.layer.{}.attention.self",
        ("query", "key", "value"),
    ),
    "distilbert": (
        DistilBertForMaskedLM,
        DistilBertConfig(**SIZES, dim=72, n_layers=5, n_heads=6, hidden_dim=32),
        "distilbert.transformer.layer.{}.attention",
        ("q_lin", "k_lin", "v_lin"),
    ),
    "mpnet": (MPNetModel, MPNetConfig(**WIDE), "encoder.layer.{}.attention.attn", ("q", "k", "v")),
}


def outside_model(family="bert"):
    model_class, config, *_ = TEACHERS[family]
    return randomize(model_class(config)).train()


class TestOutsideTeacher:
    @pytest.mark.parametrize(("layer", "index"), [(-1, 4), (-5, 0), (1, 1)])
    @pytest.mark.parametrize("family", TEACHERS)
    def test_projections_of_the_layer(self, family, layer, index):
        """The input of layer i is hidden state i; its projections are applied to it here by name."""
        model, batch = outside_model(family), tiny_batch()
        output = OutsideTeacher(model, layer)(batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
            parent = model.get_submodule(TEACHERS[family][2].format(index))
            expected = [getattr(parent, name)(states[index]) for name in TEACHERS[family][3]]
        assert output.query.shape == (2, 9, 72)
        assert_same([output.query, output.key, output.value, output.state], [*expected, states[-1]], atol=1e-6)

    def test_supershaper_teacher(self):
        model, batch = tiny_model(), tiny_batch()
        del batch["token_type_ids"]
        with watch_layers(model, [2]) as activations:
            state = model.bert(**batch).last_hidden_state
        last, output = activations[2].detach(), OutsideTeacher(model)(batch)
        expected = [last.query, last.key, last.value, state.detach()]
        assert_same([output.query, output.key, output.value, output.state], expected)

    def test_frozen_and_without_traces(self):
        model = outside_model()
        ran = []
        model.cls.register_forward_hook(lambda *args: ran.append(args))
        before = all_hooks(model)
        teacher = OutsideTeacher(model)
        tensors = vars(teacher(tiny_batch())).values()
        assert not any(module.training for module in teacher.model.modules())
        assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
        assert not any(tensor.is_inference() for tensor in tensors)  # autograd could not save such a tensor
        teacher.model.requires_grad_(True)
        assert not any(tensor.requires_grad for tensor in (*tensors, *vars(teacher(tiny_batch())).values()))
        assert all_hooks(model) == before
        assert ran == []  # the head is not needed

    def test_padding_has_no_effect(self):
        teacher, batch = OutsideTeacher(outside_model()), tiny_batch()
        changed = dict(batch, input_ids=batch["input_ids"].where(batch["attention_mask"] == 1, 7))
        real = batch["attention_mask"].bool()
        output, other = teacher(batch), teacher(changed)
        for name, tensor in vars(output).items():
            assert_same(tensor[real], getattr(other, name)[real])

    def test_moves_to_the_batch(self):
        teacher = OutsideTeacher(outside_model())
        batch = {name: tensor.to("meta") for name, tensor in tiny_batch().items()}
        with pytest.raises(RuntimeError, match="meta tensors"):  # masks are made by looking at the values
            teacher(batch)
        assert teacher.model.device.type == "meta"

    def test_cross_attention_is_no_layer(self):
        config = BertConfig(**WIDE, is_decoder=True, add_cross_attention=True)
        with pytest.raises(ValueError, match=r"layer=5: BertModel has layers 0 to 4, or -5 to -1\."):
            OutsideTeacher(BertModel(config), layer=5)

    @pytest.mark.parametrize("layer", [5, -6])
    def test_layer_out_of_range(self, layer):
        with pytest.raises(ValueError, match=rf"layer={layer}: BertForMaskedLM has layers 0 to 4, or -5 to -1\."):
            OutsideTeacher(outside_model(), layer)

    def test_unknown_architecture(self):
        model = GPT2Model(GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=1))
        with pytest.raises(ValueError, match=r"GPT2Model has no query, key and value projections .*Use a BERT"):
            OutsideTeacher(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distillation_weight": -0.1}, "distillation_weight=-0.1 must be a finite number at least 0 and at most 1."),
        ({"distillation_weight": 1.1}, "distillation_weight=1.1 must be a finite number at least 0 and at most 1."),
        (
            {"distillation_weight": math.nan},
            "distillation_weight=nan must be a finite number at least 0 and at most 1.",
        ),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number above 0."),
        ({"temperature": math.inf}, "temperature=inf must be a finite number above 0."),
        ({"divergence": "kl"}, "divergence='kl' is unknown. Allowed: 'cross_entropy', 'alpha'."),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 must be a finite number at least 0."),
        ({"attention_weight": math.nan}, "attention_weight=nan must be a finite number at least 0."),
        ({"teacher_weight": -1.0}, "teacher_weight=-1.0 must be a finite number at least 0."),
        ({"state_weight": -1.0}, "state_weight=-1.0 must be a finite number at least 0."),
        ({"pooled_weight": math.nan}, "pooled_weight=nan must be a finite number at least 0."),
        ({"pooling": "max"}, "pooling='max' is unknown. Allowed: 'mean', 'cls'."),
        ({"hidden_weight": "0.5"}, "hidden_weight='0.5' must be a finite number at least 0."),
        ({"relation_heads": 0}, "relation_heads=0 must be an integer of at least 1."),
        ({"divergence": "alpha", "temperature": 2.0}, "temperature=2.0 does not go with divergence='alpha'"),
        ({"teacher_weight": 1.0}, "teacher_weight=1.0 needs a teacher."),
        ({"state_weight": 1.0, "pooled_weight": 2.0}, "state_weight=1.0 needs a teacher."),
        ({"pooled_weight": 2.0}, "pooled_weight=2.0 needs a teacher."),
        ({"first_token_weight": 2.0}, "first_token_weight=2.0 needs a teacher."),
        (
            {"teacher": object()},
            "A teacher is given, but teacher_weight=0, state_weight=0, pooled_weight=0, first_token_weight=0.",
        ),
        ({"labels": False}, "labels=False leaves state_weight=0 nothing to report."),
        (
            {"labels": False, "teacher": object(), "state_weight": 1.0, "distillation_weight": 0.5},
            "distillation_weight=0.5 compares predictions of labelled tokens, and with labels=False there are none.",
        ),
    ],
)
def test_objective_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Objective(**values)


def test_objective_accepts_the_ends():
    Objective(distillation_weight=0, temperature=0.1, relation_heads=1)
    Objective(distillation_weight=1, divergence="alpha", temperature=1)


@pytest.fixture
def teacher():
    return OutsideTeacher(outside_model())


def losses_of(objective, output, activations, batch, largest, outside):
    """Return both parts of the loss of a shape."""
    layer_loss = objective.layer_loss(activations, batch["attention_mask"], largest, outside)
    return objective.label_loss(output, largest), layer_loss


def step(model, objective, batch, shapes, outside=None):
    """Run the shapes of a step, the largest first; return both parts of the loss of each, with their graphs."""
    largest, losses = None, []
    for shape in shapes:
        with watch_layers(model, objective.layers(shape or model.config.hidden_sizes)) as activations:
            output = model(**batch, shape=shape, sparse_prediction=True)
        losses.append(losses_of(objective, output, activations, batch, largest, outside))
        largest = Largest.of(output, activations) if largest is None and objective.in_place else largest
    return losses


def checkpoint_layers(model, on):
    for layer in model.base_model.encoder.layer:
        layer.gradient_checkpointing = on
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


class TestObjective:
    def test_in_place(self, teacher):
        assert not Objective().in_place
        assert not Objective(teacher=teacher, teacher_weight=1.0).in_place
        assert Objective(distillation_weight=0.1).in_place
        assert Objective(hidden_weight=0.1).in_place
        assert Objective(attention_weight=0.1).in_place

    def test_layers(self, teacher):
        outside = {"teacher": teacher, "teacher_weight": 1.0}
        assert Objective(distillation_weight=1.0).layers(DROPPED) == []
        assert Objective(hidden_weight=1.0).layers(DROPPED) == [0, 2]
        assert Objective(attention_weight=1.0).layers(FULL) == [0, 1, 2]
        assert Objective(**outside).layers([8, 36, 0]) == [1]
        assert Objective(**outside, hidden_weight=1.0).layers(DROPPED) == [0, 2]
        assert Objective(teacher=teacher, state_weight=1.0, pooled_weight=1.0).layers(DROPPED) == []

    def test_labels_alone(self):
        model, batch = tiny_model(), labelled_batch()
        with torch.no_grad():
            expected = model(**batch, shape=NARROW).loss
        for label_loss, layer_loss in step(model, Objective(), batch, [NARROW, NARROW]):
            assert_same(label_loss, expected, atol=1e-6)
            assert layer_loss.item() == 0
            assert layer_loss.dtype == torch.float32

    @pytest.mark.parametrize("weight", [0.3, 1.0])
    @pytest.mark.parametrize("divergence", ["cross_entropy", "alpha"])
    def test_predictions_of_the_largest(self, weight, divergence):
        model, batch = tiny_model(), labelled_batch()
        temperature = 2.0 if divergence == "cross_entropy" else 1.0
        objective = Objective(distillation_weight=weight, divergence=divergence, temperature=temperature)
        (first, _), (second, layer_loss) = step(model, objective, batch, [FULL, NARROW])
        full, narrow = (model(**batch, shape=shape) for shape in (FULL, NARROW))
        labelled = batch["labels"] != -100
        student, teacher = narrow.logits[labelled], full.logits[labelled]
        if divergence == "alpha":
            soft = alpha_divergence(student, teacher)
        else:
            soft = soft_cross_entropy(student, teacher, 2.0)
        assert_same(first, full.loss)
        assert_same(second, (1 - weight) * narrow.loss + weight * soft)
        assert layer_loss.item() == 0

    def test_states_of_the_largest(self, head_slicing):
        """A dropped layer is left out, the others are compared on their own channels."""
        model, batch = tiny_model(head_slicing=head_slicing), tiny_batch()
        batch["labels"] = batch["input_ids"]
        (_, first), (_, second) = step(model, Objective(hidden_weight=3.0), batch, [FULL, DROPPED])
        with torch.no_grad():
            # hidden_states: embeddings, the layers that ran, the last of them replaced by the encoder's output.
            states, real = {}, batch["attention_mask"].bool()
            for name, shape in (("full", FULL), ("dropped", DROPPED)):
                with watch_layers(model, [2]) as activations:
                    output = model(**batch, shape=shape, output_hidden_states=True)
                states[name] = [output.hidden_states[1][real], activations[2].state[real]]
        pairs = zip(states["dropped"], states["full"], (8, 36))
        expected = [(student - teacher[:, :width]).square().mean() for student, teacher, width in pairs]
        assert first.item() == 0
        assert_same(second, 3 * torch.stack(expected).mean())

    def test_attention_of_the_largest(self, head_slicing):
        model = tiny_model(head_slicing=head_slicing, attn_implementation="eager")
        batch = labelled_batch()
        (_, first), (_, second) = step(model, Objective(attention_weight=3.0), batch, [FULL, DROPPED])
        with torch.no_grad():
            full, dropped = (
                model(**batch, shape=shape, output_attentions=True).attentions for shape in (FULL, DROPPED)
            )
        real = batch["attention_mask"].bool()
        expected = [
            (torch.xlogy(t, t) - torch.xlogy(t, s)).sum(-1).mean(1)[real].mean()
            for t, s in ((full[0], dropped[0]), (full[2], dropped[1]))
        ]
        assert first.item() == 0
        assert_same(second, 3 * torch.stack(expected).mean())

    @pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
    @pytest.mark.parametrize("relation_heads", [None, 2])
    def test_outside_teacher(self, family, relation_heads):
        """The largest shape learns from it too, each from its last kept layer; the depths differ."""
        outside_teacher = OutsideTeacher(outside_model(family), layer=3)
        objective = Objective(teacher=outside_teacher, teacher_weight=3.0, relation_heads=relation_heads)
        model, batch = tiny_model(), labelled_batch()
        outside = outside_teacher(batch)
        losses = step(model, objective, batch, [FULL, [8, 20, 0]], outside)
        for (_, layer_loss), shape, last in zip(losses, [FULL, [8, 20, 0]], [2, 1]):
            with torch.no_grad(), watch_layers(model, [0, 1, 2]) as activations:
                model(**batch, shape=shape)
            student = [activations[last].query, activations[last].key, activations[last].value]
            # the tiny student has 4 attention heads
            taught = [outside.query, outside.key, outside.value]
            expected = relation_loss(student, taught, relation_heads or 4, batch["attention_mask"])
            assert_same(layer_loss, 3 * expected)

    def test_subnet_learns_as_the_supernet_at_its_shape(self, teacher):
        objective = Objective(teacher=teacher, teacher_weight=2.0)
        supernet, batch = tiny_model(), labelled_batch()
        outside = teacher(batch)
        subnet = supernet.extract_subnet(DROPPED)
        (expected,) = step(supernet, objective, batch, [DROPPED], outside)
        (losses,) = step(subnet, objective, batch, [None], outside)
        assert_same(losses, expected)
        grads = gradients(subnet, sum(losses))
        assert grads["bert.encoder.layer.1.attention.self.value.weight"].abs().max() > 0

    def test_terms_add_up(self, teacher):
        outside = {"teacher": teacher, "teacher_weight": 0.7}
        parts = [{"hidden_weight": 2.0}, {"attention_weight": 3.0}, outside]
        model, batch = tiny_model(), labelled_batch()
        together = {name: value for part in parts for name, value in part.items()}
        each = [step(model, Objective(**part), batch, [FULL, NARROW], teacher(batch))[1][1] for part in parts]
        all_of_them = step(model, Objective(**together), batch, [FULL, NARROW], teacher(batch))[1][1]
        assert_same(all_of_them, sum(each))

    @pytest.mark.parametrize("divergence", ["cross_entropy", "alpha"])
    def test_no_labelled_position(self, divergence):
        """The mean over none is undefined; the loop puts a 0 in its place, and it stays."""
        objective = Objective(distillation_weight=0.5, divergence=divergence)
        logits = torch.zeros(0, 7, requires_grad=True)
        output = MaskedLMOutput(loss=logits.sum(), logits=logits)
        label_loss = objective.label_loss(output, Largest.of(output, {}))
        assert label_loss.item() == 0
        label_loss.backward()

    def test_largest_is_detached(self):
        tensor = torch.zeros(1, 1, 4, requires_grad=True) * 1
        activations = {0: LayerActivations(tensor, tensor, tensor, tensor, num_heads=2)}
        largest = Largest.of(MaskedLMOutput(logits=tensor), activations)
        layer = largest.activations[0]
        tensors = [largest.logits, layer.query, layer.key, layer.value, layer.state]
        assert not any(tensor.requires_grad for tensor in tensors)
        assert layer.num_heads == 2

    def test_missing_activations(self):
        with pytest.raises(ValueError, match=r"No layer was watched\. Run the forward pass inside watch_layers"):
            Objective(hidden_weight=1.0).layer_loss({}, tiny_batch()["attention_mask"], None, None)

    def test_missing_outside(self, teacher):
        with pytest.raises(ValueError, match=r"The outside teacher's output is missing\. Pass outside="):
            step(tiny_model(), Objective(teacher=teacher, teacher_weight=1.0), labelled_batch(), [FULL])

    def test_missing_state(self, teacher):
        objective, batch = Objective(teacher=teacher, state_weight=1.0), tiny_batch()
        with pytest.raises(ValueError, match=r"No state was watched\. Run the forward pass inside watch_state"):
            objective.output_losses([], batch["attention_mask"], teacher(batch))
        with pytest.raises(ValueError, match=r"The outside teacher's output is missing\. Pass outside="):
            objective.output_losses([torch.zeros(2, 9, 72)], batch["attention_mask"], None)

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_output_losses(self, teacher, pooling):
        """The one by token without its factor, those by sequence with theirs, and 0 for what is not asked for."""
        batch, state = tiny_batch(), torch.randn(2, 9, 72)
        mask, outside = batch["attention_mask"], teacher(batch)
        by_token, pooled = state_loss(state, outside.state, mask), pooled_loss(state, outside.state, mask, pooling)
        first = state_loss(state[:, :1], outside.state[:, :1], torch.ones(2, 1))
        nothing = torch.zeros(())
        expected = {
            "state_weight": [by_token, nothing],
            "pooled_weight": [nothing, 5 * pooled],
            "first_token_weight": [nothing, 7 * first],
        }
        values = {"state_weight": 3.0, "pooled_weight": 5.0, "first_token_weight": 7.0}
        for name, losses in expected.items():
            objective = Objective(teacher=teacher, pooling=pooling, **{name: values[name]})
            assert objective.compares_outputs
            assert_same(list(objective.output_losses([state], mask, outside)), losses)
        every = Objective(teacher=teacher, pooling=pooling, **values)
        assert_same(list(every.output_losses([state], mask, outside)), [by_token, 5 * pooled + 7 * first])

    def test_checkpointing_gives_the_same_gradients(self, teacher):
        """Layers run again in backward, when the hooks are gone."""
        objective = Objective(
            distillation_weight=0.5, hidden_weight=1.0, attention_weight=1.0, teacher=teacher, teacher_weight=1.0
        )
        batch, results = labelled_batch(), []
        for checkpointing in (False, True):
            model = tiny_model(**NO_DROPOUT).train()
            checkpoint_layers(model, checkpointing)
            losses = step(model, objective, batch, [FULL, NARROW, DROPPED], teacher(batch))
            results.append(gradients(model, sum(map(sum, losses))))
        assert_same(*results, atol=1e-6)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_fully_sharded_layers_give_the_same_gradients(self, checkpointing):
        """FSDP2 frees a layer's parameters after its forward pass, whole ones exist inside of it only."""
        objective = Objective(distillation_weight=0.5, hidden_weight=1.0, attention_weight=1.0)
        batch = labelled_batch()
        plain = tiny_model(**NO_DROPOUT).train()
        losses = step(plain, objective, batch, [FULL, DROPPED])
        expected = gradients(plain, sum(map(sum, losses)))
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            sharded = tiny_model(**NO_DROPOUT).train()
            checkpoint_layers(sharded, checkpointing)
            mesh = distributed.init_device_mesh("cpu", (1,))
            for layer in sharded.bert.encoder.layer:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            fully_shard(sharded, mesh=mesh)
            largest = None
            for shape in (FULL, DROPPED):  # each backpropagated before the next one runs, as in training
                with watch_layers(sharded, objective.layers(shape)) as activations:
                    output = sharded(**batch, shape=shape, sparse_prediction=True)
                sum(losses_of(objective, output, activations, batch, largest, None)).backward()
                largest = largest or Largest.of(output, activations)
            actual = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
        finally:
            distributed.destroy_process_group()
        assert_same(actual, expected, atol=1e-6)
