"""The main job: a byte-level GPT trained through sharded state servers, beside plain torch. Run it with `python -m demo`."""
