// LAMB: You et al., Large Batch Optimization for Deep Learning, 2020, alg. 2, phi the identity.
//   m = lerp(m, g, 1 - beta1); v = lerp(v, g * g, 1 - beta2)
//   u = m / c1 / (sqrt(v / c2) + eps) + weight_decay * p,  c = 1 - beta^t
//   p = p - lr * |p| / |u| * u, with norms of the whole tensor; the ratio is 1 if either norm is 0
struct Lamb {
  static constexpr Scope kScope = Scope::kNorms;
  static constexpr HyperParameter kHyperParameters[] = {
      Lr(1e-3), Beta("beta1", 0.9), Beta("beta2", 0.999), Eps(1e-6), WeightDecay(1e-2)};
  static constexpr StateSpec kStates[] = {{"exp_avg", CodeBook::kSigned, "beta1"},
                                          {"exp_avg_sq", CodeBook::kUnsigned, "beta2"}};

  struct Scalars {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;
    float inverse_bias_correction1;       // 1 / (1 - beta1^t)
    float inverse_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^t)
    float step_size;                      // lr, later multiplied by the ratio
  };
  static Scalars Prepare(const double* h, double t) {
    const double beta1 = h[1], beta2 = h[2];
    return {Fp32(beta1),
            Fp32(1 - beta1),
            Fp32(beta2),
            Fp32(1 - beta2),
            Fp32(h[3]),
            Fp32(h[4]),
            Fp32(1 / (1 - std::pow(beta1, t))),
            Fp32(1 / std::sqrt(1 - std::pow(beta2, t))),
            Fp32(h[0])};
  }
  static void Complete(const double* squares, const MatrixShape&, Scalars* s) {
    const bool scales = squares[0] > 0 && squares[1] > 0;
    if (scales) s->step_size = FiniteFp32(s->step_size * std::sqrt(squares[0] / squares[1]));
  }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : exp_avg(s.beta1, s.one_minus_beta1),
          exp_avg_sq(s.beta2, s.one_minus_beta2),
          eps(A::Set(s.eps)),
          weight_decay(A::Set(s.weight_decay)),
          correction1(A::Set(s.inverse_bias_correction1)),
          correction2(A::Set(s.inverse_sqrt_bias_correction2)),
          step_size(A::Set(s.step_size)) {}
    ORLOP_RULE F Direction(F g, F p, F* state) const {
      const F m = state[0] = exp_avg(state[0], g);
      const F v = state[1] = exp_avg_sq(state[1], A::Mul(g, g));
      const F denominator = A::MulAdd(A::Sqrt(v), correction2, eps);
      return A::MulAdd(weight_decay, p, A::Div(A::Mul(m, correction1), denominator));
    }
    ORLOP_RULE void Measure(F g, F p, F* state, F* out) const {
      out[0] = p;
      out[1] = Direction(g, p, state);
    }
    ORLOP_RULE F operator()(F g, F p, F* state) const {
      return A::NegMulAdd(step_size, Direction(g, p, state), p);
    }
    Lerp<A> exp_avg, exp_avg_sq;
    F eps, weight_decay, correction1, correction2, step_size;
  };
};
