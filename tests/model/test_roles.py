"""Names, groups and roles of tensors are declared by their modules, and a file tells them too."""

from __future__ import annotations

import pytest
from benchmarks import families

from llama_adapter.checkpoints.description import group_and_role
from llama_adapter.model.groups import Role

LANGUAGE = {Role.PROMPT, Role.GATE, Role.BIAS, Role.SCALE, Role.NORM}
SETTINGS = {
    "v2": {Role.PROJECTION, *LANGUAGE},
    "v1": {Role.PROMPT, Role.GATE},
    "v1-multimodal": {Role.PROMPT, Role.GATE, Role.PROJECTION},
    "v2-chat": LANGUAGE,
}


@pytest.mark.parametrize(("preset", "roles"), SETTINGS.items())
def test_every_trainable_has_its_role(build, preset, roles):
    model = build(preset)
    trainables = list(model.adapter.trainables())
    assert {t.role for t in trainables} == roles
    named = dict(model.named_parameters())
    assert {id(t.parameter) for t in trainables} == {
        id(p) for n, p in named.items() if p.requires_grad
    }


def test_matrices_are_the_weights_of_the_projections_linears(build):
    model = build("v2", projector="query_transformer")
    found = {t.name for t in model.adapter.trainables() if t.is_matrix}
    assert "visual.projector.blocks.0.qkv.weight" in found
    assert all(n.startswith("visual.") and n.endswith(".weight") for n in found)
    assert "visual.projector.norm.weight" not in found


EVERYTHING = {"lora_rank": 2, "gate_scale": True}
"""What no preset of a fresh adapter has."""


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {**EVERYTHING, "fusion": "late", "visual_prompt_length": 5}]
)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmo2", "qwen3_moe"])
def test_a_file_tells_groups_and_roles_by_names_alone(family, options):
    adapter = families.make_adapted(families.make_base(family), **options).adapter
    names = {t.name for t in adapter.trainables()}
    group_of = {
        f"{name}.{t.name}": module.group
        for name, module in adapter.modules()
        for t in module.trainables()
    }
    for trainable in adapter.trainables():
        expected = (group_of[trainable.name], trainable.role)
        assert group_and_role(trainable.name, names) == expected, trainable.name
