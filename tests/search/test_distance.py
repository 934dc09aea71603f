"""The distance to the original: its definition, the models that it takes, and the records that it leaves."""

import itertools
import json
import math
from functools import partial

import pytest
import torch
from conftest import randomize, tiny_bert_config, tiny_model
from datasets import concatenate_datasets
from test_evaluation import SHAPES, Rank
from texts import random_documents
from transformers import BertForMaskedLM, BertModel

from supershaper_hf import SuperShaperForMultipleChoice, SuperShaperModel
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.search import evaluation
from supershaper_hf.search.evaluation import evaluate_shapes
from supershaper_hf.search.fingerprints import fingerprint_encoder
from supershaper_hf.search.records import read_records, to_line


@pytest.fixture
def batches(tokenizer):
    """Batches without masks, of unequal size: 3 sequences each, the last of 1. Some sequences have padding."""
    text = concatenate_datasets([random_documents(2, words) for words in range(5, 11)])
    sequences = tokenize(text, tokenizer, max_length=12).select(range(10))
    found = fixed_masks(sequences, tokenizer, batch_size=3, mlm_probability=0)
    assert any((batch["attention_mask"] == 0).any() for batch in found)
    return found


def measure(model, batches, shapes=SHAPES, **options):
    return evaluate_shapes(model, batches, shapes, measure="distance", **options)


measure_distance = measure


@torch.no_grad()
def by_hand(model, original, batches, shape):
    """The definition, on one sequence at a time without padding."""
    encode, expected = model.base_model.double(), original.base_model.double()
    pairs = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            tokens = ids[mask.bool()][None]
            pairs.append([encode(tokens, shape=shape).last_hidden_state[0], expected(tokens).last_hidden_state[0]])
    states, targets = (torch.cat(each) for each in zip(*pairs, strict=True))
    error, spread = (states - targets).square().sum(), (targets - targets.mean(0)).square().sum()
    cosines = [torch.cosine_similarity(state.mean(0), target.mean(0), dim=0).item() for state, target in pairs]
    return (error / spread).item(), sum(cosines) / len(cosines)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_figures_are_those_of_the_definition(batches, shape, model_class):
    """For every head, and for none."""
    original = randomize(BertModel(tiny_bert_config()), seed=1)
    record = measure(tiny_model(model_class), batches, shape, original=original)
    error, cosine = by_hand(tiny_model(model_class), original, batches, shape)
    assert record == {
        "shape": shape,
        "distance": pytest.approx(error, rel=1e-5),
        "cosine": pytest.approx(cosine, abs=1e-6),
    }


def test_the_original_has_distance_0(batches, model_class):
    """By default the original is the largest shape."""
    largest, narrow = measure(tiny_model(model_class), batches, [None, SHAPES[1]])
    assert (largest["distance"], largest["cosine"]) == (0.0, pytest.approx(1.0))
    assert narrow["distance"] > 0.01
    assert narrow["cosine"] < 0.99


@torch.no_grad()
def test_the_same_guess_for_every_token_has_distance_1(batches):
    model, original = tiny_model(SuperShaperModel), randomize(BertModel(tiny_bert_config()), seed=1)
    states = [original(b["input_ids"], b["attention_mask"]).last_hidden_state for b in batches]
    tokens = [state[batch["attention_mask"].bool()] for state, batch in zip(states, batches, strict=True)]
    bottleneck = model.encoder.output_bottleneck[-1]
    bottleneck.weight.zero_()
    bottleneck.bias.copy_(torch.cat(tokens).mean(0))
    assert measure(model, batches, SHAPES[1], original=original)["distance"] == pytest.approx(1.0)


@pytest.mark.parametrize("bert_class", [BertModel, BertForMaskedLM])
def test_a_supernet_is_compared_with_the_bert_that_it_was_made_of(batches, bert_class):
    bert = randomize(bert_class(tiny_bert_config()))
    supernet = SuperShaperModel.from_bert(bert, width_choices=[8, 20, 36, 48])
    with_bert = measure(supernet, batches, original=bert)
    alone = measure(supernet, batches)
    for first, second in zip(with_bert, alone, strict=True):
        assert first["distance"] == pytest.approx(second["distance"], abs=1e-6)
        assert first["cosine"] == pytest.approx(second["cosine"], abs=1e-6)


def test_another_supernet_can_be_the_original(batches):
    model, other = tiny_model(), randomize(tiny_model(SuperShaperForMultipleChoice), seed=1)
    error, cosine = by_hand(tiny_model(), other, batches, SHAPES[1])
    record = measure(model, batches, SHAPES[1], original=other.float())
    assert (record["distance"], record["cosine"]) == (pytest.approx(error, rel=1e-5), pytest.approx(cosine))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_supernet_at_a_shape_equals_the_subnet(batches, shape):
    model = tiny_model(SuperShaperModel)
    of_supernet = measure(model, batches, shape, original=model)
    (of_subnet,) = measure(model.extract_subnet(shape), batches, [None], original=model)
    assert of_subnet["distance"] == pytest.approx(of_supernet["distance"], abs=1e-5)
    assert of_subnet["cosine"] == pytest.approx(of_supernet["cosine"], abs=1e-5)


def test_labels_are_ignored_and_token_types_are_not(batches):
    model = tiny_model()
    expected = measure(model, batches)
    assert measure(model, [{**batch, "labels": batch["input_ids"]} for batch in batches]) == expected
    inputs = ("input_ids", "attention_mask")
    assert measure(model, [{name: batch[name] for name in inputs} for batch in batches]) == expected
    assert measure(model, [{**batch, "token_type_ids": batch["attention_mask"]} for batch in batches]) != expected


def test_a_sequence_of_padding_does_not_count(batches):
    empty = {name: torch.cat([tensor, torch.zeros_like(tensor[:1])]) for name, tensor in batches[0].items()}
    for found, expected in zip(measure(tiny_model(), [empty]), measure(tiny_model(), batches[:1]), strict=True):
        assert found == {"shape": expected["shape"]} | {
            key: pytest.approx(expected[key], rel=1e-6) for key in ("distance", "cosine")
        }


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_dropout_is_off_and_modes_stay(batches, training):
    options = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model, original = tiny_model(**options), randomize(BertModel(tiny_bert_config(**options)), seed=1)
    expected = measure(model, batches, original=original)
    assert measure(model.train(training), batches, original=original.train(training)) == expected
    assert {module.training for each in (model, original) for module in each.modules()} == {training}


# States that are kept


@pytest.mark.parametrize(("kept", "passes"), [(4, 4), (0, 12), (2, 8)])
def test_states_of_the_original_are_kept_where_there_is_memory(batches, monkeypatch, kept, passes):
    """Four batches: the original runs once on each to know its mean, and again for both shapes unless it is kept."""
    model, original, seen = tiny_model(), randomize(BertModel(tiny_bert_config()), seed=1), []
    expected = measure(model, batches, SHAPES[1:], original=original)
    original.register_forward_hook(lambda *_: seen.append(1))
    tokens = sum(batch["input_ids"].numel() for batch in batches[:kept])
    monkeypatch.setattr(evaluation, "KEPT_BYTES", 4 * 48 * tokens)
    assert measure(model, batches, SHAPES[1:], original=original) == expected
    assert len(seen) == passes


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_process_keeps_as_many_states(batches, monkeypatch, processes):
    """Else one would wait for the others under FSDP. Together they keep no more than one process may."""
    size = [4 * 48 * batch["input_ids"].numel() for batch in batches]
    sums = list(itertools.accumulate(size))
    for limit in [
        0,
        48,
        *(total + change for total in sums for change in (-48, 0)),
        *range(0, sums[-1], sums[-1] // 40),
    ]:
        monkeypatch.setattr(evaluation, "KEPT_BYTES", limit)
        ranks = [
            evaluation.Evaluation(tiny_model(), batches, Rank(rank, processes), "distance") for rank in range(processes)
        ]
        (kept,) = {rank.original.kept for rank in ranks}
        assert sum(size[: kept * processes]) <= limit
        assert (kept == math.ceil(4 / processes)) == (limit == sum(size))


# Several processes


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("processes", [1, 2, 3, 5, 7])
def test_processes_share_the_batches(batches, processes, layers):
    """Bit for bit, whoever has which batch."""
    measure = partial(measure_distance, layers=layers)
    model, original = tiny_model(), randomize(BertModel(tiny_bert_config()), seed=1)
    ranks = [Rank(rank, processes) for rank in range(processes)]
    with pytest.MonkeyPatch.context() as patch:  # what a rank gives to the others is known before the others are
        patch.setattr(
            evaluation.Evaluation,
            "spreads",
            property(lambda self: [float(len(self.gather(self.original.moments)))] * (3 if layers == "all" else 1)),
        )
        for rank in ranks:
            measure(model, batches, SHAPES[1], original=original, accelerator=rank)
    together = [
        measure(model, batches, SHAPES[1], original=original, accelerator=Rank(rank, processes, ranks))
        for rank in range(processes)
    ]
    assert together == [measure(model, batches, SHAPES[1], original=original)] * processes


def test_sums_are_rounded_once_after_adding(batches):
    """So the result cannot depend on the order in which batches are added."""
    model, original = tiny_model(), randomize(BertModel(tiny_bert_config()), seed=1)
    expected = measure(model, batches, SHAPES[1], original=original)
    for order in itertools.permutations(batches):
        assert measure(model, order, SHAPES[1], original=original) == expected


# The states of all layers


@torch.no_grad()
def by_hand_in_all_layers(model, bert, batches, shape):
    """The definition, without padding. A layer hands on what the model returns if it drops all layers above it."""
    model, bert, ratios = model.base_model.double(), bert.double(), []
    sequences = [ids[mask.bool()][None] for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"])]
    for index in range(len(shape)):
        below = [*shape[: index + 1], *[0] * (len(shape) - index - 1)]

        def run(ids, below=below):
            return model(ids, shape=below).last_hidden_state if any(below) else model.embeddings(ids, None, None, None)

        states = torch.cat([run(ids)[0] for ids in sequences])
        targets = torch.cat([bert(ids, output_hidden_states=True).hidden_states[index + 1][0] for ids in sequences])
        ratios.append((states - targets).square().sum() / (targets - targets.mean(0)).square().sum())
    return sum(ratios).item() / len(ratios)


@pytest.mark.parametrize("shape", [*SHAPES[1:], [0, 20, 36], [20, 0, 0], [48, 48, 48]], ids=str)
def test_distance_of_all_layers_is_the_mean_over_the_layers(batches, shape, elasticity):
    bert = randomize(BertModel(tiny_bert_config()), seed=1)
    model = tiny_model(SuperShaperModel, **elasticity)
    record = measure(model, batches, shape, original=bert, layers="all")
    assert record["cosine"] == measure(model, batches, shape, original=bert)["cosine"]
    assert record["distance"] == pytest.approx(by_hand_in_all_layers(model, bert, batches, shape), rel=1e-5)


def test_all_layers_are_compared_under_any_head(batches, model_class):
    bert = randomize(BertModel(tiny_bert_config()), seed=1)
    record = measure(tiny_model(model_class), batches, SHAPES[1], original=bert, layers="all")
    expected = by_hand_in_all_layers(tiny_model(model_class), bert, batches, SHAPES[1])
    assert record["distance"] == pytest.approx(expected, rel=1e-5)


def test_a_supernet_is_its_own_original_in_all_layers(batches):
    """The largest shape by default, and a supernet that is given."""
    model = tiny_model()
    largest, narrow = measure(model, batches, [None, SHAPES[1]], layers="all")
    assert largest["distance"] == 0
    assert narrow["distance"] > 0.01
    assert measure(model, batches, SHAPES[1], original=tiny_model(), layers="all") == narrow


def test_early_layers_count_in_all_layers(batches):
    """Two shapes with the same last layer: what is lost in between, the last states alone may not show."""
    bert = randomize(BertModel(tiny_bert_config()))
    model = SuperShaperModel.from_bert(bert, width_choices=[8, 20, 36, 48])
    with torch.no_grad():
        for parameter in model.encoder.layer[2].parameters():
            parameter.zero_()  # whatever comes in, the last layer returns the same
    for layers, differ in (("last", False), ("all", True)):
        first, second = measure(model, batches, [[48, 48, 48], [8, 8, 48]], original=bert, layers=layers)
        assert (abs(first["distance"] - second["distance"]) > 0.01) == differ


def test_what_has_no_states_of_all_layers_is_refused(batches):
    model = tiny_model(SuperShaperModel)
    with pytest.raises(ValueError, match=r"This is a subnet with hidden_sizes=\[8, 20, 36\].*Measure its shape in the"):
        measure(model.extract_subnet([8, 20, 36]), batches, [None], layers="all")
    with pytest.raises(ValueError, match=r"This is a subnet.*Measure its shape in the"):
        measure(model, batches, original=model.extract_subnet([48, 48, 48]), layers="all")
    with pytest.raises(ValueError, match=r"The original has num_hidden_layers=2.*it has other layers"):
        measure(model, batches, original=BertModel(tiny_bert_config(num_hidden_layers=2)), layers="all")
    with pytest.raises(ValueError, match=r"layers='first' is unknown\. Allowed: 'last', 'all'"):
        measure(model, batches, layers="first")
    with pytest.raises(ValueError, match=r"layers='all' is for measure=\"distance\" only"):
        evaluate_shapes(tiny_model(), batches, SHAPES, layers="all")
    next(model.parameters()).full_tensor = None  # as those that FSDP divides
    with pytest.raises(ValueError, match='layers="all" needs all weights on every process'):
        measure(model, batches, layers="all")


def test_distances_of_other_layers_are_not_mixed_in_a_file(batches, tmp_path):
    model, file = tiny_model(), tmp_path / "records.jsonl"
    records = measure(model, batches, records_file=file, layers="all")
    assert header_of(file)["layers"] == "all"
    assert measure(model, batches, records_file=file, layers="all") == records == read_records(file)
    with pytest.raises(ValueError, match="holds records of the distance of other layers: layers is all there, last"):
        measure(model, batches, records_file=file)


def test_older_files_hold_the_distance_of_the_last_layer(batches, tmp_path):
    model, file = tiny_model(), tmp_path / "records.jsonl"
    measure(model, batches, records_file=file)
    first, *rest = file.read_text().splitlines()
    header = {key: value for key, value in json.loads(first).items() if key not in ("layers", "checksum")}
    file.write_text("\n".join([to_line(header).strip(), *rest, ""]))
    assert len(measure(model, batches, records_file=file)) == 3
    with pytest.raises(ValueError, match="holds records of the distance of other layers"):
        measure(model, batches, records_file=file, layers="all")


# Records


def header_of(file):
    return json.loads(file.read_text().splitlines()[0])


def test_records_are_kept_with_their_measure(batches, tmp_path):
    model, original = tiny_model(), randomize(BertModel(tiny_bert_config()), seed=1)
    file = tmp_path / "records.jsonl"
    records = measure(model, batches, original=original, records_file=file)
    assert read_records(file) == records == measure(model, batches, original=original, records_file=file)
    header = header_of(file)
    assert (header["measure"], header["original"]) == ("distance", fingerprint_encoder(original))
    assert header["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches)


def test_file_of_another_measure_or_original_is_refused(batches, tmp_path, tokenizer):
    model, file = tiny_model(), tmp_path / "records.jsonl"
    measure(model, batches, records_file=file)
    with pytest.raises(ValueError, match="holds records of another measure: measure is distance there, loss here"):
        evaluate_shapes(model, [batch | {"labels": batch["input_ids"]} for batch in batches], SHAPES, records_file=file)
    other = randomize(tiny_model(), seed=1)
    with pytest.raises(ValueError, match="holds records of the distance to another original"):
        measure(model, batches, original=other, records_file=file)
    assert len(measure(model, batches, original=model, records_file=file)) == 3  # the same original, by name


def test_heads_and_poolers_do_not_count_in_a_file_of_distances(batches, tmp_path, model_class):
    """They may be random: a checkpoint that has none gets new ones whenever it is loaded."""
    file, bert = tmp_path / "records.jsonl", randomize(BertModel(tiny_bert_config()), seed=1)
    first = measure(tiny_model(), batches, original=bert, records_file=file)
    model = model_class(tiny_model().config)
    model.base_model.load_state_dict(tiny_model().base_model.state_dict(), strict=False)
    torch.nn.init.normal_(bert.pooler.dense.weight)
    assert measure(model, batches, [*SHAPES, [8, 8, 8]], original=bert, records_file=file)[:3] == first
    with torch.no_grad():
        model.base_model.embeddings.word_embeddings.weight[7] += 1
    with pytest.raises(ValueError, match="another model"):
        measure(model, batches, original=bert, records_file=file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"distance": -0.5}, r"distance -0\.5 is below 0"),
        ({"distance": None}, "distance None is not a number"),
        ({"distance": True}, "distance True is not a number"),
        ({"cosine": 1.5}, r"cosine 1\.5 is not a number from -1 to 1"),
        ({"cosine": None}, "cosine None is not a number"),
        ({"loss": 1.0}, "not an object with shape, distance, cosine"),
    ],
)
def test_line_that_is_no_distance_is_named_and_left_out(batches, tmp_path, change, reason):
    """Whatever has written it also wrote the checksum."""
    file = tmp_path / "records.jsonl"
    records = measure(tiny_model(), batches, records_file=file)
    header, first, *lines = file.read_text().splitlines()
    content = json.loads(first) | change
    del content["checksum"]
    file.write_text("\n".join([header, to_line(content).strip(), *lines, ""]))
    with pytest.warns(UserWarning, match=rf"line 2 \({reason}"):
        assert read_records(file) == records[1:]


@pytest.mark.parametrize("change", [{"measure": "accuracy"}, {"measure": []}, {"measure": "loss"}, {"original": None}])
def test_header_with_a_measure_that_cannot_be_is_refused(batches, tmp_path, change):
    file = tmp_path / "records.jsonl"
    measure(tiny_model(), batches, records_file=file)
    header, *lines = file.read_text().splitlines()
    content = json.loads(header) | change
    del content["checksum"]
    file.write_text("\n".join([to_line(content).strip(), *lines, ""]))
    with pytest.raises(ValueError, match="does not begin with a valid header"):
        read_records(file)


def test_file_without_a_measure_holds_losses(batches, tmp_path):
    """As all files did before there was another measure."""
    model, file = tiny_model(), tmp_path / "records.jsonl"
    labelled = [batch | {"labels": batch["input_ids"]} for batch in batches]
    records = evaluate_shapes(model, labelled, SHAPES, records_file=file)
    header, *lines = file.read_text().splitlines()
    content = {
        name: value for name, value in json.loads(header).items() if name not in ("measure", "original", "checksum")
    }
    file.write_text("\n".join([to_line(content).strip(), *lines, ""]))
    assert evaluate_shapes(model, labelled, SHAPES, records_file=file) == read_records(file) == records


def test_states_that_are_not_finite_have_a_record(batches, tmp_path):
    """A shape that overflows: its record is null in the file, and comes back."""
    model, file = tiny_model(), tmp_path / "records.jsonl"
    original = randomize(BertModel(tiny_bert_config()), seed=1)
    with torch.no_grad():
        model.bert.encoder.output_bottleneck[-1].bias[0] = math.inf
    records = measure(model, batches, original=original, records_file=file)
    assert {record["distance"] for record in records} == {math.inf}
    assert repr(read_records(file)) == repr(records)


# Errors


def test_loss_of_a_model_without_a_masked_lm_head_is_refused(batches):
    with pytest.raises(ValueError, match=r'SuperShaperModel has no masked-LM head.*Use measure="distance"'):
        evaluate_shapes(tiny_model(SuperShaperModel), batches, SHAPES)


def test_unknown_measure_is_refused(batches):
    with pytest.raises(ValueError, match=r"measure='perplexity' is unknown\. Allowed: 'loss', 'distance'"):
        evaluate_shapes(tiny_model(), batches, SHAPES, measure="perplexity")


def test_original_of_a_loss_is_refused(batches):
    with pytest.raises(ValueError, match='for measure="distance" only'):
        evaluate_shapes(tiny_model(), batches, SHAPES, original=tiny_model())


@pytest.mark.parametrize(("changes", "words"), [({"hidden_size": 96}, "hidden_size=96"), ({"vocab_size": 7}, "tokeni")])
def test_original_of_another_size_is_refused(batches, changes, words):
    with pytest.raises(ValueError, match=f"The original has .*{words}.*Give the BERT that"):
        measure(tiny_model(), batches, original=BertModel(tiny_bert_config(**changes)))


def test_name_of_an_original_is_refused(batches):
    with pytest.raises(TypeError, match=r"original='bert' is not a model\. Load it with AutoModel\.from_pretrained"):
        measure(tiny_model(), batches, original="bert")


def test_text_without_a_token_is_refused(batches):
    with pytest.raises(ValueError, match="no token that is not padding"):
        measure(tiny_model(), [{**batches[0], "attention_mask": torch.zeros_like(batches[0]["attention_mask"])}])


def test_original_that_says_nothing_is_refused(batches):
    with pytest.raises(ValueError, match="of the original are all the same"):
        measure(tiny_model(), [{name: tensor[:1, :1] for name, tensor in batches[0].items()}])
    original = BertModel(tiny_bert_config())
    with torch.no_grad():
        original.embeddings.LayerNorm.bias[0] = math.nan
    with pytest.raises(ValueError, match="of the original are not finite"):
        measure(tiny_model(), batches, original=original)
