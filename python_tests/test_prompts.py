"""bupo.data.prompts: files to token ids."""

import copy
import json
import re

import pyarrow.parquet as pq
import pytest
from rl_samples import SYSTEM, data_file, tiny_tokenizer, verl_row, write_parquet
from tokenizers.processors import TemplateProcessing

from bupo import progress
from bupo.config import ConfigError, DataConfig
from bupo.data.prompts import load_prompts


@pytest.fixture
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def chat(*contents):
    return [{"role": role, "content": text} for role, text in zip(("system", "user"), contents)]


def test_parquet_in_verl_format(tmp_path, tokenizer):
    rows = [verl_row("1+1?", "2"), verl_row("Is ∞ > 1?", "Yes", source="other")]
    file = write_parquet(tmp_path / "a.parquet", rows)
    prompts, dropped = load_prompts([str(file)], tokenizer, DataConfig())
    assert dropped == 0
    assert [(p.index, p.source, p.answer) for p in prompts] == [
        (0, "math_dapo", "2"),
        (1, "other", "Yes"),
    ]
    assert prompts[1].text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nIs ∞ > 1?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompts[1].token_ids) == prompts[1].text
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert prompts[1].token_ids.count(start) == 3, "special tokens of the template are one id each"


@pytest.mark.parametrize("name", ["deepmath-5k", "math500"])
def test_the_projects_data(tmp_path, tokenizer, name):
    file = data_file(name, tmp_path)
    rows = pq.read_table(file).slice(0, 50).to_pylist()
    config = DataConfig(max_prompt_tokens=100_000)
    prompts, dropped = load_prompts([str(file)], tokenizer, config, limit=50)
    assert (len(prompts), dropped) == (50, 0)
    for row, one in zip(rows, prompts):
        assert one.answer == row["reward_model"]["ground_truth"]
        assert one.source == row["data_source"]
        assert one.text.endswith("<|im_start|>assistant\n")
        assert all(message["content"] in one.text for message in row["prompt"])
        assert tokenizer.decode(one.token_ids) == one.text


def test_jsonl_of_strings_and_chats(tmp_path, tokenizer):
    rows = [
        {"prompt": "3+4=", "answer": 7},
        {"prompt": "2-2=", "answer": 0, "data_source": "minus"},
        {"prompt": chat("be brief", "hi"), "reward_model": {"ground_truth": "a"}, "answer": "b"},
    ]
    file = write_jsonl(tmp_path / "mixed.jsonl", rows)
    with open(file, "a") as out:
        out.write("\n  \n")  # empty lines are no rows
    prompts, _ = load_prompts([file], tokenizer, DataConfig())
    assert [p.text for p in prompts[:2]] == ["3+4=", "2-2="]
    assert prompts[0].token_ids == tokenizer("3+4=")["input_ids"]
    assert prompts[2].text.endswith("hi<|im_end|>\n<|im_start|>assistant\n")
    assert [p.answer for p in prompts] == ["7", "0", "a"]
    assert [p.source for p in prompts] == ["mixed", "minus", "mixed"]


def test_jsonl_is_split_at_newlines_only(tmp_path, tokenizer):
    # U+2028, U+2029 and U+0085 are ordinary characters inside a JSON string.
    text = "a\u2028b\u2029c\x85d"
    file = tmp_path / "unicode.jsonl"
    row = json.dumps({"prompt": text, "answer": "1"}, ensure_ascii=False)
    file.write_text(row + "\n" + row + "\n", encoding="utf-8")
    prompts, _ = load_prompts([str(file)], tokenizer, DataConfig())
    assert [p.text for p in prompts] == [text, text]


def test_several_files_follow_one_another(tmp_path, tokenizer):
    first = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"a{n}", "answer": "1"} for n in range(4)]
    )
    second = write_parquet(tmp_path / "b.parquet", [verl_row(f"b{n}", "2") for n in range(3)])
    prompts, _ = load_prompts([first, str(second)], tokenizer, DataConfig())
    assert [p.answer for p in prompts] == ["1"] * 4 + ["2"] * 3
    prompts, _ = load_prompts([first], tokenizer, DataConfig(), limit=2)
    assert [p.text for p in prompts] == ["a0", "a1"]


def test_beginning_of_sequence_comes_once(tmp_path, tokenizer):
    # A chat template writes its own; for a plain string the tokenizer adds it.
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    rows = [{"prompt": "ab", "answer": "1"}, {"prompt": chat("s", "u"), "answer": "1"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    (plain, chatted), _ = load_prompts([file], tokenizer, DataConfig())
    assert plain.token_ids[0] == bos and len(plain.token_ids) == 3
    assert chatted.token_ids[0] == bos and chatted.token_ids[1] != bos


@pytest.mark.parametrize(("thinking", "ending"), [(True, "<bot>"), (False, "<bot><no-thinking>")])
def test_chat_template_file_and_its_options(tmp_path, tokenizer, thinking, ending):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
        "{% if enable_thinking is false %}<no-thinking>{% endif %}"
    )
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": chat("s", "u"), "answer": "1"}])
    config = DataConfig(
        chat_template=str(template), chat_template_options={"enable_thinking": thinking}
    )
    (one,), _ = load_prompts([file], tokenizer, config)
    assert one.text == f"[system:s][user:u]{ending}"


def test_a_chat_needs_a_template(tmp_path, tokenizer):
    tokenizer.chat_template = None
    rows = [{"prompt": "plain", "answer": "1"}, {"prompt": chat("s", "u"), "answer": "1"}]
    with pytest.raises(ConfigError, match=r"row 1 of .*data\.chat_template"):
        load_prompts([write_jsonl(tmp_path / "a.jsonl", rows)], tokenizer, DataConfig())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, r"row 1 of .* neither reward_model\.ground_truth nor answer"),
        ({"prompt": "x", "reward_model": {"style": "rule"}}, "row 1 of .* neither"),
        ({"prompt": "x", "reward_model": None}, "row 1 of .* neither"),
        ({"answer": "1"}, "row 1 of .* has no prompt"),
        ({"prompt": 5, "answer": "1"}, "row 1 of .* a string or a list of chat messages"),
        ({"prompt": ["hi"], "answer": "1"}, "row 1 of .* a string or a list of chat messages"),
        ({"prompt": "", "answer": "1"}, "row 1 of .* empty prompt"),
        ({"prompt": "x", "answer": ["1"]}, r"row 1 of .* text or a number, got a list: \['1'\]"),
        ({"prompt": "x", "reward_model": {"ground_truth": {"a": 1}}}, "number, got an object"),
        (5, "row 1 of"),
        (None, "row 1 of"),
        ("prompt", "row 1 of"),
    ],
)
def test_a_bad_row_is_named(tmp_path, tokenizer, row, message):
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "fine", "answer": "1"}, row])
    with pytest.raises(ConfigError, match=message):
        load_prompts([file], tokenizer, DataConfig())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "not found: .*gone.jsonl"),
        ("a.csv", b"prompt,answer\n", r"\.parquet or \.jsonl, got .*a\.csv"),
        ("a.jsonl", b'{"prompt": "x", "answer": "1"}\n{"prompt": \n', "a.jsonl is not JSON lines"),
        ("a.jsonl", b"", "no prompts in .*a.jsonl"),
        ("a.jsonl", b"\xff\xfe\x00", "a.jsonl"),
        ("a.parquet", b"this is no parquet file", "a.parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_prompts([str(tmp_path / name)], tokenizer, DataConfig())


def test_a_template_that_is_no_text(tmp_path, tokenizer):
    template = tmp_path / "template.jinja"
    template.write_bytes(b"\xff")
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": chat("s", "u"), "answer": "1"}])
    with pytest.raises(ConfigError, match=r"data\.chat_template=.*jinja is not UTF-8 text"):
        load_prompts([file], tokenizer, DataConfig(chat_template=str(template)))


def test_evaluation_files_of_one_name(tmp_path, tokenizer):
    """Rows that say what they are of may be joined, those of another file by chance may not."""
    row, files = {"prompt": "x", "answer": "1"}, []
    for folder in "ab":
        (tmp_path / folder).mkdir()
        files.append(write_jsonl(tmp_path / folder / "test.jsonl", [row]))
    with pytest.raises(ConfigError, match=r"a/test\.jsonl and .*b/test\.jsonl would be one"):
        load_prompts(files, tokenizer, DataConfig(), apart=True)
    assert len(load_prompts(files, tokenizer, DataConfig())[0]) == 2, "training does not mind"
    named = write_jsonl(tmp_path / "c.jsonl", [row | {"data_source": "test"}])
    with pytest.raises(ConfigError, match="would be one data set, test: "):
        load_prompts([named, files[0]], tokenizer, DataConfig(), apart=True)
    again = write_jsonl(tmp_path / "d.jsonl", [row | {"data_source": "test"}])
    assert len(load_prompts([named, again], tokenizer, DataConfig(), apart=True)[0]) == 2


def test_no_files_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match=r"no prompts in data\.train=\[\]"):
        load_prompts([], tokenizer, DataConfig())


def overlong_file(tmp_path):
    lengths = (4, 10, 5, 17, 11)
    rows = [{"prompt": "x" * n, "answer": str(n)} for n in lengths]
    return write_jsonl(tmp_path / "a.jsonl", rows)


def test_overlong_prompts_stop_the_run_with_their_number(tmp_path, tokenizer):
    with pytest.raises(ConfigError) as caught:
        load_prompts([overlong_file(tmp_path)], tokenizer, DataConfig(max_prompt_tokens=10))
    message = str(caught.value)
    assert re.search(r"\b2 of 5 prompts\b", message), message
    assert "data.max_prompt_tokens=10" in message and "data.overlong=drop" in message
    assert re.search(r"\blongest 17\b", message), message


def test_overlong_prompts_can_be_dropped(tmp_path, tokenizer):
    config = DataConfig(max_prompt_tokens=10, overlong="drop")
    prompts, dropped = load_prompts([overlong_file(tmp_path)], tokenizer, config)
    assert ([p.answer for p in prompts], dropped) == (["4", "10", "5"], 2)
    config = DataConfig(max_prompt_tokens=3, overlong="drop")
    with pytest.raises(ConfigError, match="no prompts"):
        load_prompts([overlong_file(tmp_path)], tokenizer, config)


def test_reading_tells_how_far_it_is(tmp_path, tokenizer):
    rows = [{"prompt": f"{n}", "answer": "1"} for n in range(4)]
    files = [write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[:2])]
    told = []
    with progress.watched_by(told.append):
        load_prompts(files, tokenizer, DataConfig())
    assert told == [0, 0.125, 0.25, 0.375, 0.5, 0.75]


def test_columns_and_system_prompt_make_chats_of_questions(tmp_path, tokenizer):
    rows = [
        {"question": "2+2?", "final_answer": 4, "level": "easy", "answer": "with reasons"},
        {"prompt": chat("own", "words"), "answer": "a", "data_source": "mine"},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "question", "answer": "final_answer", "data_source": "level"}
    config = DataConfig(columns=columns, system_prompt="Be brief.")
    (asked, own), _ = load_prompts([file], tokenizer, config)
    assert asked.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<")
    assert (asked.answer, asked.source) == ("4", "easy")
    assert own.text.startswith("<|im_start|>system\nown<") and own.answer == "a"
    assert own.source == "mine"
    (asked, _), _ = load_prompts([file], tokenizer, DataConfig(columns=columns, system_prompt=""))
    assert asked.text.startswith("<|im_start|>user\n2+2?<")
    (asked, _), _ = load_prompts([file], tokenizer, DataConfig(columns=columns))
    assert asked.text == "2+2?"
    with pytest.raises(ConfigError, match=r"found: question, final_answer.*data\.columns"):
        load_prompts([file], tokenizer, DataConfig())


def test_the_octothinker_template_is_the_papers_figure_10(tmp_path, tokenizer):
    """With BOS in front, which chat prompts have only where their template has it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    talk = [*chat("Reason.", "2+2?"), {"role": "assistant", "content": "4"}]
    talk.append({"role": "user", "content": "Sure?"})
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": talk, "answer": "1"}])
    config = DataConfig(chat_template="octothinker.jinja")
    (one,), _ = load_prompts([file], tokenizer, config)
    ask = (
        " User: You must put your answer inside \\boxed{} and Your final answer will be extracted "
        "automatically by the \\boxed{} tag.\n"
    )
    assert one.text == (
        "<|im_start|>A conversation between User and Assistant. The user asks a question, and the "
        "Assistant solves it. The assistant first thinks about the reasoning process in the mind "
        f"and then provides the user with the answer.{ask}2+2?\nAssistant: 4{ask}Sure?\nAssistant:"
    )
    assert one.token_ids[0] == tokenizer.bos_token_id
