"""One job from a worker's side: its tensors, the group of workers, and the bytes of a step. The door is :mod:`orlop.job.job`."""
