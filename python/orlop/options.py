"""Options of parameter groups that torch does not have."""

# The words of each option, the default first.
OPTIONS = {"state": ("8bit", "fp32", "4bit"), "rounding": ("no_zero", "nearest", "stochastic"), "master": ("exact", "24bit", "bf16")}
