"""A model directory may bring programs along: configuration, tokenizer, chat template. None of them is run unasked."""

import json
import shutil

import jinja2
import pytest
import torch
import transformers.dynamic_module_utils
from transformers import AutoConfig, PretrainedConfig

from abba.base_model import build_empty, find_base, load_config, load_tokenizer, load_whole
from abba.errors import CheckpointError, RecipeError
from abba.text.encode import encode_prompt
from abba.text.prompt import CHAT
from tests import warm
from tests.distributed.ranks import STORIES, TINY

CODE = "open({canary!r}, 'w').close()\nfrom transformers import PretrainedConfig as Evil\n"


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the model's code ran"


@pytest.fixture
def base(tmp_path):
    """A copy of the tiny model with code beside it that leaves a canary when imported."""
    shutil.copytree(TINY, tmp_path / "base")
    for name in ("evil", "generate", "custom_generate/generate", "modeling_llama", "tokenization_llama", "setup"):
        path = tmp_path / f"base/{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE.format(canary=str(tmp_path / "executed")))
    return tmp_path / "base"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def use(base):
    load_config(find_base(str(base), None))
    load_tokenizer(base)
    load_whole(base, torch.float32, "eager")


def test_the_code_is_live(base, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(PretrainedConfig, "_auto_class", None)  # is set by what follows, and put back
    edit(base / "config.json", auto_map={"AutoConfig": "evil.Evil"}, model_type="evil")
    AutoConfig.from_pretrained(base, trust_remote_code=True)
    assert (tmp_path / "executed").exists()


def test_code_that_nothing_names_is_not_looked_at(base, canary):
    use(base)


EVIL = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": "evil.Evil"}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"auto_map": EVIL}, "auto_map: names Python code"),
        ({"auto_map": EVIL, "model_type": "evil"}, "auto_map: names Python code"),
        ({"auto_map": {"AutoConfig": "someone/repo--evil.Evil"}}, "auto_map: names Python code"),
        ({"auto_map": ["evil.Evil", None]}, "auto_map: names Python code"),
        ({"text_config": {"vision": [{"auto_map": EVIL}]}}, "auto_map: names Python code"),
        ({"custom_pipelines": {"x": {"impl": "evil.Evil"}}}, "custom_pipelines: names Python code"),
        ({"_attn_implementation_internal": "someone/kernel"}, "'_attn_implementation_internal': sets a variable"),
        ({"_attn_implementation": "someone/kernel"}, "'_attn_implementation': sets a variable"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation: chooses code"),
        ({"_experts_implementation_internal": "x"}, "'_experts_implementation_internal': sets a variable"),
        ({"experts_implementation": "someone/kernel"}, "experts_implementation: chooses code"),
        ({"text_config": {"_attn_implementation_internal": "x/y"}}, "'_attn_implementation_internal': sets"),
        ({"__class__": "x"}, "'__class__': sets a variable"),
        ({"use_kernels": True}, "use_kernels: fetches code"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantization_config: describes a quantised model"),
        ({"transformers_weights": "../x.safetensors"}, "transformers_weights: names other weights"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files: names other files"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers': 1000000000 is above 1000"),
        ({"n_layer": 10**9}, "'n_layer': 1000000000 is above 1000"),
        ({"num_labels": 10**9}, "'num_labels': 1000000000 is above 1000000"),
        ({"vocab_size": 10**12}, "'vocab_size': 1000000000000 is above 10000000"),
        ({"hidden_size": 10**39}, "is above 10000000"),
        ({"text_config": {"num_layers": 5000}}, "'num_layers': 5000 is above 1000"),
        ({"tokenizer_class": "EvilTokenizer"}, "tokenizer_class 'EvilTokenizer' is none of transformers'"),
        ({"model_type": "evil"}, "its config.json cannot be used"),
        ({"model_type": "../../evil"}, "its config.json cannot be used"),
        ({"dtype": "load"}, "its config.json cannot be used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_config_json_may_not_say(base, canary, changes, named):
    edit(base / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        use(base)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "auto_map: names Python code"),
        ({"auto_map": ["evil.Evil", None], "tokenizer_class": "Evil"}, "auto_map: names Python code"),
        ({"tokenizer_class": "EvilTokenizer"}, "tokenizer_class 'EvilTokenizer' is none of transformers'"),
        ({"tokenizer_class": "AutoModelForCausalLM"}, "'AutoModelForCausalLM' is none of transformers'"),
        ({"tokenizer_class": "pipeline"}, "'pipeline' is none of transformers'"),
        ({"tokenizer_class": "evil.EvilTokenizer"}, "'evil.EvilTokenizer' is none of transformers'"),
        ({"tokenizer_class": ["x"]}, "its tokenizer cannot be loaded"),
        ({"tokenizer_file": "/etc/passwd"}, "tokenizer_file: names a file"),
        ({"vocab_file": "../x"}, "vocab_file: names a file"),
        ({"fast_tokenizer_files": ["tokenizer./../../x.json"]}, "fast_tokenizer_files: names other files"),
        ({"init_inputs": ["/etc/passwd"]}, "init_inputs: passes anything"),
    ],
)
def test_what_tokenizer_config_json_may_not_say(base, canary, changes, named):
    edit(base / "tokenizer_config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        use(base)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_key_that_stands_twice_hides_nothing(base, canary, name):
    path = base / name
    path.write_text(path.read_text().replace("{", '{"auto_map": {"AutoConfig": "evil.Evil"}, "auto_map": null,', 1))
    with pytest.raises(CheckpointError, match="'auto_map' stands twice"):
        use(base)


def test_an_adapter_is_no_base(base, canary):
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(CheckpointError, match="so it is an adapter and no base model"):
        use(base)


TEMPLATE = (
    "{{% set ns = cycler.__init__.__globals__ %}}{{{{ ns.os.system('touch {canary}') }}}}"
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ raise_exception('ran') }}}}"
    "{{% for x in range(10**9) %}}{{% endfor %}}"
)


def test_a_chat_template_is_not_rendered_unasked(base, canary, monkeypatch):
    plain = encode_prompt(load_tokenizer(base), ["Ann has 3 pens."])
    template = TEMPLATE.format(canary=canary)
    edit(base / "tokenizer_config.json", chat_template=template)
    (base / "chat_template.jinja").write_text(template)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text(template)

    def compiled(*_, **__):
        raise AssertionError("a template was compiled")

    monkeypatch.setattr(jinja2.Environment, "compile", compiled)
    monkeypatch.setattr(jinja2.Environment, "from_string", compiled)
    tokenizer = load_tokenizer(base)
    assert "os.system" in str(tokenizer.chat_template), "it is there, as text"
    assert encode_prompt(tokenizer, ["Ann has 3 pens."]) == plain
    load_whole(base, torch.float32, "eager")


ATTACKS = [
    "{% set ns = cycler.__init__.__globals__ %}{{ ns.os.system('touch {canary}') }}",
    "{{ lipsum.__globals__['os'].popen('touch {canary}').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in range(10**9) %}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
    "{% if %}",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_chat_template_that_is_asked_for_writes_text_and_nothing_else(base, canary, attack):
    (base / "chat_template.jinja").write_text(attack.replace("{canary}", str(canary)))
    tokenizer = load_tokenizer(base)
    with pytest.raises(RecipeError, match="the prompt chat: the chat template (refuses it|of .* line 1): ") as refused:
        encode_prompt(tokenizer, ["Ann has 3 pens."], CHAT)
    assert "\n" not in str(refused.value)


def test_the_architecture_is_built_with_the_attention_that_was_asked_for(base, canary):
    edit(base / "config.json", _attn_implementation_autoset=True, _name_or_path="someone/else")
    with torch.device("meta"):
        assert build_empty(base, torch.float32, "eager").config._attn_implementation == "eager"


def test_through_the_programs(base, canary, tmp_path):
    whole = (base / "config.json").read_text()
    score = ["launch/evaluate.py", "--task", "gsm8k", "--data", str(STORIES / "test.jsonl"), "--limit", "2"]
    for number, (changes, named) in enumerate(
        [
            ({"auto_map": EVIL, "model_type": "evil"}, "auto_map"),
            ({"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal"),
            ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ]
    ):
        (base / "config.json").write_text(whole)
        edit(base / "config.json", **changes)
        for program in (
            [
                "launch/train.py",
                "--recipe",
                "quickstart",
                f"model.name_or_path={base}",
                f"output_dir={tmp_path / 'run'}",
            ],
            [*score, "--model", str(base), "--output", str(tmp_path / "out")],
        ):
            finished = warm.run(tmp_path / f"program-{number}", *program)
            assert finished.returncode == 66 and named in finished.stderr, finished.stderr
            assert len(finished.stderr.strip().splitlines()) == 1, finished.stderr
    assert not (tmp_path / "run/checkpoints").exists()
