"""Rerun the claims of LLM-QAT, QLoRA and L4Q on your own model, with intervals.

What is offered here is listed in __init__.pyi, and imported when it is asked for: `import studylib` costs nothing. For
example:

    model = studylib.load_model("smollm2-135m")
    studylib.round_to_nearest(model, "4-8-4")  # weights-activations-cache; 16 leaves a part alone
    studylib.stored_bytes(model)

    arm = functools.partial(studylib.build_arm, studylib.profile("quick"), "smollm2-135m")
    records = studylib.run([arm("full-precision"), arm("rtn", "8-8-8")], "results/runs")
    studylib.frame(records)  # a pandas DataFrame, a row a record

    for finding in studylib.judge(studylib.CLAIMS["A4"], records):
        print(finding.sentence)
"""

import logging
import warnings

import lazy_loader

# transformers imports torchao and bitsandbytes where they are, which report kernels that this machine cannot load.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are text, in notebooks too

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
