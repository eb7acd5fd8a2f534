// torch.optim.Adafactor: Shazeer and Stern, Adafactor, 2018, alg. 4, 5 and 6. With one dimension:
//   s = lerp(s, g * g, w), w = t^beta2_decay
// With two or more dimensions the second moment s is the product of the averages of its row and its
// column. They are updated before the step (FactorSums), and the product is the element's input.
// Then
//   u = g / sqrt(max(s, eps1^2)); p = p - (lr * weight_decay * p + step_size * u)
//   step_size = max(eps2, rms(p)) * min(lr, 1 / sqrt(t)) / max(1, rms(u) / d)
struct Adafactor {
  static constexpr Scope kScope = Scope::kFactored;
  static constexpr HyperParameter kHyperParameters[] = {Lr(1e-2),
                                                        {"beta2_decay", -0.8, -1e30, 0},
                                                        {"eps1", 1.1920928955078125e-7},
                                                        {"eps2", 1e-3},
                                                        {"d", 1, 1},
                                                        WeightDecay(0)};
  static constexpr StateSpec kStates[] = {{"variance", CodeBook::kUnsigned, nullptr}};

  struct Scalars {
    float weight, rest;  // w and 1 - w
    float least;         // eps1^2
    float eps1, eps2, d, decay;
    float step_size;  // min(lr, 1 / sqrt(t)), later multiplied as above
    float factored;   // 1: two or more dimensions
  };
  static Scalars Prepare(const double* h, double t) {
    const double weight = std::pow(t, h[1]);
    return {Fp32(weight),
            Fp32(1 - weight),
            Fp32(h[2] * h[2]),
            Fp32(h[2]),
            Fp32(h[3]),
            Fp32(h[4]),
            Fp32(h[0] * h[5]),
            Fp32(std::min(h[0], 1 / std::sqrt(t))),
            0};
  }
  static bool KeepsState(const Scalars& s) { return s.factored == 0; }
  static void Begin(const MatrixShape& shape, Scalars* s) { s->factored = shape.is_matrix ? 1 : 0; }
  static FactorAverage Averaging(const Scalars& s) { return {s.weight, s.rest, s.eps1}; }
  static void Complete(const double* squares, const MatrixShape& shape, Scalars* s) {
    const auto count = static_cast<double>(shape.count());
    const double alpha = std::max<double>(s->eps2, std::sqrt(squares[0] / count)) * s->step_size;
    s->step_size = FiniteFp32(alpha / std::max(1.0, std::sqrt(squares[1] / count) / s->d));
  }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : average(s.rest, s.weight),
          factored(s.factored != 0),
          least(A::Set(s.least)),
          decay(A::Set(s.decay)),
          step_size(A::Set(s.step_size)) {}
    ORLOP_RULE F Direction(F g, F* state) const {
      const F s = state[0] = average(state[0], A::Mul(g, g));
      return A::Div(g, A::Sqrt(A::Max(factored ? state[1] : s, least)));
    }
    ORLOP_RULE void Measure(F g, F p, F* state, F* out) const {
      out[0] = p;
      out[1] = Direction(g, state);
    }
    ORLOP_RULE F operator()(F g, F p, F* state) const {
      return A::Sub(p, A::MulAdd(decay, p, A::Mul(step_size, Direction(g, state))));
    }
    Lerp<A> average;
    bool factored;
    F least, decay, step_size;
  };
};
