"""A model that is attached, for the tests of this folder: settings of every method, a short training, its outputs."""

import torch

from studylib.config.settings import Adapter, Format
from studylib.data import models
from studylib.methods.base import METHODS
from studylib.methods.lora import FineTuned

TUNED = [name for name, method in METHODS.items() if isinstance(method, FineTuned)]
tokens = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))
NF4, FULL, AFFINE = Format("nf", 4, 32), Format("int-full", 4, 32), Format("affine", 4, 32)
SMALL = Adapter(rank=4)
SETTINGS = {  # one format and adapter for each method; the blocks divide the layers' 64 and 160 inputs
    "lora": {"adapter": SMALL},
    "qlora": {"format": NF4, "adapter": SMALL},
    "qa-lora": {"format": AFFINE, "adapter": SMALL},
    "gptq+qa-lora": {"format": FULL, "adapter": SMALL, "tokens": tokens},
    "qat-lora": {"format": AFFINE, "adapter": SMALL},
    "l4q": {"format": FULL, "adapter": SMALL},
    "gptq+lora": {"format": AFFINE, "adapter": SMALL, "tokens": tokens},
    "qat": {"format": FULL},
    "lsq": {"format": FULL},
    "efficientqat": {"format": AFFINE, "tokens": tokens},
}


def loss_of(model):
    with models.autocast(model.device):
        return model(tokens, labels=tokens, use_cache=False).loss


@torch.no_grad()
def logits(model):
    with models.autocast(model.device):
        return model(tokens, use_cache=False).logits.float()


def train(model, steps=10, rate=2e-3):
    """Losses of a few AdamW steps on one batch."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, rate), []
    for _ in range(steps):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def stir(model, seed=0):
    """Random numbers in place of the zeros that adapters start with."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model
