"""The main job: a byte-level GPT trained through sharded state servers, beside plain torch. Run with `python -m demo`."""
