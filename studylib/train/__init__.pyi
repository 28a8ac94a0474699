from .blocks import decoder_blocks, train_blocks
from .distillation import (
    TrainingData,
    check_head,
    held_out_windows,
    keep_teacher_states,
    last_hidden,
    prepare,
    train_llm_qat,
    validation_windows,
)
from .finetuning import check_paged, check_paging, encode, fine_tune, training_pairs, usable_length
from .loop import Launched, take_over
from .losses import label_loss

__all__ = [
    "Launched",
    "TrainingData",
    "check_head",
    "check_paged",
    "check_paging",
    "decoder_blocks",
    "encode",
    "fine_tune",
    "held_out_windows",
    "keep_teacher_states",
    "label_loss",
    "last_hidden",
    "prepare",
    "take_over",
    "train_blocks",
    "train_llm_qat",
    "training_pairs",
    "usable_length",
    "validation_windows",
]
