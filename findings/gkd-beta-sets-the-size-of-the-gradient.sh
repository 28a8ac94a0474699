#!/usr/bin/env bash
# trl's GKD loss with beta 0.1 has an eleventh of the gradient that it has with beta 0, with beta 0.001 a thousandth.
#
# One would expect: beta goes from KL to reverse KL, so that what lies between is of a size between, and 0.001 is nearly
# 0. A sweep over beta then compares losses at one learning rate, one clipping and one weight beside other losses.
# Seen with trl 1.16.0, generalized_jsd_loss of its GKDTrainer, a student near its teacher, 1,000 classes: of the norm
# of the gradient at beta 0 there is 0.0010 left at 0.001, 0.089 at 0.1, 0.25 at 0.5, 0.090 at 0.9, and 1.01 at 1. That
# is beta (1 - beta) of it between the ends, and all of it at them. The direction hardly depends on beta (cosines of
# 0.985 and more). So from beta 0 to 0.001 the gradient falls to a thousandth.
# Guess written down before the run: the loss is smaller between the ends, by a factor of two or so.
# Where it comes from: trl/experimental/gkd/gkd_trainer.py. The generalized Jensen-Shannon divergence (Agarwal et al.
# 2024, equation 1) vanishes as beta goes to 0 or 1; only divided by beta does it go to KL. The function takes the two
# KLs at the ends, and the plain divergence elsewhere. trl's gold and iw_opd trainers have copies of it.
# Whom it hurts: whoever sweeps beta. What differs between arms is how strong the loss is beside max_grad_norm, weight
# decay and other terms, and with plain SGD the learning rate, as much as what is distilled.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 \
  datasets==5.2.0 trl==1.16.0
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON' || { tail -5 messages; exit 1; }
import sys

import torch
from trl.experimental.gkd import GKDTrainer

generator = torch.Generator().manual_seed(0)
teacher = 2 * torch.randn(1, 64, 1000, generator=generator)
student = teacher + 0.3 * torch.randn(1, 64, 1000, generator=generator)
found = {}
for beta in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0):
    own = student.clone().requires_grad_()
    loss = GKDTrainer.generalized_jsd_loss(own, teacher, beta=beta)
    loss.backward()
    found[beta] = own.grad.flatten()
    alike = torch.cosine_similarity(found[beta], found[0.0], dim=0).item()
    share = (found[beta].norm() / found[0.0].norm()).item()
    print(f"beta {beta}: loss {loss.item():.5f}, gradient {share:.4f} of that at 0, cosine with it {alike:.3f}")
share = {beta: (own.norm() / found[0.0].norm()).item() for beta, own in found.items()}
alike = min(torch.cosine_similarity(own, found[0.0], dim=0).item() for own in found.values())
still = (
    0.95 < share[1.0] < 1.05
    and all(0.9 < share[beta] / (beta * (1 - beta)) < 1.1 for beta in share if 0 < beta < 1)
    and alike > 0.97
)
print("as described above" if still else "not as described above any more")
sys.exit(not still)
PYTHON
