"""Rows to tokens to batches: masks, EOS, BOS, truncation, bad rows; and who computes what at any world size."""

import json
import os
import types
from dataclasses import replace

import datasets
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from abba.errors import DataError
from abba.text.prompt import render_prompt
from abba.text.rows import RowSource
from abba.training.batches import BatchPlan, collate, lines_of, split_rows
from abba.training.loss import token_loss_sum
from abba.training.prepare import unused_fields
from abba.training.tokens import TokenizedRows, prepare_tokens, tokens_path
from tests.distributed.ranks import STORIES, TINY


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def source(path, **changes):
    plain = RowSource(str(path), None, None, "train", "question", None, "answer", None)
    return replace(plain, **changes)


def write_rows(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) + "\n" for row in rows]
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def prepared(tmp_path, tokenizer, where, max_length=512, max_bad_rows=0):
    path = tokens_path(where, max_length, max_bad_rows, tokenizer, tmp_path / "tokens")
    prepare_tokens(where, max_length, max_bad_rows, tokenizer, path, section="data.sources.1")
    return TokenizedRows(path)


def prompt_length(data, row):
    return int(data.supervised(row)[0])


IGNORED = -100
ROW = {"question": "Ann has 3 pens. How many?", "answer": "There are 3.\n#### 3"}


def test_an_example_is_bos_prompt_response_eos(tmp_path, tokenizer):
    data = prepared(tmp_path, tokenizer, source(write_rows(tmp_path, ROW)))
    ids, prompt = data.input_ids(0).tolist(), prompt_length(data, 0)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:prompt]) == render_prompt(ROW["question"])
    assert tokenizer.decode(ids[prompt:-1]) == ROW["answer"]


def test_a_tokenizer_that_appends_eos_or_pads_with_it_changes_nothing(tmp_path, tokenizer):
    plain = prepared(tmp_path, tokenizer, source(write_rows(tmp_path, ROW)))

    class Eager:
        """A tokenizer that ends every text in EOS and pads with it, as some configurations do."""

        eos_token_id, pad_token_id = tokenizer.eos_token_id, tokenizer.eos_token_id

        def __call__(self, texts, add_special_tokens=True):
            encoded = tokenizer(texts, add_special_tokens=add_special_tokens)
            if add_special_tokens:
                encoded["input_ids"] = [[*ids, self.eos_token_id] for ids in encoded["input_ids"]]
            return encoded

        def get_vocab(self):
            return tokenizer.get_vocab()

    eager = prepared(tmp_path, Eager(), source(write_rows(tmp_path, ROW)))
    assert torch.equal(plain.input_ids(0), eager.input_ids(0))


@pytest.mark.parametrize("lines", [[[0], [1]], [[0, 1]], [[1, 0]]], ids=str)
def test_targets_are_the_response_and_its_eos_only(tmp_path, tokenizer, lines):
    longer = {"question": "Tom?", "answer": "There are 3 and 4 and 5.\n#### 12"}
    data = prepared(tmp_path, tokenizer, source(write_rows(tmp_path, ROW, longer)))
    batch = collate(data, lines, tokenizer.eos_token_id, torch.device("cpu"))
    assert sorted(batch.rows) == [0, 1]
    assert torch.equal(batch.predictors, batch.predictors.sort().values)
    all_targets = torch.full_like(batch.input_ids, IGNORED)
    all_targets.view(-1)[batch.predictors] = batch.targets
    for number, line in enumerate(lines):
        start = 0
        for row in line:
            stop, prompt = start + data.length(row), prompt_length(data, row)
            ids, targets = batch.input_ids[number, start:stop], all_targets[number, start:stop]
            assert torch.equal(ids, data.input_ids(row).long())
            assert batch.position_ids[number, start:stop].tolist() == list(range(stop - start))
            assert (targets[: prompt - 1] == IGNORED).all()
            assert torch.equal(targets[prompt - 1 : -1], ids[prompt:]), "each position predicts the next token"
            assert targets[-2] == tokenizer.eos_token_id, "EOS is learned although it also pads"
            assert targets[-1] == IGNORED, "a row does not predict the first token of the next"
            start = stop
        assert (all_targets[number, start:] == IGNORED).all()
    assert len(batch.targets) == data.supervised_tokens([0, 1])


TALK = [("user", "3 and 4?"), ("assistant", "7"), ("user", "and 5?"), ("assistant", "12\n#### 12")]
TALK = [{"role": role, "content": content} for role, content in TALK]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<<' + m.role + '>>\n' + m.content + eos_token + '\n' }}{% endfor %}"
)
TEMPLATE += "{% if add_generation_prompt %}{{ '<<assistant>>\n' }}{% endif %}"


def conversations(tmp_path, *talks, max_length=512):
    """Tokens of conversations, by a copy of the tokenizer with a template."""
    chatty = AutoTokenizer.from_pretrained(TINY)
    chatty.chat_template = TEMPLATE
    path = write_rows(tmp_path, *({"messages": talk} for talk in talks))
    where = source(path, instruction_field=None, response_field=None, messages_field="messages")
    return prepared(tmp_path, chatty, where, max_length)


@pytest.mark.parametrize("lines", [[[0], [1]], [[0, 1]], [[1, 0]]], ids=str)
def test_targets_of_conversations_are_the_assistants_turns(tmp_path, tokenizer, lines):
    data = conversations(tmp_path, TALK, TALK[:2])
    batch = collate(data, lines, tokenizer.eos_token_id, torch.device("cpu"))
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.predictors + 1], batch.targets), "each position predicts the next token"
    texts = {0: "7</s>12\n#### 12</s>", 1: "7</s>"}
    assert tokenizer.decode(batch.targets.tolist()) == "".join(texts[row] for row in batch.rows)
    assert len(batch.targets) == data.supervised_tokens([0, 1]) == data.learned.sum()


def test_a_conversation_is_cut_and_one_whose_answers_are_cut_away_is_bad(tmp_path):
    whole = conversations(tmp_path, TALK)
    limit = whole.supervised(0)[1] + 3  # in the second question
    cut = conversations(tmp_path, TALK, max_length=int(limit))
    assert cut.length(0) == limit and cut.uncut[0] == whole.length(0) and len(cut.supervised(0)) == 2
    with pytest.raises(DataError, match="all labels are masked"):
        conversations(tmp_path, TALK, max_length=int(whole.supervised(0)[0]))


def test_padding_does_not_change_the_loss(tmp_path, tokenizer):
    data = prepared(tmp_path, tokenizer, source(STORIES / "test.jsonl", max_rows=4))
    table = torch.nn.Embedding(tokenizer.vocab_size, tokenizer.vocab_size)
    rows = [collate(data, [[row]], 2, torch.device("cpu")) for row in range(4)]
    together = collate(data, [[0], [1], [2], [3]], 2, torch.device("cpu"))

    def loss(batch):
        return float(token_loss_sum(table(batch.input_ids), batch.predictors, batch.targets).detach())

    assert loss(together) == pytest.approx(sum(map(loss, rows)), rel=1e-5)


def test_lines_are_packed_full_and_hold_every_row_once(tmp_path, tokenizer):
    data = prepared(tmp_path, tokenizer, source(STORIES / "test.jsonl", max_rows=64))
    rows = list(range(5, 60))
    most = 3 * max(map(data.length, rows))
    lines = lines_of(data, rows, most)
    assert sorted(row for line in lines for row in line) == rows
    sizes = [sum(map(data.length, line)) for line in lines]
    assert max(sizes) <= most and len(lines) <= 1.1 * sum(sizes) / most + 1
    assert lines_of(data, rows, data.length(rows[0]) - 1)[-1], "a row longer than a line has one of its own"
    assert len(lines_of(data, rows, float("inf"))) == 1


def test_lines_are_of_one_length():
    """Thirty rows as long as GSM8K's: lines packed one after the other would end with a short one."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(70, 300, (30,), generator=random).tolist()
    lines = lines_of(types.SimpleNamespace(length=lengths.__getitem__), list(range(30)), 512)
    sizes = [sum(map(lengths.__getitem__, line)) for line in lines]
    assert sum(sizes) == sum(lengths) and max(sizes) <= 512
    assert len(sizes) * max(sizes) <= 1.03 * sum(sizes), "hardly any padding"


def test_rows_of_like_length_share_a_micro_batch_of_the_same_global_batch(tmp_path, tokenizer):
    data = prepared(tmp_path, tokenizer, source(STORIES / "test.jsonl", max_rows=64))
    plain, grouped = (BatchPlan(list(range(64)), 16, 4, 7, length) for length in (None, data.length))
    for step in range(4):
        micro = [rows for rank in range(2) for rows in grouped.micro_batches(step, rank, 2)]
        assert sorted(row for rows in micro for row in rows) == sorted(plain.global_rows(step))
        in_order = sorted(micro, key=lambda rows: list(map(data.length, rows)))
        lengths = [data.length(row) for rows in in_order for row in rows]
        assert lengths == sorted(lengths)


def test_input_fields_are_appended_and_long_rows_cut_and_counted(tmp_path, tokenizer):
    row = {"instruction": "Add.", "input": "3 and 4", "response": "7"}
    where = source(
        write_rows(tmp_path, row), instruction_field="instruction", input_field="input", response_field="response"
    )
    data = prepared(tmp_path, tokenizer, where)
    assert "Add.\n3 and 4" in tokenizer.decode(data.input_ids(0)[: prompt_length(data, 0)].tolist())
    limit = prompt_length(data, 0) + 1
    short = prepared(tmp_path, tokenizer, where, limit)
    assert len(short.input_ids(0)) == limit and short.notes == [f"cut 1 of 1 rows to data.max_length={limit} tokens"]


@pytest.mark.parametrize(
    "rows, changes, expected",
    [
        ([{"question": "a"}], {}, "only question; set data.sources.1.instruction_field and data.sources.1.resp"),
        ([ROW, {"question": None, "answer": "b"}], {}, "the first is row 2: question is missing"),
        (
            [ROW, {"question": "a", "answer": " "}],
            {},
            "1 rows cannot be trained on (the first is row 2: answer is empty)",
        ),
        ([{"question": "a", "answer": 3}], {}, "answer is int, not text"),
        ([{"question": "when?", "answer": "2024-05-01"}], {}, "answer was read as a date"),
        ([ROW], {"max_length": 20}, "all labels are masked: the prompt alone fills data.max_length=20 tokens"),
        (["{broken\n"], {}, "cannot be read"),
        ([""], {}, "rows.jsonl: is empty"),
        ([ROW, ROW, '{"question": "a", "ans'], {}, "line 3 is not JSON: Unterminated string"),
        ([ROW, b'{"question": "caf\xe9", "answer": "b"}\n', ROW], {}, "row 2 is not UTF-8 text; convert it"),
        ([{"messages": []}], {}, ", or data.sources.1.messages_field where rows are conversations"),
    ],
)
def test_rows_that_cannot_be_trained_on_end_the_run(tmp_path, tokenizer, rows, changes, expected):
    with pytest.raises(DataError) as error:
        prepared(tmp_path, tokenizer, source(write_rows(tmp_path, *rows)), **changes)
    assert expected in str(error.value)
    assert not (tmp_path / "tokens").exists() or not list((tmp_path / "tokens").iterdir())


def test_the_way_out_is_the_reasons_own(tmp_path, tokenizer):
    """To leave out every row is none."""
    long = {**ROW, "question": ROW["question"] * 9}
    limit = prompt_length(prepared(tmp_path, tokenizer, source(write_rows(tmp_path, long))), 0)
    for rows, said in (
        ([long], r"\); raise data\.max_length for 1 of them$"),
        ([ROW, long, {**ROW, "answer": ""}], r"raise .* for 1 of them, or allow as many with data\.max_bad_rows=2$"),
        ([{**ROW, "answer": ""}], "; mend them$"),
    ):
        with pytest.raises(DataError, match=said):
            prepared(tmp_path, tokenizer, source(write_rows(tmp_path, *rows)), limit)


def test_a_list_of_no_rows_is_empty(tmp_path, tokenizer):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(DataError, match=r"rows\.json: is empty$"):
        prepared(tmp_path, tokenizer, source(tmp_path / "rows.json"))


@pytest.mark.parametrize("given, reason", [(["x", "y"], "choices is list, not text"), (5, "choices is int, not text")])
def test_an_input_that_is_not_text_is_not_left_out_in_silence(tmp_path, tokenizer, given, reason):
    rows = write_rows(tmp_path, {**ROW, "choices": given}, {**ROW, "choices": None})
    with pytest.raises(DataError, match=f"the first is row 1: {reason}"):
        prepared(tmp_path, tokenizer, source(rows, input_field="choices"))


def test_what_nothing_uses_is_not_decoded(tmp_path, tokenizer):
    columns = {**{key: [value] for key, value in ROW.items()}, "picture": [{"bytes": b"no picture", "path": None}]}
    features = datasets.Features({key: datasets.Value("string") for key in ROW} | {"picture": datasets.Image()})
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "rows.parquet")
    assert len(prepared(tmp_path, tokenizer, source(tmp_path / "rows.parquet"))) == 1


def test_a_file_that_changes_and_keeps_its_time_is_read_anew(tmp_path, tokenizer):
    first = prepared(tmp_path, tokenizer, source(write_rows(tmp_path, ROW)))
    path, known = tmp_path / "rows.jsonl", os.stat(tmp_path / "rows.jsonl")
    write_rows(tmp_path, {**ROW, "answer": ROW["answer"].replace("3", "4")})
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert path.stat().st_size == known.st_size
    second = prepared(tmp_path, tokenizer, source(path))
    assert "#### 4" in tokenizer.decode(second.input_ids(0).tolist()) and first.sha256 != second.sha256


def test_fields_that_nothing_uses_are_named(tmp_path, tokenizer):
    path = write_rows(tmp_path, {**ROW, "input": "3 and 4", "id": 1})
    unused = prepare_tokens(source(path), 512, 0, tokenizer, tmp_path / "tokens.safetensors")
    assert unused_fields(unused) == "; of its rows these fields are not used: input, id"
    assert unused_fields(prepare_tokens(source(write_rows(tmp_path, ROW)), 512, 0, tokenizer, tmp_path / "t")) == ""
    with pytest.raises(DataError, match="only question, answer; set data.sources.1.input_field to one of them"):
        prepared(tmp_path, tokenizer, source(write_rows(tmp_path, ROW), input_field="inputt"))


def test_allowed_bad_rows_are_left_out_and_counted_by_reason(tmp_path, tokenizer):
    rows = [ROW, {"question": "", "answer": "b"}, ROW, {"question": "a", "answer": None}]
    data = prepared(tmp_path, tokenizer, source(write_rows(tmp_path, *rows)), max_bad_rows=2)
    assert len(data) == 2 and data.sources.tolist() == [0, 2]
    assert data.notes == ["left out 1 rows: question is empty", "left out 1 rows: answer is missing"]


def test_a_missing_file_or_dataset_says_how_to_fetch_it(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no such file"):
        prepared(tmp_path, tokenizer, source(tmp_path / "none.jsonl"))
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="is no dataset file"):
        prepared(tmp_path, tokenizer, source(tmp_path / "rows.csv"))


def test_the_tokens_name_depends_on_all_that_they_are_made_from(tmp_path, tokenizer):
    path = write_rows(tmp_path, ROW)
    names = {tokens_path(source(path), *limits, tokenizer, tmp_path) for limits in ((512, 0), (99, 0), (512, 1))}
    write_rows(tmp_path, ROW, ROW)
    names.add(tokens_path(source(path), 512, 0, tokenizer, tmp_path))
    assert len(names) == 4


@given(
    rows=st.integers(8, 60), micro=st.sampled_from([1, 2]), groups=st.integers(1, 4), seed=st.integers(0, 5)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_row_once_per_epoch_in_the_same_order_at_any_world_size(rows, micro, groups, seed):
    global_batch = micro * groups
    plan = BatchPlan(list(range(rows)), global_batch, micro, seed)
    steps = 2 * rows  # several epochs
    order = [row for step in range(steps) for row in plan.global_rows(step)]
    for epoch in range(len(order) // rows):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert BatchPlan(list(range(rows)), global_batch, micro, seed).global_rows(steps - 1) == plan.global_rows(steps - 1)
    for world in range(1, groups + 1):
        if groups % world:
            continue
        for step in (0, 3):
            by_rank = [plan.micro_batches(step, rank, world) for rank in range(world)]
            joined = [by_rank[index % world][index // world] for index in range(groups)]
            assert [row for group in joined for row in group] == plan.global_rows(step)


@given(
    rows=st.integers(8, 60),
    groups=st.sampled_from([1, 2, 4, 8]),
    micro=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
    eval_rows=st.integers(0, 3),
    lives=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 9), st.integers(1, 6)), max_size=8),
)
@settings(max_examples=500, deadline=None)
def test_no_chain_of_kills_and_resizes_loses_or_repeats_a_row(rows, groups, micro, seed, eval_rows, lives):
    """A life: world size, steps until it is killed, steps between saves. What came after a save is done again."""
    training, held_out = split_rows(rows + eval_rows, eval_rows, seed)
    assume(len(training) >= micro * groups)
    steps = 2 * rows // (micro * groups) + 1  # two epochs and more
    kept: list[list[int]] = []  # the rows of each step that a checkpoint holds
    for world, survived, save_every in [*lives, (1, steps, steps)]:  # the last one runs to the end
        world = max(size for size in range(1, world + 1) if groups % size == 0)
        done = list(kept)
        for step in range(len(kept), min(steps, len(kept) + survived)):
            # Nothing but the checkpoint's step outlives a process: each life plans anew.
            plan = BatchPlan(training, micro * groups, micro, seed)
            ranks = [plan.micro_batches(step, rank, world) for rank in range(world)]
            assert len({len(batches) for batches in ranks}) == 1, "all ranks take as many micro-batches"
            done.append([row for batches in zip(*ranks, strict=True) for batch in batches for row in batch])
            if (step + 1) % save_every == 0 or step + 1 == steps:
                kept = list(done)
    order = [row for batch in kept for row in batch]
    assert len(kept) == steps and not set(order) & set(held_out)
    for start in range(0, len(order), len(training)):
        epoch = order[start : start + len(training)]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < len(training) or sorted(epoch) == training


def test_too_few_rows_are_refused_and_steps_cover_every_row():
    with pytest.raises(DataError, match=r"3 training rows are left, fewer than train\.global_batch_size=4"):
        BatchPlan([0, 1, 2], 4, 1, 0)
    plan = BatchPlan(list(range(10)), 4, 1, 0)
    assert plan.steps_for(1.0) == 3 and plan.epoch_at(3) == 1.2


def test_held_out_rows_are_disjoint_and_a_function_of_the_seed():
    train, held_out = split_rows(50, 8, 3)
    assert len(held_out) == 8 and not set(train) & set(held_out) and len(train) == 42
    assert split_rows(50, 8, 3) == (train, held_out) and split_rows(50, 8, 4)[1] != held_out


def test_ranks_take_turns_with_the_longest_rows(tmp_path, tokenizer):
    data = prepared(tmp_path, tokenizer, source(STORIES / "train.jsonl", max_rows=512))
    plan, world = BatchPlan(list(range(512)), 32, 4, 7, data.length), 8
    tokens = [
        sum(data.tokens(rows) for step in range(16) for rows in plan.micro_batches(step, rank, world))
        for rank in range(world)
    ]
    assert max(tokens) < 1.05 * min(tokens)
