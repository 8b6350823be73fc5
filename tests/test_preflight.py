"""What can only fail later is refused before a model is read."""

import sys

import pytest

from llavakd.config import parse_recipe
from llavakd.errors import UserError
from llavakd.preflight import check_before_training


@pytest.mark.parametrize(
    ("rows", "processes", "said"),
    [(48, 3, "stage dft: global_batch_size 8 is not a multiple of 3 processes"), (7, 1, "'instruct' has 7 rows")],
)
def test_a_last_stage_whose_batches_cannot_be_made_is_refused_first(tiny, rows, processes, said):
    tree = tiny.tree()
    tree["student"]["language_model"] = "nowhere"
    tree["stages"] = tree["stages"][:1] + tree["stages"][2:]
    tree["stages"][0]["global_batch_size"] = 3
    with pytest.raises(UserError, match=said):
        check_before_training(parse_recipe(tree), {"pretrain": range(48), "instruct": range(rows)}, processes)


@pytest.mark.parametrize(
    ("changes", "lacks", "said"),
    [
        ({"lora_rank": 4}, "peft", r"lora_rank needs peft \(.+\); .*'llava-kd\[lora\]'"),
        ({"lora_rank": 4, "lora_base": "nf4"}, "bitsandbytes", r"nf4 needs bitsandbytes \(.+\); .*'llava-kd\[qlora\]'"),
    ],
)
def test_what_only_a_last_stage_needs_is_asked_for_first(tiny, monkeypatch, changes, lacks, said):
    tree = tiny.tree()
    tree["student"]["language_model"] = "nowhere"
    tree["stages"][-1] |= changes
    for module in ("peft", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, module, None if module == lacks else sys)
    with pytest.raises(UserError, match=said):
        check_before_training(parse_recipe(tree), {"pretrain": range(48), "instruct": range(66)}, 1)
