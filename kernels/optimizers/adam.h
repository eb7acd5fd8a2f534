// torch.optim.Adam: like AdamW, but the decay is added to the gradient (L2). Kingma and Ba, 2015,
// alg. 1.
//   g = g + weight_decay * p; m = lerp(m, g, 1 - beta1); v = lerp(v, g * g, 1 - beta2)
//   p = p - lr / c1 * m / (sqrt(v / c2) + eps),  c = 1 - beta^t
struct Adam {
  static constexpr HyperParameter kHyperParameters[] = {
      Lr(1e-3), Beta("beta1", 0.9), Beta("beta2", 0.999), Eps(1e-8), WeightDecay(0)};
  static constexpr StateSpec kStates[] = {{"exp_avg", CodeBook::kSigned, "beta1"},
                                          {"exp_avg_sq", CodeBook::kUnsigned, "beta2"}};

  struct Scalars {
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float eps;
    float step_size;                      // lr / (1 - beta1^t)
    float inverse_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^t)
    float weight_decay;
  };
  static Scalars Prepare(const double* h, double t) {
    const double lr = h[0], beta1 = h[1], beta2 = h[2];
    return {Fp32(beta1),
            Fp32(1 - beta1),
            Fp32(beta2),
            Fp32(1 - beta2),
            Fp32(h[3]),
            Fp32(lr / (1 - std::pow(beta1, t))),
            Fp32(1 / std::sqrt(1 - std::pow(beta2, t))),
            Fp32(h[4])};
  }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : exp_avg(s.beta1, s.one_minus_beta1),
          exp_avg_sq(s.beta2, s.one_minus_beta2),
          eps(A::Set(s.eps)),
          step_size(A::Set(s.step_size)),
          correction(A::Set(s.inverse_sqrt_bias_correction2)),
          weight_decay(A::Set(s.weight_decay)) {}
    ORLOP_RULE F operator()(F gradient, F p, F* state) const {
      const F g = A::MulAdd(weight_decay, p, gradient);
      const F m = state[0] = exp_avg(state[0], g);
      const F v = state[1] = exp_avg_sq(state[1], A::Mul(g, g));
      const F denominator = A::MulAdd(A::Sqrt(v), correction, eps);
      return A::Sub(p, A::Mul(step_size, A::Div(m, denominator)));
    }
    Lerp<A> exp_avg, exp_avg_sq;
    F eps, step_size, correction, weight_decay;
  };
};
