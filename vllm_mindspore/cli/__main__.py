"""`python -m vllm_mindspore.cli`, for when the console script is not on PATH."""

import sys

from vllm_mindspore.cli import main

sys.exit(main())
