from models.classifier import Classifier
from models.dit import PRESETS, DiT
from models.networks import build_network, from_pretrained, student_from_teacher
from models.sit import SiT

__all__ = ["PRESETS", "Classifier", "DiT", "SiT", "build_network", "from_pretrained", "student_from_teacher"]
