// AdEMAMix: Pagliardini, Ablin and Grangier, 2024, alg. 1, with its schedulers of alpha and beta3.
//   m = lerp(m, g, 1 - beta1); slow = lerp(slow, g, 1 - beta3_t); v = lerp(v, g * g, 1 - beta2)
//   p = p - lr * ((m / c1 + alpha_t * slow) / (sqrt(v / c2) + eps) + weight_decay * p)
//   alpha_t = min(t / warmup, 1) * alpha
//   beta3_t = min(exp(ln b1 ln b3 / ((1 - t / warmup) ln b3 + t / warmup ln b1)), b3)
// With warmup 0, alpha and beta3 have their values from the first step on.
struct Ademamix {
  static constexpr HyperParameter kHyperParameters[] = {
      Lr(1e-3),  Beta("beta1", 0.9), Beta("beta2", 0.999), Beta("beta3", 0.9999),
      Eps(1e-8), WeightDecay(0),     Positive("alpha", 5), Positive("warmup", 0)};
  static constexpr StateSpec kStates[] = {{"exp_avg", CodeBook::kSigned, "beta1"},
                                          {"exp_avg_slow", CodeBook::kSigned, "beta3"},
                                          {"exp_avg_sq", CodeBook::kUnsigned, "beta2"}};

  struct Scalars {
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float beta3, one_minus_beta3;
    float inverse_bias_correction1;       // 1 / (1 - beta1^t)
    float inverse_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^t)
    float alpha, eps, lr, decay;          // decay: lr * weight_decay
  };
  static double Beta3(const double* h, double t) {
    const double beta1 = h[1], beta3 = h[3], warmup = h[7];
    if (t >= warmup || beta1 <= 0 || beta3 <= beta1) return beta3;
    const double log1 = std::log(beta1), log3 = std::log(beta3), done = t / warmup;
    return std::min(std::exp(log1 * log3 / ((1 - done) * log3 + done * log1)), beta3);
  }
  static Scalars Prepare(const double* h, double t) {
    const double beta3 = Beta3(h, t);
    return {Fp32(h[1]),
            Fp32(1 - h[1]),
            Fp32(h[2]),
            Fp32(1 - h[2]),
            Fp32(beta3),
            Fp32(1 - beta3),
            Fp32(1 / (1 - std::pow(h[1], t))),
            Fp32(1 / std::sqrt(1 - std::pow(h[2], t))),
            Fp32(t < h[7] ? t / h[7] * h[6] : h[6]),
            Fp32(h[4]),
            Fp32(h[0]),
            Fp32(h[0] * h[5])};
  }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : exp_avg(s.beta1, s.one_minus_beta1),
          exp_avg_slow(s.beta3, s.one_minus_beta3),
          exp_avg_sq(s.beta2, s.one_minus_beta2),
          correction1(A::Set(s.inverse_bias_correction1)),
          correction2(A::Set(s.inverse_sqrt_bias_correction2)),
          alpha(A::Set(s.alpha)),
          eps(A::Set(s.eps)),
          lr(A::Set(s.lr)),
          decay(A::Set(s.decay)) {}
    ORLOP_RULE F operator()(F g, F p, F* state) const {
      const F m = state[0] = exp_avg(state[0], g);
      const F slow = state[1] = exp_avg_slow(state[1], g);
      const F v = state[2] = exp_avg_sq(state[2], A::Mul(g, g));
      const F numerator = A::MulAdd(alpha, slow, A::Mul(m, correction1));
      const F denominator = A::MulAdd(A::Sqrt(v), correction2, eps);
      return A::Sub(p, A::MulAdd(decay, p, A::Mul(lr, A::Div(numerator, denominator))));
    }
    Lerp<A> exp_avg, exp_avg_slow, exp_avg_sq;
    F correction1, correction2, alpha, eps, lr, decay;
  };
};
