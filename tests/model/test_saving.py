"""What trainers and the hub pass to saving and loading is honoured or refused."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from llama_adapter import ConfigError, LlamaAdapterForConditionalGeneration

NAME = "adapter_model.safetensors"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_whole_state_dict_gives_the_adapter_alone(build, tmp_path, prefix):
    model = build()
    model.save_pretrained(tmp_path / "own")
    whole = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    inner = {name.replace(".mlp.", ".mlp._orig_mod."): t for name, t in whole.items()}
    for place, state in (("whole", whole), ("inner", inner)):
        model.save_pretrained(tmp_path / place, is_main_process=True, state_dict=state)
        assert (tmp_path / place / NAME).read_bytes() == (tmp_path / "own" / NAME).read_bytes()


def test_accelerate_s_idiom(build, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = build()
    wrapped = accelerator.prepare(model)
    accelerator.unwrap_model(wrapped).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(wrapped),
        safe_serialization=True,
        max_shard_size="5GB",
    )
    stored = load_file(tmp_path / NAME)
    assert stored.keys() == model.adapter.state_dict().keys()
    assert all(torch.equal(stored[n], t) for n, t in model.adapter.state_dict().items())


def test_what_is_not_there_is_not_written(build, tmp_path):
    model = build()
    whole = model.state_dict()
    gate = next(name for name in whole if name.endswith(".gate"))
    short = {name: tensor for name, tensor in whole.items() if name != gate}
    empty = {**whole, gate: torch.empty(0)}
    for state, message in (
        (short, r"state_dict lacks \['layers\.\d\.attention\.\w*gate'\] \(1 in all\)"),
        ({}, "state_dict lacks"),
        (empty, r"gate of the adapter 'default' is not here as a whole \(shape \[0\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.save_pretrained(tmp_path / "none", state_dict=state)
    for options, message in (
        ({"safe_serialization": False}, "cannot do safe_serialization=False"),
        ({"variant": "fp16"}, "cannot do variant='fp16'"),
        ({"save_function": print}, "takes accelerator.save or no save_function"),
        ({"safe_serialisation": True}, "did you mean 'safe_serialization'"),
        ({"push_to_hub": True}, r"call push_to_hub\(NAME\)"),
        ({"selected_adapters": ["third"]}, "no adapter 'third'"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.save_pretrained(tmp_path / "none", **options)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_chosen_adapters_go_into_folders_of_their_names(build, tmp_path):
    model = build("v2-chat")
    model.add_adapter(model.adapter_config, "second", seed=1)
    model.save_pretrained(tmp_path, selected_adapters=["default", "second"])
    for folder, name in ((tmp_path, "default"), (tmp_path / "second", "second")):
        stored = load_file(folder / NAME)
        own = model.get_adapter_state_dict(name)
        assert all(torch.equal(stored[key], tensor) for key, tensor in own.items())
    model.load_adapter(tmp_path, "third", subfolder="second")


def test_loading_options_are_honoured_or_refused(build, base, tmp_path):
    model = build("v2-chat")
    model.save_pretrained(tmp_path / "repo/inner")
    load = LlamaAdapterForConditionalGeneration.from_pretrained
    again = load(tmp_path / "repo", subfolder="inner", language_model=base())
    assert again.adapter_config == model.adapter_config
    for options, message in (
        ({"revision": "v1"}, "is a directory, which has no revision 'v1'"),
        ({"subfolder": "../inner"}, "leads out of the adapter's repository"),
        ({"tp_plan": "auto"}, "tp_plan"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "repo/inner", language_model=base(), **options)
    with pytest.raises(ConfigError, match="unknown option 'hotswap'"):
        model.load_adapter(tmp_path / "repo/inner", "more", hotswap=True)


def test_no_path_of_this_machine_is_pushed(build, base, tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = LlamaAdapterForConditionalGeneration.from_base(str(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"recorded as .*base', a directory of this machine"):
        model.push_to_hub("owner/mine")


def test_a_card_is_written_and_one_of_the_users_stays(build, tmp_path):
    model = build("v2-chat")
    model.config.base["name_or_path"] = "owner/base"
    model.save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.base_model == "owner/base"
    assert card.data.library_name == "llama-adapter"
    assert 'from_pretrained("mine")' in card.text
    model.config.base["name_or_path"] = str(tmp_path / "base")  # no name on the hub
    (tmp_path / "base").mkdir()
    model.save_pretrained(tmp_path / "other")
    card = ModelCard.load(tmp_path / "other" / "README.md")
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content
    (tmp_path / "mine" / "README.md").write_text("my own")
    model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
