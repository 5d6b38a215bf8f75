from . import torch_import  # noqa: F401, I001
from .build import *
from .weights import randomize
