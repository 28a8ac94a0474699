"""All claims of the three papers, in their order."""

from studylib.evidence import l4q, llm_qat, qlora
from studylib.methods.base import L4Q_PAPER, LLM_QAT_PAPER, QLORA_PAPER

BY_PAPER = {LLM_QAT_PAPER: llm_qat.CLAIMS, QLORA_PAPER: qlora.CLAIMS, L4Q_PAPER: l4q.CLAIMS}
CLAIMS = {claim.id: claim for claims in BY_PAPER.values() for claim in claims}
