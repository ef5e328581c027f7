"""How tokenizers are compared."""

import math

from lean_merge.checkpoints import open_checkpoint
from lean_merge.demo.run import FAMILY
from lean_merge.mapping.kinship import Tokens, compare_tokens


def test_tokens_that_only_one_role_has_are_found_and_their_absence_is_too():
    base, mllm = (open_checkpoint(str(FAMILY / role)) for role in ("base", "mllm"))
    assert compare_tokens(base, {"mllm": mllm}) == {"mllm": Tokens(51, 0, 51.0)}
    assert compare_tokens(mllm, {"base": base}) == {"base": Tokens(51, 0, math.inf)}
