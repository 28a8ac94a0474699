from .config.arm import Arm
from .config.budgets import PROFILES, Profile, profile
from .config.learning_rates import find_family_rates, find_rates
from .config.settings import MICROSCALING, Adapter, BitWidths, Format, Grid, Scheme
from .data.family import check_family
from .data.models import load_model, load_tokenizer
from .evidence.verdicts import judge
from .methods.adapters import merge
from .methods.arms import Setting, build_arm, setting, title
from .methods.base import METHODS, Look, Method, Work, register
from .methods.lora import attach
from .quant.formats import encode_model
from .quant.layers import quantize_model, round_to_nearest
from .quant.storage import stored_bytes
from .report import figures
from .report.explorer import explore
from .report.ledger import CLAIMS
from .report.tables import frame, scoreboard
from .study.parameters import check_parameters
from .study.records import Record, known_records, read_records
from .study.schedule import run

__all__ = [
    "CLAIMS",
    "METHODS",
    "MICROSCALING",
    "PROFILES",
    "Adapter",
    "Arm",
    "BitWidths",
    "Format",
    "Grid",
    "Look",
    "Method",
    "Profile",
    "Record",
    "Scheme",
    "Setting",
    "Work",
    "attach",
    "build_arm",
    "check_family",
    "check_parameters",
    "encode_model",
    "explore",
    "figures",
    "find_family_rates",
    "find_rates",
    "frame",
    "judge",
    "known_records",
    "load_model",
    "load_tokenizer",
    "merge",
    "profile",
    "quantize_model",
    "read_records",
    "register",
    "round_to_nearest",
    "run",
    "scoreboard",
    "setting",
    "stored_bytes",
    "title",
]
