"""`python -m tests.integration.misbehave raise|hang RANK STEP TRAIN_OPTIONS...`: train, with a bug on one rank."""

import sys
import time
from typing import Any
from unittest.mock import patch

from torch import Tensor

from ecn_dist import distributed
from ecn_dist.methods.base import Step
from ecn_dist.train import main
from ecn_dist.training.trainer import Trainer

how, bad_rank, bad_step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
train_step = Trainer.train_step


def with_bug(self: Trainer, batches: Any, at: Step) -> Tensor:
    if (distributed.rank(), at.number) == (bad_rank, bad_step):
        if how == "raise":
            raise ZeroDivisionError("a bug of one rank")
        time.sleep(1000)
    return train_step(self, batches, at)


if __name__ == "__main__":
    with patch.object(Trainer, "train_step", with_bug):
        sys.exit(main(sys.argv[4:]))
