"""Fine-tuning of text towers: batches of like length, decay of the words in a batch, and all that images have."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ruamel.yaml import YAML
from torch import nn
from torch.nn import functional

from modelstock.data.dataset import open_dataset
from modelstock.data.tokens import Tokenization
from modelstock.errors import DataError, ParamsError, TrainingError, WeightsError
from modelstock.merging.rules import RULES
from modelstock.models.towers import build_classifier
from modelstock.notices import Notice
from modelstock.params import ARMS, IMAGES_ALONE, load_params
from modelstock.training import resume
from modelstock.training.distributed import World
from modelstock.training.finetune import finetune_seed
from modelstock.training.inputs import read_inputs
from modelstock.training.job import Setting
from modelstock.training.periodic import Periodic
from modelstock.training.recipe import examples_of, new_run, parameter_groups
from modelstock.training.resume import ResumePoint
from modelstock.training.row_decay import decay_rows, embeddings_of
from modelstock.training.text_batches import TextBatches, length_batches, tokenised
from modelstock.training.validation import accuracy
from modelstock.weights.weight_set import load_weights
from tests.support.pretended_gpu import pretended_gpu
from tests.support.settings import full_params
from tests.support.splits import make_split
from tests.support.text_shards import make_texts
from tests.support.texts import LENGTH, VOCABULARY, Sentences, clip_text_anchor, encoder_folder, text_anchor
from tests.support.training import arm, child, equal, recipe_for, train, train_side_by_side

pytestmark = pytest.mark.filterwarnings("ignore:.*are in no feature", "ignore:.*more than .* tokens")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The anchor of a tiny BERT with dropout."""
    return text_anchor(encoder_folder(tmp_path_factory.mktemp("encoders") / "bert"))


@pytest.fixture(scope="module", params=["transformers", "open_clip"])
def start(request, bert):
    """An anchor of each kind of text tower."""
    return bert if request.param == "transformers" else clip_text_anchor()


# ---------------------------------------------------------------- batches


def test_an_epoch_by_hand():
    # 9 texts in batches of 2: 4 batches, one text left out; each stretch is of one batch (at least 4 in an epoch).
    order = np.random.default_rng([5, 3]).permutation(9)[:8]
    lengths = np.array([9, 2, 7, 4, 4, 8, 1, 3, 5])
    batches = length_batches(lengths, batch_size=2, seed=5, epoch=3)
    by_hand = {tuple(sorted(pair, key=lambda row: lengths[row])) for pair in order.reshape(4, 2).tolist()}
    assert {tuple(batch) for batch in batches.tolist()} == by_hand
    assert batches.tolist() != length_batches(lengths, batch_size=2, seed=5, epoch=4).tolist()
    assert batches.tolist() != length_batches(lengths, batch_size=2, seed=6, epoch=3).tolist()


def test_stretches_of_an_epochs_order_are_sorted_by_length_and_ties_keep_that_order():
    lengths = np.random.default_rng(0).integers(3, 30, 1000)
    steps, stretch = 1000 // 4, 50 * 4
    batches = length_batches(lengths, batch_size=4, seed=1, epoch=0)
    order = np.random.default_rng([1, 0]).permutation(1000).tolist()
    expected = set()
    for first in range(0, 4 * steps, stretch):
        rows = sorted(order[first : first + stretch], key=lambda row: lengths[row])
        expected |= {tuple(rows[place : place + 4]) for place in range(0, len(rows), 4)}
    assert {tuple(batch) for batch in batches.tolist()} == expected
    longest = lengths[batches].max(axis=1)
    assert np.abs(np.corrcoef(np.arange(steps), longest)[0, 1]) < 0.2  # no step knows the length of the next


@pytest.mark.parametrize(("count", "batch_size"), [(8, 8), (100, 8), (4097, 32)])
def test_within_an_epoch_no_text_comes_twice_and_less_than_a_batch_is_left_out(count, batch_size):
    lengths = np.random.default_rng(0).integers(3, 50, count)
    for epoch in range(3):
        rows = length_batches(lengths, batch_size=batch_size, seed=0, epoch=epoch)
        assert rows.shape == (count // batch_size, batch_size)
        assert len(set(rows.reshape(-1).tolist())) == rows.size


def test_little_is_filled_up():
    lengths = np.clip(np.random.default_rng(0).lognormal(3, 0.5, 4000).astype(int), 3, 48)
    sorted_ = lengths[length_batches(lengths, batch_size=32, seed=0, epoch=0)]
    random = lengths[np.random.default_rng(0).permutation(4000)].reshape(-1, 32)
    filled = [32 * rows.max(axis=1).sum() / rows.sum() for rows in (sorted_, random)]
    assert filled[0] < 1.1
    assert filled[1] > 1.5


def text_batches(anchor, **options):
    preprocess = anchor.meta["preprocess"]
    texts = tokenised(Sentences(40), preprocess)
    return texts, TextBatches(texts, preprocess, **{"batch_size": 8, "order_seed": 0, **options})


def test_a_step_is_the_same_wherever_a_run_begins_and_filled_up_to_its_longest_text(start):
    texts, batches = text_batches(start)
    tokenization = Tokenization.of(start.meta["preprocess"])
    whole = list(batches.load(0, 12, workers=0, pin=False))
    for step in (11, 0, 7, 5):
        _, again = text_batches(start)
        (tokens, labels), *none = again.load(step, step + 1, workers=2, pin=False)
        assert not none
        assert torch.equal(tokens, whole[step][0])
        assert torch.equal(labels, whole[step][1])
        rows = batches.rows(step)
        assert tokens.shape[1] == max(texts.lengths[rows])
        for row, filled, label in zip(rows, tokens, labels, strict=True):
            expected = tokenization(Sentences(40).texts[row])
            assert filled[: len(expected)].tolist() == expected.tolist()
            assert set(filled[len(expected) :].tolist()) <= {tokenization.pad}
            assert label == row % 2
    assert len({tokens.shape[1] for tokens, _ in whole}) > 1


def test_shares_of_a_batch_are_filled_up_alike_and_make_the_whole(start):
    _, whole = text_batches(start)
    shares = [text_batches(start, world=World(rank, 2))[1] for rank in range(2)]
    for step in range(5):
        parts = [share[step] for share in shares]
        assert torch.equal(torch.cat([tokens for tokens, _ in parts]), whole[step][0])
        assert torch.equal(torch.cat([labels for _, labels in parts]), whole[step][1])


def test_texts_that_all_fill_a_towers_length_are_not_sorted(bert):
    preprocess = {**bert.meta["preprocess"], "padding": "length"}
    texts = tokenised(Sentences(40), preprocess)
    batches = TextBatches(texts, preprocess, batch_size=8, order_seed=0)
    order = np.random.default_rng([0, 0]).permutation(40).reshape(5, 8).tolist()
    assert sorted(batches.rows(step).tolist() for step in range(5)) == sorted(order)
    assert {batches[step][0].shape[1] for step in range(5)} == {LENGTH}


def test_texts_become_tokens_once_and_a_part_has_those_of_its_rows(bert, monkeypatch):
    preprocess = bert.meta["preprocess"]
    texts = tokenised(Sentences(10), preprocess)
    assert [texts.tokens(row).tolist() for row in range(10)] == [
        Tokenization.of(preprocess)(text).tolist() for text in Sentences(10).texts
    ]
    assert texts.too_long.tolist() == [True] + [False] * 9
    part = texts.part(np.array([7, 0, 3]))
    assert [part.tokens(row).tolist() for row in range(3)] == [texts.tokens(row).tolist() for row in (7, 0, 3)]
    assert part.labels.tolist() == [1, 0, 1]
    assert part.too_long.tolist() == [False, True, False]

    asked = []
    data = Sentences()
    monkeypatch.setattr(data, "text", lambda row: asked.append(row) or data.texts[row])
    run = new_run(build_classifier(bert), tokenised(data, preprocess), recipe_for(bert), preprocess=preprocess, seed=0)
    run.train()
    assert asked == list(range(24))  # three epochs later


def test_a_text_without_a_token_is_refused(bert, monkeypatch):
    monkeypatch.setattr(Tokenization, "__call__", lambda self, text: np.empty(0, np.int64))
    with pytest.raises(DataError, match="text 0: got no token"):
        tokenised(Sentences(3), bert.meta["preprocess"])


def test_texts_that_are_not_read_to_their_end_are_a_notice_once_a_training(tmp_path, bert):
    with pytest.warns(Notice) as given:
        train(bert, tmp_path)
    (line,) = [str(one.message) for one in given if "tokens" in str(one.message)]
    assert line == ("pretrain.length: 1 of 24 training texts have more than 12 tokens; the rest of them is not read")
    with pytest.warns(Notice, match="1 of 24") as given:
        train_side_by_side(bert, tmp_path / "two", epochs=1, lawa=0)
    assert len(given) == 1


# ---------------------------------------------------------------- weight decay by row


def stepped(gradients, *, by_row, fused=False, lr=0.1, decay=0.3):
    """An embedding after AdamW's steps by these gradients."""
    weight = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    group = {"weight_decay": 0.0, "row_decay": decay} if by_row else {"weight_decay": decay}
    optimizer = torch.optim.AdamW([{"params": [weight], **group}], lr=lr, betas=(0.9, 0.98), fused=fused)
    optimizer.register_step_pre_hook(decay_rows)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


GRADIENTS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


def test_rows_that_all_have_gradients_decay_as_adamw_lets_them_bit_for_bit():
    assert torch.equal(stepped(GRADIENTS, by_row=True), stepped(GRADIENTS, by_row=False))
    torch.testing.assert_close(stepped(GRADIENTS, by_row=True, fused=True), stepped(GRADIENTS, by_row=False))


def test_a_row_decays_in_the_steps_in_which_a_gradient_came_and_one_without_stays():
    sparse = GRADIENTS.clone()
    sparse[:, 2] = 0  # never
    sparse[1, 4] = 0  # once not
    found, start = stepped(sparse, by_row=True), stepped([], by_row=True)
    assert torch.equal(found[2], start[2])
    assert not torch.equal(stepped(sparse, by_row=False)[2], start[2])
    weight, first, second = start[4].double(), torch.zeros(4).double(), torch.zeros(4).double()
    for step, gradient in enumerate(sparse[:, 4].double(), start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient**2
        weight = weight * (1 - 0.1 * 0.3 * (step != 2))
        weight -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.98**step)).sqrt() + 1e-8)
    torch.testing.assert_close(found[4].double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_float16_skips_decays_nothing(fused):
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.0, "row_decay": 0.5}], lr=0.1, fused=fused)
    optimizer.register_step_pre_hook(decay_rows)
    scaler = torch.amp.GradScaler("cpu")
    for gradient in (float("inf"), 1.0):
        scaler.scale(gradient * weight.sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert bool((weight == 1).all()) == (gradient != 1.0)


def test_words_that_no_training_text_has_stay_the_anchors_bit_for_bit_and_so_do_their_averages(tmp_path, start):
    tensors, _, averages = train(start, tmp_path, weight_decay=0.5, lr=1e-2)
    texts = tokenised(Sentences(), start.meta["preprocess"])
    words = {token for row in range(24) for token in texts.tokens(row).tolist()}
    used = {
        "text.transformer.embeddings.word_embeddings.weight": words,
        "text.transformer.embeddings.position_embeddings.weight": range(LENGTH),
        "text.transformer.embeddings.token_type_embeddings.weight": {0},
        "text.token_embedding.weight": words,
        "text.positional_embedding": range(int(texts.lengths.max())),
    }
    used = {name: rows for name, rows in used.items() if name in tensors}
    assert embeddings_of(build_classifier(start)) == used.keys()
    for result in (tensors, *averages.values()):
        for name, rows in used.items():
            moved = (start.tensors[name] != result[name]).any(axis=1)
            assert set(np.flatnonzero(moved)) == set(rows)
    assert len(words) < len(VOCABULARY)


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_every_parameter_is_in_one_group_and_embeddings_in_their_own(start, decay):
    model = build_classifier(start)
    embeddings = embeddings_of(model)
    groups = parameter_groups(model, layer_decay=1.0, weight_decay=0.1, decay=decay, by_row=embeddings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: (g["weight_decay"], g.get("row_decay")) for g in groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in groups) == len(names)
    for name, parameter in model.named_parameters():
        plain = 0.1 if decay == "all" or parameter.ndim > 1 else 0.0
        assert rates[name] == ((0.0, 0.1) if name in embeddings else (plain, None))


# ---------------------------------------------------------------- the recipe


def test_layer_decay_by_hand(start):
    model = build_classifier(start)
    groups = parameter_groups(model, layer_decay=0.5, weight_decay=0.1, decay="all")
    scales = {id(p): g["scale"] for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            expected = 0.125  # behind it are two blocks and the head
        elif "layer.0" in name or "resblocks.0" in name:
            expected = 0.25
        elif "layer.1" in name or "resblocks.1" in name:
            expected = 0.5
        else:
            expected = 1.0
        assert scales[id(parameter)] == expected, name


@pytest.mark.parametrize(
    ("name", "value"),
    [("crop_scale", (0.5, 1.0)), ("flip", True), ("rand_augment_operations", 2), ("mixup", 0.2), ("compile", True)],
)
def test_what_is_done_to_images_is_refused_for_texts_before_training(tmp_path, bert, name, value):
    with pytest.raises(TrainingError, match=f"finetune: got {name} ") as caught:
        train(bert, tmp_path, **{name: value})
    assert "\n" not in str(caught.value)
    assert f"set {name}: {IMAGES_ALONE[name]}" in str(caught.value)


def params_with(path: Path, *, texts: bool = True, **finetune):
    """A params file for a text tower, with these settings of the recipe."""
    yaml = YAML(typ="safe")
    content = yaml.load(full_params())
    content["pretrain"] = {"source": "transformers", "model": "encoder", "length": 48}
    content["pretrain"] |= {"pooling": "mean", "normalise": True, "weights": "pretrained", "seed": 0}
    content["finetune"] |= {**IMAGES_ALONE, **finetune}
    content["variants"], content["anchors"] = {}, {}
    if texts:
        content["classes"] = {"names": ["bad", "good"], "templates": ["{}"]}
        table = {"source": "texts", "labels": "classes", "text": "text", "label": "label", "duplicates": "keep"}
        roles = {"train": {}, "held-out": {}, "films": {"role": "in-distribution"}}
        content["prepare"]["splits"] = {
            name: {**table, "part": "all", "path": f"{name}.csv", **role} for name, role in roles.items()
        }
        content["evaluate"]["benchmarks"] = ["held-out", "films"]
        content["geometry"]["benchmarks"] = []
    with open(path, "w") as file:
        yaml.dump(content, file)
    return path


def test_so_it_is_when_params_are_read(tmp_path):
    path = tmp_path / "params.yaml"
    load_params(params_with(path))
    for name, value, line in [
        ("flip", True, r"finetune\.flip: False for texts \(got True\)"),
        ("crop_scale", [0.5, 1.0], r"finetune\.crop_scale: \[1\.0, 1\.0\] for texts \(got \[0\.5, 1\.0\]\)"),
        ("compile", True, r"finetune\.compile: False for texts \(got True\)"),
    ]:
        with pytest.raises(ParamsError, match=line) as caught:
            load_params(params_with(path, **{name: value}))
        assert "\n" not in str(caught.value)
    with pytest.raises(ParamsError, match=r"pretrain\.source transformers takes texts, which prepare\.splits are not"):
        load_params(params_with(path, texts=False))


def test_gradient_checkpointing_computes_activations_twice_and_changes_no_byte(tmp_path, start, monkeypatch):
    calls, norm = [], functional.layer_norm
    monkeypatch.setattr(functional, "layer_norm", lambda *inputs: (calls.append(1), norm(*inputs))[1])
    results, counts = [], []
    for on in (False, True):
        calls.clear()
        results.append(train(start, tmp_path / str(on), gradient_checkpointing=on, head_first_epochs=1)[0])
        counts.append(len(calls))
    assert equal(*results)
    assert counts[1] >= counts[0] + 9 * 4  # in 9 steps with gradients, the two norms of both blocks once more


def test_a_tower_that_cannot_compute_activations_again_is_one_line(tmp_path, start, monkeypatch):
    model = build_classifier(start)
    monkeypatch.delattr(type(model.tower), "set_grad_checkpointing")
    with pytest.raises(TrainingError, match=r"finetune\.gradient_checkpointing: got true .* set it to false"):
        train(start, tmp_path, gradient_checkpointing=True)


def test_micro_batches_have_the_gradients_of_the_whole_batch(tmp_path):
    start = clip_text_anchor()  # without dropout, which is drawn for each micro-batch
    whole, parts = (
        train(start, tmp_path / str(size), micro_batch=size, epochs=1, lawa=0, lr=1e-5)[0] for size in (None, 3)
    )
    for name, tensor in whole.items():
        moved = np.linalg.norm(tensor - start.tensors[name])
        assert np.linalg.norm(parts[name] - tensor) <= 0.05 * moved + 1e-7, name


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains_like_float32_and_keeps_float32_weights(tmp_path, start, precision):
    full, history, _ = train(start, tmp_path / "float32", lr=1e-5)
    tensors, lower, _ = train(start, tmp_path / precision, lr=1e-5, precision=precision)
    assert not equal(tensors, full)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose([r["loss"] for r in lower], [r["loss"] for r in history], rtol=0.05)


def test_a_seed_trained_twice_gives_the_same_bytes_and_dropout_is_its_own(tmp_path, bert):
    one, again, other = (
        train(bert, tmp_path / name, seed=seed, order_seed=0)[0] for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert equal(one, again)
    assert not equal(one, other)  # the same order of the same texts
    without = text_anchor(encoder_folder(tmp_path / "encoder", dropout=0.0))
    first, second = (train(without, tmp_path / f"d{seed}", seed=seed, order_seed=0)[0] for seed in (0, 1))
    assert equal(first, second)


def test_the_head_learns_first_and_a_frozen_one_stays_the_anchors(tmp_path, start):
    model = build_classifier(start)
    texts = tokenised(Sentences(), start.meta["preprocess"])
    recipe = recipe_for(start, head_first_epochs=1)
    run = new_run(model, texts, recipe, preprocess=start.meta["preprocess"], seed=0)
    run.train(until=3)
    changed = {name for name, t in model.state_dict().items() if not np.array_equal(t.numpy(), start.tensors[name])}
    assert changed == {"head.weight", "head.bias"}
    frozen, _, _ = train(start, tmp_path, train_head=False)
    assert {n for n in frozen if np.array_equal(frozen[n], start.tensors[n])} == {"head.weight", "head.bias"}


def test_a_share_of_the_texts_is_drawn_by_the_seed_and_is_all_that_is_seen(bert):
    texts = tokenised(Sentences(), bert.meta["preprocess"])
    parts = [examples_of(texts, recipe_for(bert, share=0.5), seed) for seed in (3, 3, 4)]
    texts_of = [[tuple(part.tokens(row)) for row in range(12)] for part in parts]
    assert texts_of[0] == texts_of[1] != texts_of[2]
    assert set(texts_of[0]) < {tuple(texts.tokens(row)) for row in range(24)}
    batches = TextBatches(parts[0], bert.meta["preprocess"], batch_size=4, order_seed=3)
    seen = {tuple(row[row > 0].tolist()) for step in range(6) for row in batches[step][0]}
    assert seen == set(texts_of[0])


def test_training_learns_what_the_texts_say(tmp_path, bert):
    _, history, _ = train(bert, tmp_path, epochs=30, lr=1e-2)
    assert history[-1]["validation/top1"] == 1.0


def test_accuracy_on_texts_is_that_of_each_alone(start):
    model, data, preprocess = build_classifier(start), Sentences(40), start.meta["preprocess"]
    tokenization = Tokenization.of(preprocess)
    hits = 0
    for text, label in zip(data.texts, data.labels, strict=True):
        with torch.inference_mode():
            features = model.tower(tokenization.batch([tokenization(text)]))
            logits = functional.linear(functional.normalize(features, dim=1), model.head.weight, model.head.bias)
        hits += int(logits.argmax()) == label
    assert accuracy(model, data, preprocess, torch.device("cpu")) == hits / 40
    assert 0 < hits < 40


# ---------------------------------------------------------------- killed and started again


@pytest.fixture
def after_every_step(monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY_S", -1.0)


def killed_in_save(number: int, work, cls=ResumePoint) -> None:
    """Do `work` in a process that is killed once so many resume points are written."""

    def until():
        left, save = [number], cls.save

        def dies(self, *arguments):
            save(self, *arguments)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        cls.save = dies
        work()

    assert child(until) == signal.SIGKILL


EVERYTHING = {"head_first_epochs": 1, "micro_batch": 3, "precision": "float16", "layer_decay": 0.6, "decay": "matrices"}
EVERYTHING |= {"gradient_checkpointing": True, "epochs": 2}


@pytest.mark.usefixtures("after_every_step")
@pytest.mark.parametrize("changes", [{"weight_decay": 0.3}, EVERYTHING], ids=["plain", "everything"])
def test_killed_after_any_step_and_started_again_a_run_ends_with_the_same_bytes(tmp_path, start, changes):
    expected, history, averages = train(start, tmp_path / "whole", **changes)
    folder = tmp_path / "killed"
    for saves in (2, 3, 1):
        killed_in_save(saves, partial(train, start, folder, **changes))
    found, again, averages_again = train(start, folder, **changes)
    assert equal(found, expected)
    assert again == history
    assert all(equal(averages_again[name], averages[name]) for name in averages)


@pytest.mark.usefixtures("after_every_step")
def test_so_do_seeds_that_are_merged_on_the_way(tmp_path, bert):
    work = partial(train_side_by_side, bert, merging=arm(every=2 / 3), epochs=2)
    expected = work(tmp_path / "whole")
    for saves in (4, 3):
        killed_in_save(saves, partial(work, tmp_path / "run"), Periodic)
    found = work(tmp_path / "run")
    assert equal(found[0], expected[0])
    assert found[1:] == expected[1:]


# ---------------------------------------------------------------- merged on the way, and over several devices


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_merges_text_towers_and_leaves_words_without_texts(tmp_path, bert, rule):
    tensors, history, reports = train_side_by_side(bert, tmp_path, merging=ARMS[rule](rule=rule, size=2), epochs=2)
    assert len(reports) == 2
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert "validation/top1" in history[-1]
    words = tensors["text.transformer.embeddings.word_embeddings.weight"]
    before = bert.tensors["text.transformer.embeddings.word_embeddings.weight"]
    assert np.array_equal(words[VOCABULARY.index("##q")], before[VOCABULARY.index("##q")])


def in_two_processes(tmp_path: Path, work) -> None:
    """Do `work(world)` in two processes that gloo joins."""

    def one(rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        work(World(rank, 2))
        dist.destroy_process_group()

    pid = os.fork()
    if pid == 0:
        os._exit(child(lambda: one(1)) != 0)
    assert child(lambda: one(0)) == 0
    assert os.waitpid(pid, 0)[1] == 0


def test_one_seed_over_two_processes_takes_the_steps_of_one(tmp_path):
    start = clip_text_anchor()  # without dropout, which each process draws for itself
    options = {"weight_decay": 0.3, "head_first_epochs": 1, "lr": 1e-4, "micro_batch": 2}

    def work(world: World) -> None:
        tensors, history, _ = train(start, tmp_path / "two", world=world, devices=2, **options)
        if world.rank == 0:
            np.savez(tmp_path / "two.npz", **tensors)
            (tmp_path / "history.json").write_text(json.dumps(history))

    in_two_processes(tmp_path, work)
    one, history, _ = train(start, tmp_path / "one", **options)
    two = np.load(tmp_path / "two.npz")
    for name, tensor in one.items():
        moved = np.linalg.norm(tensor - start.tensors[name])
        assert np.linalg.norm(two[name] - tensor) <= 0.05 * moved, name
    losses = [[row["loss"] for row in rows] for rows in (history, json.loads((tmp_path / "history.json").read_text()))]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_an_encoder_with_dropout_trains_over_two_processes_and_one_seed_in_each_gives_the_bytes_of_one(tmp_path, bert):
    def work(world: World) -> None:
        shared, _, _ = train(bert, tmp_path / "shared", world=world, devices=2, gradient_checkpointing=True)
        merged, _, _ = train_side_by_side(bert, tmp_path / "merged", world=world)
        np.savez(tmp_path / f"{world.rank}.npz", *shared.values(), **merged)

    in_two_processes(tmp_path, work)
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first.files)
    expected, _, _ = train_side_by_side(bert, tmp_path / "one")
    assert equal({name: first[name] for name in expected}, expected)


# ---------------------------------------------------------------- a seed and its files


def text_split(folder: Path, role: str):
    """Sentences as shards."""
    data = Sentences()
    return make_texts(folder, data.texts, data.labels, benchmark=role, role=role)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_seed_is_trained_from_shards_and_written_with_what_it_says_of_itself(tmp_path, monkeypatch, bert, in_memory):
    monkeypatch.chdir(tmp_path)
    splits = [text_split(tmp_path / name, name) for name in ("train", "held-out")]
    inputs = read_inputs(bert, *splits, in_memory=in_memory)
    recipe = recipe_for(bert, snapshots=True, ema=[0.5])
    with pytest.warns(Notice, match="1 of 24"):
        share = finetune_seed(
            inputs,
            recipe,
            name="seed-0",
            made_by={"stage": "finetune", "seed": 0},
            setting=Setting(workers=2),
            out=tmp_path / "out",
        )
    assert 0 <= share <= 1
    tensors, history, _ = train(bert, tmp_path / "same", snapshots=False, ema=[0.5])
    sets = {path.stem: load_weights(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(sets) == {"weights", "ema-0.5", "lawa", "epoch-1", "epoch-2"}
    assert equal(sets["weights"].tensors, tensors)
    assert history[-1]["validation/top1"] == share
    for weights in sets.values():
        assert weights.meta["preprocess"] == bert.meta["preprocess"]
        assert weights.meta["parents"] == [bert.identity]
        assert weights.meta["notices"] == [
            "pretrain.length: 1 of 24 training texts have more than 12 tokens; the rest of them is not read"
        ]


def test_images_for_a_text_tower_and_texts_for_an_image_tower_are_one_line_each(tmp_path, anchor, bert):
    texts = text_split(tmp_path / "texts", "train")
    make_split(tmp_path / "images", "train", 24)
    images = open_dataset(tmp_path / "images")
    with pytest.raises(WeightsError, match="got a tower for texts; expected one for the images"):
        read_inputs(bert, images, images, in_memory=False)
    with pytest.raises(WeightsError, match="got a tower for images; expected one for the texts"):
        read_inputs(anchor, texts, texts, in_memory=False)


# ---------------------------------------------------------------- GPUs, held where there is none


@pytest.mark.parametrize("changes", [{"precision": "float16"}, {"gradient_checkpointing": True, "micro_batch": 3}])
def test_training_on_texts_keeps_to_one_device(start, changes):
    preprocess = start.meta["preprocess"]
    # The tokens are of values, which are made on the CPU in any case.
    batch = [torch.zeros(8, 5, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)]

    def work():
        with pretended_gpu():
            model = build_classifier(start).to("cuda")
            data, recipe = tokenised(Sentences(), preprocess), recipe_for(start, **changes)
            run = new_run(
                model, data, recipe, preprocess=preprocess, seed=0, world=World(device=torch.device("cuda", 0))
            )
            run.batches = lambda start, stop: (batch for _ in range(start, stop))
            run.train(until=2)
            assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}

    assert child(work) == 0
