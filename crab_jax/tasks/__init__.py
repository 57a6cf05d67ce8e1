"""The nine benchmark tasks, in the fixed order that `Batch.task` indexes."""

from crab_jax.tasks.arig import ARIG
from crab_jax.tasks.avcap import AVCAP
from crab_jax.tasks.ave import AVE
from crab_jax.tasks.avqa import AVQA
from crab_jax.tasks.avs import AVSS, MS3, S4
from crab_jax.tasks.avvp import AVVP
from crab_jax.tasks.ref_avs import REF_AVS
from crab_jax.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (AVQA, AVE, AVVP, ARIG, S4, MS3, AVSS, REF_AVS, AVCAP)}
