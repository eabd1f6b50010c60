"""`python -m fedpruner_simulate`, which is what `fedpruner simulate` starts."""

from fedpruner_common import malloc

malloc.set_for_training()  # before torch makes its first allocation

import os
import warnings

# What transformers means to change in its next version is not for this program's users.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from fedpruner_simulate.cli import main

main()
