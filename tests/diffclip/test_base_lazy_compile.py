"""DeepSpeed is imported without inductor, and what it asks to be compiled is compiled when it is called."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
from diffclip.base.lazy_compile import ease_deepspeed
ease_deepspeed()
from deepspeed.runtime.zero.muon.original_muon import muon_update, zeropower_via_newtonschulz5 as function
print("torch._inductor.compile_fx" in sys.modules, "torch._inductor.config" in sys.modules)
import torch
torch.compiler.set_stance("force_eager")  # a machine without a compiler has this test, too
matrix = function(torch.diag(torch.tensor([3.0, 2.0, 1.0])), steps=5)
print(function.__name__, tuple(matrix.shape), bool((matrix.diag() - 1).abs().max() < 0.4))
print("torch._inductor.config" in sys.modules)
torch.compiler.set_stance("default")
warnings.simplefilter("error")  # compiled as a part of what calls it, which is itself compiled when it is called
whole = torch.compile(muon_update.__wrapped__, backend="eager", fullgraph=True)
print(whole(torch.randn(4, 3), torch.zeros(4, 3), ns_method="standard").shape)
"""


@pytest.mark.slow
def test_deepspeeds_functions_are_compiled_when_they_are_called():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    *_, before, worked, after, whole = done.stdout.splitlines()
    assert (before, worked, after) == ("False False", "zeropower_via_newtonschulz5 (3, 3) True", "True")
    assert whole == "torch.Size([4, 3])"
