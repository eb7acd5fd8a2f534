"""A new optimizer needs one file and one word: kernels/optimizers/NAME.h, and its name in kernels/optimizers.cmake."""
import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

SAMPLE = """
// A sample: momentum by its sign.
struct Sample {
  static constexpr HyperParameter kHyperParameters[] = {Lr(1e-3), Beta("beta", 0.9)};
  static constexpr StateSpec kStates[] = {{"sample_avg", CodeBook::kSigned, "beta"}};
  struct Scalars {
    float lr, beta, one_minus_beta;
  };
  static Scalars Prepare(const double* h, double) { return {Fp32(h[0]), Fp32(h[1]), Fp32(1 - h[1])}; }
  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s) : lr(A::Set(s.lr)), average(s.beta, s.one_minus_beta) {}
    ORLOP_RULE F operator()(F g, F p, F* state) const {
      state[0] = average(state[0], g);
      return A::NegMulAdd(lr, A::Sign(state[0]), p);
    }
    F lr;
    Lerp<A> average;
  };
};
"""


@pytest.mark.slow
def test_a_sample_optimizer_is_one_file_and_one_word(tmp_path):
    """Built in a copy of the tree, it passes the test of every optimizer: the same bits with every instruction set, format and shard cut.
    """
    for name in ("CMakeLists.txt", "cmake", "kernels"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "kernels/optimizers/sample.h").write_text(SAMPLE)
    registration = tmp_path / "kernels/optimizers.cmake"
    registration.write_text(registration.read_text().replace("  adamw\n", "  adamw\n  sample\n", 1))
    build = tmp_path / "build"
    subprocess.run(["cmake", "-G", "Ninja", "-S", tmp_path, "-B", build, "-DORLOP_KERNELS_ONLY=ON", "-DCMAKE_BUILD_TYPE=Release",
                    "-DCMAKE_CXX_FLAGS_RELEASE=-O2"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["ninja", "-C", build, "kernels_test"], check=True, stdout=subprocess.DEVNULL)
    tested = subprocess.run([build / "bin/kernels_test", "--gtest_filter=SameBits.Every*:Optimizer.Parts*:Validate.*"], text=True,
                            env=os.environ | {"ORLOP_TAIL_STRIDE": "50"}, capture_output=True)
    print(tested.stdout[-2000:])
    assert tested.returncode == 0, tested.stdout[-4000:]
