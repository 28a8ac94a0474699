from . import notebooks, schedule
from .cards import summary
from .check import check_own_data
from .engines import run_check
from .export import export_model
from .machine import environment
from .needs import ClusterError
from .notebooks import read_published, webp
from .pace import Pace, time_text
from .rates import rate_of, validation_loss
from .records import (
    ALL,
    MISSING,
    REFERENCE,
    Record,
    RecordError,
    Store,
    arm_key,
    clean,
    contents,
    digest,
    known_records,
    model_file,
    read_record,
    read_records,
    record_files,
    records_digest,
    seconds_alone,
    short_key,
)
from .verify import TOGETHER, verify_records

__all__ = [
    "ALL",
    "MISSING",
    "REFERENCE",
    "TOGETHER",
    "ClusterError",
    "Pace",
    "Record",
    "RecordError",
    "Store",
    "arm_key",
    "check_own_data",
    "clean",
    "contents",
    "digest",
    "environment",
    "export_model",
    "known_records",
    "model_file",
    "notebooks",
    "rate_of",
    "read_published",
    "read_record",
    "read_records",
    "record_files",
    "records_digest",
    "run_check",
    "schedule",
    "seconds_alone",
    "short_key",
    "summary",
    "time_text",
    "validation_loss",
    "verify_records",
    "webp",
]
