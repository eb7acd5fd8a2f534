"""`bench/peers/adamw.py` runs at a tiny size. The table has the peers that are installed; a sentence names each of the others."""
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench-peers: begin -->", "<!-- bench-peers: end -->"


def outside_markers(text):
    before, rest = text.split(BEGIN)
    return before, rest.split(END)[1]


def test_every_candidate_is_measured_or_skipped_in_words(tmp_path):
    results = tmp_path / "RESULTS.md"
    original = (ROOT / "bench/RESULTS.md").read_text()
    results.write_text(original)
    command = [sys.executable, "bench/peers/adamw.py", "--mebiparameters", "0.0625", "--rounds", "3", "--threads", "1",
               "--results", results, "--chart", tmp_path / "adamw.png"]
    subprocess.run(command, cwd=ROOT, check=True)
    text = results.read_text()
    assert outside_markers(text) == outside_markers(original)
    assert "(adamw.png)" in text
    assert (tmp_path / "adamw.png").read_bytes().startswith(b"\x89PNG")
    written = text.split(BEGIN)[1].split(END)[0]
    assert "| torch fused, with passes | " in written and "| copy of Orlop 8-bit's bytes | " in written
    for peer in ("DeepSpeed", "bitsandbytes", "torchao", "Orlop"):
        assert f"\n| {peer}" in written or f"\n{peer} skipped" in written, peer
