// AdamW with the operations of bitsandbytes' CUDA kernel (csrc/kernels.cu,
// kOptimizerStatic8bit2StateBlockwise), in their order.
//   m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g * g
//   p = (p - lr * sqrt(c2) / c1 * m / (sqrt(v) + eps * sqrt(c2))) * (1 - lr * weight_decay),
//   c = 1 - beta^t
// It differs from Adamw: the weight decay follows the update, eps is scaled by sqrt(c2), and each
// a * b + c that nvcc fuses in that kernel is one MulAdd. With Rounding::kNearest its bits are
// those of the kernel's written rule (python/tests/bnb_cuda_rule.py). A GPU may give other last
// bits of p: that kernel divides by __fdividef, which is approximate; this rule divides by IEEE.
struct AdamwBnb {
  static constexpr HyperParameter kHyperParameters[] = {
      Lr(1e-3), Beta("beta1", 0.9), Beta("beta2", 0.999), Eps(1e-8), WeightDecay(1e-2)};
  static constexpr StateSpec kStates[] = {{"exp_avg", CodeBook::kSigned, "beta1"},
                                          {"exp_avg_sq", CodeBook::kUnsigned, "beta2"}};

  struct Scalars {
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float scaled_eps;  // eps * sqrt(1 - beta2^t)
    float step_size;   // lr * sqrt(1 - beta2^t) / (1 - beta1^t)
    float keep;        // 1 - lr * weight_decay
  };
  static Scalars Prepare(const double* h, double t) {
    const double lr = h[0], beta1 = h[1], beta2 = h[2];
    const double correction2 = std::sqrt(1 - std::pow(beta2, t));
    return {Fp32(beta1),
            Fp32(1 - beta1),
            Fp32(beta2),
            Fp32(1 - beta2),
            Fp32(h[3] * correction2),
            Fp32(lr * correction2 / (1 - std::pow(beta1, t))),
            Fp32(1 - lr * h[4])};
  }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : beta1(A::Set(s.beta1)),
          one_minus_beta1(A::Set(s.one_minus_beta1)),
          beta2(A::Set(s.beta2)),
          one_minus_beta2(A::Set(s.one_minus_beta2)),
          scaled_eps(A::Set(s.scaled_eps)),
          step_size(A::Set(s.step_size)),
          keep(A::Set(s.keep)) {}
    ORLOP_RULE F operator()(F g, F p, F* state) const {
      const F m = state[0] = A::MulAdd(beta1, state[0], A::Mul(one_minus_beta1, g));
      const F v = state[1] = A::MulAdd(beta2, state[1], A::Mul(A::Mul(one_minus_beta2, g), g));
      const F ratio = A::Div(m, A::Add(A::Sqrt(v), scaled_eps));
      return A::Mul(A::NegMulAdd(step_size, ratio, p), keep);
    }
    F beta1, one_minus_beta1, beta2, one_minus_beta2, scaled_eps, step_size, keep;
  };
};
