"""Words that parameter groups may say beside torch's."""

# Options of a group, the default first.
OPTIONS = {"state": ("8bit", "fp32", "4bit"), "rounding": ("no_zero", "nearest", "stochastic"), "master": ("exact", "24bit", "bf16")}
